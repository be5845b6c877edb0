from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omlx_core.errors import InvalidSettingError
from omlx_core.sizes import format_size, parse_size_bytes, total_memory_bytes

GB = 1000**3


@pytest.mark.parametrize(
    ("value", "size_bytes"),
    [
        (0, 0),
        ("0", 0),
        ("0GB", 0),
        ("0%", 0),
        (2_000_000_000, 2 * GB),
        ("2000000000", 2 * GB),
        ("17B", 17),
        ("3kB", 3_000),
        ("2GB", 2 * GB),
        ("2gb", 2 * GB),
        (" 2 GB ", 2 * GB),
        ("1.5GB", 1_500_000_000),
        ("512 MiB", 512 * 1024**2),
        ("1GiB", 1024**3),
        ("4TB", 4 * 1000**4),
        ("1TiB", 1024**4),
        ("9007199254740993", 9007199254740993),  # more than a float can hold
        ("20%", 200),
        ("2.5 %", 25),
        ("100%", 1000),
    ],
)
def test_understands(value: str | int, size_bytes: int) -> None:
    assert parse_size_bytes(value, setting="size", percent_of_bytes=1000) == size_bytes


@pytest.mark.parametrize(
    "value",
    [
        *("12 bananas", "-1", "-1GB", "", " ", "GB", "%", "1e9", "1_000", "1,5GB", "2GB2", "auto", "nan", "inf"),
        *("0x10", "20%%", "1 iB", "2G", "٢GB", -1, True, False, None, 1.5e300, [], b"2GB"),
    ],
)
def test_refuses_and_says_what_to_write(value: Any) -> None:
    with pytest.raises(InvalidSettingError) as raised:
        parse_size_bytes(value, setting="hot_cache_max_size", percent_of_bytes=1000)
    message = str(raised.value)
    assert message.startswith(f"hot_cache_max_size={value!r} is not a size")
    assert '"2GB"' in message
    assert '"20%"' in message


@pytest.mark.parametrize("value", ["150%", "100.1%"])
def test_refuses_more_than_everything(value: str) -> None:
    with pytest.raises(InvalidSettingError, match=f"size='{value}' is more than 100 %"):
        parse_size_bytes(value, setting="size", percent_of_bytes=1000)


@settings(deadline=None, max_examples=200)
@given(st.integers(min_value=0, max_value=2**63))
def test_a_number_of_bytes_means_itself_however_it_is_written(size_bytes: int) -> None:
    for value in (size_bytes, str(size_bytes), f"{size_bytes} B"):
        assert parse_size_bytes(value, setting="size", percent_of_bytes=1) == size_bytes


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=12))
def test_any_text_is_a_size_or_an_invalid_setting(text: str) -> None:
    with contextlib.suppress(InvalidSettingError):
        assert parse_size_bytes(text, setting="size", percent_of_bytes=1000) >= 0


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (64 * 1024**2, "64.0 MiB"),
        (1.5 * 1024**3, "1.5 GiB"),
        (5000 * 1024**4, "5000.0 TiB"),
    ],
)
def test_formats_sizes_for_people(size_bytes: float, text: str) -> None:
    assert format_size(size_bytes) == text


def test_this_machine_has_memory() -> None:
    assert 2**28 < total_memory_bytes() < 2**50
