from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from omlx_core.errors import CacheDirectoryError, InvalidSettingError
from omlx_core.settings import CacheSettings, EngineSettings, user_cache_dir
from omlx_core.sizes import total_memory_bytes

ENVIRONMENT = {
    "block_size": ("32", 32),
    "initial_cache_blocks": ("7", 7),
    "hot_cache_max_size": ("2GB", "2GB"),
    "checkpoint_share": ("0.25", 0.25),
    "pin_share": ("0.75", 0.75),
    "paged_ssd_cache_dir": ("/from/environment", Path("/from/environment")),
    "paged_ssd_cache_max_size": ("5GB", "5GB"),
    "ssd_min_free": ("1GB", "1GB"),
    "ssd_write_budget": ("50GB", "50GB"),
    "ssd_read_only": ("true", True),
    "cold_kv_bits": ("8", 8),
    "no_cache": ("true", True),
}
ARGUMENTS: dict[str, Any] = {
    "block_size": 64,
    "initial_cache_blocks": 9,
    "hot_cache_max_size": 4096,
    "checkpoint_share": 1.0,
    "pin_share": 0.1,
    "paged_ssd_cache_dir": Path("/from/argument"),
    "paged_ssd_cache_max_size": "50%",
    "ssd_min_free": "10%",
    "ssd_write_budget": 10**10,
    "ssd_read_only": False,
    "cold_kv_bits": None,
    "no_cache": False,
}


def test_defaults_cache_in_ram_only() -> None:
    settings = CacheSettings()

    assert (settings.block_size, settings.initial_cache_blocks, settings.no_cache) == (256, 256, False)
    assert settings.hot_cache_max_bytes is None
    assert settings.prepare_ssd_cache_dir() is None
    assert settings.ssd_cache_max_bytes(volume_bytes=10**12) == 100 * 10**9


def test_covers_every_setting() -> None:
    assert set(CacheSettings.model_fields) == set(ENVIRONMENT) == set(ARGUMENTS)


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_the_environment_counts_before_the_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = ENVIRONMENT[name]
    assert getattr(CacheSettings(), name) != value

    monkeypatch.setenv(f"OMLX_{name.upper()}", text)

    assert getattr(CacheSettings(), name) == value


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_counts_before_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"OMLX_{name.upper()}", ENVIRONMENT[name][0])

    assert getattr(CacheSettings(**{name: ARGUMENTS[name]}), name) == ARGUMENTS[name]


def test_engine_settings_follow_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMLX_MAX_BATCH_SIZE", "3")
    monkeypatch.setenv("OMLX_PREFILL_STEP_SIZE", "99")

    settings = EngineSettings(prefill_step_size=64)

    assert (settings.prefill_step_size, settings.max_batch_size) == (64, 3)


@pytest.mark.parametrize(
    ("value", "size_bytes"),
    [
        (None, None),
        (0, None),
        ("0", None),
        ("0GB", None),
        ("0%", None),
        ("2GB", 2 * 10**9),
        (12345, 12345),
        ("20%", total_memory_bytes() // 5),
    ],
)
def test_hot_cache_is_unbounded_when_omitted_or_zero(value: Any, size_bytes: int | None) -> None:
    assert CacheSettings(hot_cache_max_size=value).hot_cache_max_bytes == size_bytes


def test_percent_of_the_ssd_tier_is_of_its_volume() -> None:
    assert CacheSettings(paged_ssd_cache_max_size="20%").ssd_cache_max_bytes(volume_bytes=1000) == 200


@pytest.mark.parametrize(
    "setting", ["hot_cache_max_size", "paged_ssd_cache_max_size", "ssd_min_free", "ssd_write_budget"]
)
@pytest.mark.parametrize("value", ["12 bananas", "-1", -1, "150%", "", "auto", True, "2G"])
def test_a_bad_size_fails_where_it_is_written(setting: str, value: Any) -> None:
    with pytest.raises(InvalidSettingError, match=setting) as raised:
        CacheSettings(**{setting: value})
    assert repr(value) in str(raised.value)


def test_a_bad_size_in_the_environment_fails_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMLX_HOT_CACHE_MAX_SIZE", "12 bananas")

    with pytest.raises(InvalidSettingError, match="hot_cache_max_size='12 bananas' is not a size"):
        CacheSettings()


@pytest.mark.parametrize("value", [0, "0", "0GB", "0%"])
def test_an_ssd_tier_without_room_is_refused(value: Any) -> None:
    with pytest.raises(InvalidSettingError, match="leave out paged_ssd_cache_dir"):
        CacheSettings(paged_ssd_cache_max_size=value)


@pytest.mark.parametrize(
    ("volume_bytes", "min_free_bytes"), [(10**11, 5 * 10**9), (2 * 10**11, 10**10), (10**13, 10**10)]
)
def test_the_ssd_tier_leaves_5_percent_or_10_gb_free_whichever_is_less(volume_bytes: int, min_free_bytes: int) -> None:
    assert CacheSettings().ssd_min_free_bytes(volume_bytes) == min_free_bytes


def test_the_ssd_tier_may_be_told_to_leave_nothing_free() -> None:
    assert CacheSettings(ssd_min_free=0).ssd_min_free_bytes(10**11) == 0


def test_writing_is_not_limited_unless_a_budget_is_given() -> None:
    assert CacheSettings().ssd_write_budget_bytes(10**11) is None
    assert CacheSettings(ssd_write_budget="0.5%").ssd_write_budget_bytes(10**11) == 5 * 10**8


@pytest.mark.parametrize("value", [0, "0", "0GB", "0%"])
def test_a_write_budget_of_nothing_is_refused(value: Any) -> None:
    with pytest.raises(InvalidSettingError, match="ssd_read_only"):
        CacheSettings(ssd_write_budget=value)


@pytest.mark.parametrize(
    ("settings_type", "values"),
    [
        (CacheSettings, {"block_size": 0}),
        (CacheSettings, {"block_size": "many"}),
        (CacheSettings, {"initial_cache_blocks": -1}),
        (CacheSettings, {"checkpoint_share": 0}),
        (CacheSettings, {"pin_share": 0}),
        (CacheSettings, {"checkpoint_share": 1.01}),
        (CacheSettings, {"checkpoint_share": float("nan")}),
        (CacheSettings, {"checkpoint_share": "50%"}),
        (CacheSettings, {"paged_ssd_cache_max_size": None}),
        (CacheSettings, {"no_cache": "perhaps"}),
        (EngineSettings, {"prefill_step_size": 0}),
        (EngineSettings, {"max_batch_size": 0}),
    ],
)
def test_a_value_out_of_range_is_named(settings_type: Any, values: dict[str, Any]) -> None:
    ((name, value),) = values.items()

    with pytest.raises(InvalidSettingError, match=rf"{name}.*={value!r}"):
        settings_type(**values)


@pytest.mark.parametrize("settings_type", [CacheSettings, EngineSettings])
def test_an_unknown_setting_is_named_beside_the_known_ones(settings_type: Any) -> None:
    with pytest.raises(InvalidSettingError) as raised:
        settings_type(block_sise=16)
    assert "block_sise=16" in str(raised.value)
    for name in settings_type.model_fields:
        assert name in str(raised.value)


def test_settings_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        CacheSettings().block_size = 2


class TestDirectoryOfTheSSDTier:
    def test_is_created_for_its_owner_only(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "kv"

        prepared = CacheSettings(paged_ssd_cache_dir=path, paged_ssd_cache_max_size="1GB").prepare_ssd_cache_dir()

        assert prepared is not None
        assert (prepared.directory, prepared.max_size_bytes) == (path, 10**9)
        assert stat.S_IMODE(path.stat().st_mode) == 0o700

    def test_may_be_a_string(self, tmp_path: Path) -> None:
        settings = CacheSettings(paged_ssd_cache_dir=str(tmp_path))

        prepared = settings.prepare_ssd_cache_dir()

        assert prepared is not None
        assert prepared.directory == tmp_path

    def test_auto_is_under_the_user_cache_directory(self, isolated_environment: Path) -> None:
        prepared = CacheSettings(paged_ssd_cache_dir="auto").prepare_ssd_cache_dir()

        assert prepared is not None
        assert prepared.directory == user_cache_dir() / "kv" == isolated_environment / "kv"

    def test_may_begin_with_a_tilde(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))

        prepared = CacheSettings(paged_ssd_cache_dir="~/kv").prepare_ssd_cache_dir()

        assert prepared is not None
        assert prepared.directory == tmp_path / "kv"

    def test_is_not_created_without_a_cache(self, tmp_path: Path) -> None:
        path = tmp_path / "kv"

        assert CacheSettings(paged_ssd_cache_dir=path, no_cache=True).prepare_ssd_cache_dir() is None
        assert not path.exists()

    @pytest.mark.parametrize("below", ["", "kv"])
    def test_that_can_not_be_created_is_named(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").touch()
        path = tmp_path / "file" / below

        with pytest.raises(CacheDirectoryError, match=r"can't be created .*: name a folder") as raised:
            CacheSettings(paged_ssd_cache_dir=path).prepare_ssd_cache_dir()
        assert repr(os.fspath(path)) in str(raised.value)

    def test_percent_is_of_its_volume(self, tmp_path: Path) -> None:
        volume = os.statvfs(tmp_path)
        settings = CacheSettings(paged_ssd_cache_dir=tmp_path, paged_ssd_cache_max_size="10%")

        prepared = settings.prepare_ssd_cache_dir()

        assert prepared is not None
        assert prepared.max_size_bytes == int(volume.f_frsize * volume.f_blocks * 10 / 100)

    def test_is_not_created_for_reading_only(self, tmp_path: Path) -> None:
        path = tmp_path / "kv"

        prepared = CacheSettings(paged_ssd_cache_dir=path, ssd_read_only=True).prepare_ssd_cache_dir()

        assert prepared is not None
        assert (prepared.directory, prepared.read_only) == (path, True)
        assert not path.exists()

    def test_brings_the_limits_of_its_volume(self, tmp_path: Path) -> None:
        settings = CacheSettings(paged_ssd_cache_dir=tmp_path, ssd_min_free="1GB", ssd_write_budget="2GB")

        prepared = settings.prepare_ssd_cache_dir()

        assert prepared is not None
        assert (prepared.min_free_bytes, prepared.write_budget_bytes, prepared.read_only) == (10**9, 2 * 10**9, False)
