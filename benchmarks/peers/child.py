"""An adapter at work: a process in its peer's environment that answers one request at a time."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class AdapterError(RuntimeError):
    """An adapter failed, or went away."""


class Child:
    """A context in which an adapter runs.

    Args:
        python: the interpreter of the peer's environment.
        adapter: the script.
        environment: variables that the adapter gets besides this process's own, without its ``PYTHONPATH``: a peer
            sees its own packages only.
        log: file that what it prints is appended to.
    """

    def __init__(self, python: Path, adapter: Path, environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(python), str(adapter)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**inherited, **environment},
                text=True,
            )

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Have one operation done.

        Raises:
            AdapterError: it failed; the message says why and where the log is.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise AdapterError("the adapter's pipes are closed")
        try:
            self._process.stdin.write(json.dumps({"operation": operation, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"it ended with status {self._process.wait()}"}
        if "error" in answer:
            raise AdapterError(f"{operation}: {answer['error']} (its output is in {self._log})")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()  # closes its input, which ends it
