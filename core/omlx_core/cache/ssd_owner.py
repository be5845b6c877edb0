"""Who is writing a temporary file, and whether that may still be the case.

The owner's name is part of the file's name: host, process id, and a number of its own for each writer of a process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import time
from pathlib import Path

OWNER_PATTERN = "[0-9a-f]+-[0-9]+-[0-9a-f]+"

_MAX_WRITE_AGE_S = 24 * 3600.0
_live_owners: set[str] = set()


def new_owner() -> str:
    """Name a writer; it owns its files until `retire_owner`, or until its process ends."""
    owner = f"{host_id()}-{os.getpid()}-{secrets.token_hex(8)}"
    _live_owners.add(owner)
    return owner


def retire_owner(owner: str) -> None:
    """Nothing is being written under that name any more: whatever was left may be removed."""
    _live_owners.discard(owner)


def host_id() -> str:
    """This machine, in a few digits that don't say its name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def is_abandoned(owner: str, temporary: Path) -> bool:
    """Whether a temporary file is certainly nobody's any more.

    Process ids say something on their own host only, and may be in use again; a file of a day ago is old anyway.
    """
    host, pid_text, _ = owner.split("-")
    pid = int(pid_text)
    if host == host_id():
        if pid == os.getpid():
            return owner not in _live_owners
        with contextlib.suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
    try:
        return time.time() - temporary.stat().st_mtime > _MAX_WRITE_AGE_S
    except FileNotFoundError:
        return False  # reserved, not written yet
