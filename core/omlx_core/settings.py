"""Settings: arguments first, then ``OMLX_*`` environment variables, then defaults."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import platformdirs
from pydantic import BeforeValidator, Field, StrictInt, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from omlx_core.errors import CacheDirectoryError, InvalidSettingError
from omlx_core.sizes import parse_size_bytes, total_memory_bytes

_NOMINAL_VOLUME_BYTES = 1000**4  # for checking percentages before the volume is known
# A literal number is not read from text, which is what an environment variable holds.
_FromEnvironment = BeforeValidator(lambda value: int(value) if isinstance(value, str) and value.isdecimal() else value)


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
        checkpoint_share: the largest part of each tier's size that checkpoints of recurrent layers may take, in
            (0, 1]; rows and windows may take all of it.
        pin_share: the largest part of ``hot_cache_max_size`` that pinned prefixes may take, in (0, 1].
        paged_ssd_cache_dir: folder of the SSD tier, ``"auto"`` for one under the user's cache directory; None
            turns the tier off.
        paged_ssd_cache_max_size: most bytes in that folder, over all models: bytes, ``"100GB"`` or ``"20%"`` of
            the volume.
        ssd_min_free: while less than this would be free on the volume, nothing is written: bytes, ``"10GB"`` or
            ``"5%"`` of the volume. None means 5 % or 10 GB, whichever is less.
        ssd_write_budget: most bytes written to that folder in 24 hours, over all processes: bytes, ``"50GB"`` or a
            percentage of the volume. None means no limit.
        ssd_read_only: serve what is in that folder and never write to it.
        cold_kv_bits: 8 keeps keys and values on SSD in eight bits, half or a quarter of the bytes. Inexact: what is
            restored from there isn't what was computed. Never shared with exact blocks. None keeps them as they are.
        no_cache: turn both tiers off.

    Raises:
        InvalidSettingError: a value out of range, a size that isn't one, or an unknown setting.
    """

    block_size: int = Field(default=256, ge=1, le=65536)
    initial_cache_blocks: int = Field(default=256, ge=1, le=10_000_000)
    hot_cache_max_size: StrictInt | str | None = None  # strict: True is no size
    checkpoint_share: float = Field(default=0.5, gt=0, le=1)
    pin_share: float = Field(default=0.5, gt=0, le=1)
    paged_ssd_cache_dir: Path | None = None
    paged_ssd_cache_max_size: StrictInt | str = "100GB"
    ssd_min_free: StrictInt | str | None = None
    ssd_write_budget: StrictInt | str | None = None
    ssd_read_only: bool = False
    cold_kv_bits: Annotated[Literal[8] | None, _FromEnvironment] = None
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

    @property
    def max_pinned_bytes(self) -> int | None:
        """What pinned prefixes may take of the hot tier, in bytes; None is no limit."""
        max_bytes = self.hot_cache_max_bytes
        return None if max_bytes is None else int(max_bytes * self.pin_share)

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


class PoolSettings(_Settings):
    """How many models stay in memory.

    Attributes:
        max_model_memory: most bytes that models take, each with what its cache holds in RAM: bytes, ``"20GB"`` or
            ``"60%"`` of the memory that MLX uses. None and 0 mean no limit.
        model_idle_timeout_s: seconds without use after which a model is unloaded. None and 0 mean never.

    Raises:
        InvalidSettingError: a negative time, a size that isn't one, or an unknown setting.
    """

    max_model_memory: StrictInt | str | None = None  # strict: True is no size
    model_idle_timeout_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            super().__init__(**values)
            _ = self.max_model_memory_bytes(_NOMINAL_VOLUME_BYTES)  # a bad one fails where it was written

    def max_model_memory_bytes(self, device_memory_bytes: int) -> int | None:
        """What models may take, in bytes, of a memory of that size; None is no limit."""
        if self.max_model_memory is None:
            return None
        size_bytes = parse_size_bytes(
            self.max_model_memory, setting="max_model_memory", percent_of_bytes=device_memory_bytes
        )
        return size_bytes or None


class EngineSettings(_Settings):
    """How requests are run.

    Attributes:
        prefill_step_size: most prompt tokens between two decode steps of the running batch. On a GPU, while nothing is
            being answered, 2,048 at least.
        max_batch_size: most requests that decode together; more wait in line.
        max_waiting_requests: most that may wait; one more is refused.
        num_draft_tokens: how many tokens a draft model proposes at a time.
        checkpoint_stride_tokens: how far apart, in a long prompt, the state of recurrent layers is kept.
        max_stride_checkpoints: most checkpoints that a prompt keeps at that stride; in a longer one they are wider
            apart.
        kv_bits: quantize keys and values to that many bits per element; None keeps them as the model computes them.
        kv_group_size: elements that share a scale then.
        quantized_kv_start: length of a sequence in tokens from which on it is quantized, rounded up to whole blocks.
        max_kv_size: most tokens that a layer remembers; older ones, but the first four, are forgotten. For models
            that don't choose their own caches; None is no limit.
        reuse_inexact_answers: reuse what was computed token by token also where a layer rounds that otherwise than
            a prompt: sliding windows once they are full, and latent attention. None does so on GPUs, where every
            step rounds by its size; on CPUs such answers are read again with the next turn, so that reuse changes
            no bit.
        token_faithful_history: a chat or a text that goes on from an earlier sequence keeps the token ids that were
            generated, as long as that sequence is remembered. False tokenizes every prompt anew, which often gives
            other ids for the same text, and reuses less.

    Raises:
        InvalidSettingError: a value out of range, two that exclude each other, or an unknown setting.
    """

    prefill_step_size: int = Field(default=512, ge=1)
    max_batch_size: int = Field(default=32, ge=1)
    max_waiting_requests: int = Field(default=1024, ge=1)
    num_draft_tokens: int = Field(default=3, ge=1, le=64)
    checkpoint_stride_tokens: int = Field(default=4096, ge=1)
    max_stride_checkpoints: int = Field(default=32, ge=1)
    kv_bits: Annotated[Literal[2, 3, 4, 5, 6, 8] | None, _FromEnvironment] = None
    kv_group_size: Annotated[Literal[32, 64, 128], _FromEnvironment] = 64
    quantized_kv_start: int = Field(default=0, ge=0)
    max_kv_size: int | None = Field(default=None, ge=16)
    reuse_inexact_answers: bool | None = None
    token_faithful_history: bool = True

    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            super().__init__(**values)
            if self.kv_bits is not None and self.max_kv_size is not None:
                raise InvalidSettingError(
                    f"kv_bits={self.kv_bits} and max_kv_size={self.max_kv_size} exclude each other: mlx-lm can't "
                    "quantize a cache that forgets; give one of them"
                )
