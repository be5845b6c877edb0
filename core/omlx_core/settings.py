"""Settings: arguments first, then ``OMLX_*`` environment variables, then defaults."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from pydantic import Field, StrictInt, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from omlx_core.errors import CacheDirectoryError, InvalidSettingError
from omlx_core.sizes import parse_size_bytes, total_memory_bytes


def user_cache_dir() -> Path:
    """This project's folder under the user's cache directory."""
    return Path(platformdirs.user_cache_dir("omlx-plugins"))


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
        no_cache: turn both tiers off.

    Raises:
        InvalidSettingError: a value out of range, a size that isn't one, or an unknown setting.
    """

    block_size: int = Field(default=256, ge=1, le=65536)
    initial_cache_blocks: int = Field(default=256, ge=1, le=10_000_000)
    hot_cache_max_size: StrictInt | str | None = None  # strict: True is no size
    paged_ssd_cache_dir: Path | None = None
    paged_ssd_cache_max_size: StrictInt | str = "100GB"
    no_cache: bool = False

    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            super().__init__(**values)
            # Sizes are read once here, so that a bad one fails where it was written.
            _ = self.hot_cache_max_bytes
            if self.ssd_cache_max_bytes(volume_bytes=100) == 0:
                raise InvalidSettingError(
                    f"paged_ssd_cache_max_size={self.paged_ssd_cache_max_size!r} leaves no room for a block: give "
                    "it a size, or leave out paged_ssd_cache_dir to turn the SSD tier off"
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

    def prepare_ssd_cache_dir(self) -> tuple[Path, int] | None:
        """Create the SSD tier's folder.

        Returns:
            The folder and its budget in bytes, or None if the tier is off.

        Raises:
            CacheDirectoryError: the folder can't be created or is a file.
        """
        if self.no_cache or self.paged_ssd_cache_dir is None:
            return None
        path = self.paged_ssd_cache_dir
        path = user_cache_dir() / "kv" if str(path) == "auto" else path.expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            volume_bytes = shutil.disk_usage(path).total
        except OSError as exc:
            raise CacheDirectoryError(
                f"paged_ssd_cache_dir={str(path)!r} can't be created ({exc.strerror or exc}): name a folder that "
                "you may write to, or leave it out to cache in RAM only"
            ) from exc
        return path, self.ssd_cache_max_bytes(volume_bytes)


class EngineSettings(_Settings):
    """How requests are run.

    Attributes:
        prefill_step_size: most prompt tokens between two decode steps of the running batch.
        max_batch_size: most requests that decode together; more wait in line.
    """

    prefill_step_size: int = Field(default=512, ge=1)
    max_batch_size: int = Field(default=32, ge=1)
