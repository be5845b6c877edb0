"""One parser for sizes, whether they come from an argument, the environment, the command line or a file."""

from __future__ import annotations

import os
import re

from omlx_core.errors import InvalidSettingError

_UNITS: dict[str, int] = {
    **{"": 1, "b": 1},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)},
}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|[kmgtp]?i?b)?", re.IGNORECASE | re.ASCII)
_REMEDY = 'write bytes (2000000000), a size ("2GB", "512 MiB") or a percentage ("20%")'


def parse_size_bytes(value: str | int, *, setting: str, percent_of_bytes: int) -> int:
    """Turn ``"2GB"``, ``"512 MiB"``, ``"20%"`` or a number of bytes into bytes.

    Decimal units are powers of 1000 and binary ones powers of 1024; case and inner space don't matter.

    Args:
        value: what the user wrote.
        setting: the setting's name, for the error message.
        percent_of_bytes: what ``"100%"`` means.

    Raises:
        InvalidSettingError: anything else, a negative size, or more than 100 %.
    """
    text = str(value).strip()
    match = _SIZE.fullmatch(text)
    if isinstance(value, bool) or match is None:
        raise InvalidSettingError(f"{setting}={value!r} is not a size: {_REMEDY}")
    number, unit = float(match["number"]), (match["unit"] or "").lower()
    if unit == "%":
        if number > 100:
            raise InvalidSettingError(f"{setting}={value!r} is more than 100 %: {_REMEDY}")
        return int(percent_of_bytes * number / 100)
    if unit not in _UNITS:
        raise InvalidSettingError(f"{setting}={value!r} is not a size: {_REMEDY}")
    if "." not in match["number"]:
        return int(match["number"]) * _UNITS[unit]
    return int(number * _UNITS[unit])


def format_size(size_bytes: float) -> str:
    """Bytes for people: ``format_size(64 * 1024**2) == "64.0 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size_bytes < 1024 or unit == "TiB":
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError("unreachable")


def total_memory_bytes() -> int:
    """Physical memory of this machine; on Apple silicon the GPU shares it."""
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
