"""Settings: arguments first, then ``OMLX_*`` environment variables, then defaults."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from pydantic import Field, StrictInt, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from omlx_core.errors import CacheDirectoryError, InvalidSettingError
from omlx_core.sizes import parse_size_bytes, total_memory_bytes

_NOMINAL_VOLUME_BYTES = 1000**4  # for checking percentages before the volume is known


def user_cache_dir() -> Path:
    """This project's folder under the user's cache directory."""
    return Path(platformdirs.user_cache_dir("omlx-plugins"))


@dataclass(frozen=True, slots=True)
class SSDCacheLocation:
    """Where the SSD tier is, and what it may take there; see `PagedSSDCacheManager`."""

    directory: Path
    max_size_bytes: int
    min_free_bytes: int
    write_budget_bytes: int | None
    read_only: bool


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="OMLX_", frozen=True, extra="forbid")

    # The type checker keeps the signature that it derives from the fields.
    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as exc:
                known = ", ".join(type(self).model_fields)
                problems = "; ".join(
                    f"{'.'.join(map(str, error['loc']))}={error['input']!r}: {error['msg']}" for error in exc.errors()
                )
                raise InvalidSettingError(f"{problems} (settings: {known})") from exc


class CacheSettings(_Settings):
    """How prefixes are cached.

    Attributes:
        block_size: tokens per block. Smaller blocks reuse more of a prefix and cost more bookkeeping.
        initial_cache_blocks: block records allocated at start; the pool grows when they run out.
        hot_cache_max_size: most bytes of KV kept in RAM: bytes, ``"2GB"`` or ``"20%"`` of RAM. None and 0 mean
            no limit.
        paged_ssd_cache_dir: folder of the SSD tier, ``"auto"`` for one under the user's cache directory; None
            turns the tier off.
        paged_ssd_cache_max_size: most bytes in that folder, over all models: bytes, ``"100GB"`` or ``"20%"`` of
            the volume.
        ssd_min_free: while less than this would be free on the volume, nothing is written: bytes, ``"10GB"`` or
            ``"5%"`` of the volume. None means 5 % or 10 GB, whichever is less.
        ssd_write_budget: most bytes written to that folder in 24 hours, over all processes: bytes, ``"50GB"`` or a
            percentage of the volume. None means no limit.
        ssd_read_only: serve what is in that folder and never write to it.
        no_cache: turn both tiers off.

    Raises:
        InvalidSettingError: a value out of range, a size that isn't one, or an unknown setting.
    """

    block_size: int = Field(default=256, ge=1, le=65536)
    initial_cache_blocks: int = Field(default=256, ge=1, le=10_000_000)
    hot_cache_max_size: StrictInt | str | None = None  # strict: True is no size
    paged_ssd_cache_dir: Path | None = None
    paged_ssd_cache_max_size: StrictInt | str = "100GB"
    ssd_min_free: StrictInt | str | None = None
    ssd_write_budget: StrictInt | str | None = None
    ssd_read_only: bool = False
    no_cache: bool = False

    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            super().__init__(**values)
            # Sizes are read once here, so that a bad one fails where it was written.
            _ = self.hot_cache_max_bytes
            if self.ssd_cache_max_bytes(volume_bytes=_NOMINAL_VOLUME_BYTES) == 0:
                raise InvalidSettingError(
                    f"paged_ssd_cache_max_size={self.paged_ssd_cache_max_size!r} leaves no room for a block: give "
                    "it a size, or leave out paged_ssd_cache_dir to turn the SSD tier off"
                )
            _ = self.ssd_min_free_bytes(volume_bytes=_NOMINAL_VOLUME_BYTES)
            if self.ssd_write_budget_bytes(volume_bytes=_NOMINAL_VOLUME_BYTES) == 0:
                raise InvalidSettingError(
                    f"ssd_write_budget={self.ssd_write_budget!r} lets no block be written: give it a size, leave it "
                    "out for no limit, or set ssd_read_only"
                )

    @property
    def hot_cache_max_bytes(self) -> int | None:
        """The hot tier's budget in bytes; None is no limit."""
        if self.hot_cache_max_size is None:
            return None
        size_bytes = parse_size_bytes(
            self.hot_cache_max_size, setting="hot_cache_max_size", percent_of_bytes=total_memory_bytes()
        )
        return size_bytes or None

    def ssd_cache_max_bytes(self, volume_bytes: int) -> int:
        """The SSD tier's budget in bytes on a volume of that size."""
        return parse_size_bytes(
            self.paged_ssd_cache_max_size,
            setting="paged_ssd_cache_max_size",
            percent_of_bytes=volume_bytes,
        )

    def ssd_min_free_bytes(self, volume_bytes: int) -> int:
        """How much the SSD tier leaves free on a volume of that size, in bytes."""
        if self.ssd_min_free is None:
            return min(volume_bytes // 20, 10 * 1000**3)
        return parse_size_bytes(self.ssd_min_free, setting="ssd_min_free", percent_of_bytes=volume_bytes)

    def ssd_write_budget_bytes(self, volume_bytes: int) -> int | None:
        """What the SSD tier may write in 24 hours to a volume of that size, in bytes; None is no limit."""
        if self.ssd_write_budget is None:
            return None
        return parse_size_bytes(self.ssd_write_budget, setting="ssd_write_budget", percent_of_bytes=volume_bytes)

    def prepare_ssd_cache_dir(self) -> SSDCacheLocation | None:
        """Create the SSD tier's folder, unless it is read-only.

        Returns:
            Where it is and what it may take there, or None if the tier is off.

        Raises:
            CacheDirectoryError: the folder can't be created or is a file.
        """
        if self.no_cache or self.paged_ssd_cache_dir is None:
            return None
        path = self.paged_ssd_cache_dir
        path = user_cache_dir() / "kv" if str(path) == "auto" else path.expanduser()
        try:
            if not self.ssd_read_only:
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
            volume_bytes = shutil.disk_usage(path).total if path.exists() else 0
        except OSError as exc:
            raise CacheDirectoryError(
                f"paged_ssd_cache_dir={str(path)!r} can't be created ({exc.strerror or exc}): name a folder that "
                "you may write to, or leave it out to cache in RAM only"
            ) from exc
        return SSDCacheLocation(
            path,
            max_size_bytes=self.ssd_cache_max_bytes(volume_bytes),
            min_free_bytes=self.ssd_min_free_bytes(volume_bytes),
            write_budget_bytes=self.ssd_write_budget_bytes(volume_bytes),
            read_only=self.ssd_read_only,
        )


class EngineSettings(_Settings):
    """How requests are run.

    Attributes:
        prefill_step_size: most prompt tokens between two decode steps of the running batch.
        max_batch_size: most requests that decode together; more wait in line.
        checkpoint_stride_tokens: how far apart, in a long prompt, the state of recurrent layers is kept.
    """

    prefill_step_size: int = Field(default=512, ge=1)
    max_batch_size: int = Field(default=32, ge=1)
    checkpoint_stride_tokens: int = Field(default=4096, ge=1)
