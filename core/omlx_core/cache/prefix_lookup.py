"""What the cache has, looked at without holding any of it: for plans, not for use.

What is found may be gone when a request asks for it; that costs the request time and nothing else. Any thread may look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omlx_core.cache.block_hash import BlockHash
from omlx_core.cache.block_tree import ChildBlock
from omlx_core.cache.paged_cache import PagedCacheManager
from omlx_core.cache.parts import hash_part
from omlx_core.cache.pins import Needs
from omlx_core.cache.ssd_cache import PagedSSDCacheManager


@dataclass(frozen=True, slots=True)
class FoundPrefix:
    """How much of a prompt could be restored now.

    Attributes:
        tokens_hot: prompt tokens whose blocks are in RAM with all that a restore needs of them.
        tokens_cold: those for which something is to be read from SSD.
    """

    tokens_hot: int
    tokens_cold: int

    @property
    def num_tokens(self) -> int:
        """Both together."""
        return self.tokens_hot + self.tokens_cold


class PrefixLookup:
    """Looks into both tiers.

    Args:
        paged: the hot tier.
        ssd: the SSD tier, if it is on.
    """

    def __init__(self, paged: PagedCacheManager, ssd: PagedSSDCacheManager | None) -> None:
        self._paged = paged
        self._ssd = ssd

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._paged.block_size

    def has_block(self, block_hash: BlockHash) -> bool:
        """Whether a tier has a block's rows."""
        return self._paged.tier_of(block_hash) is not None

    def find(
        self,
        token_ids: Sequence[int],
        extra_keys: tuple[str, ...] = (),
        needs: Needs = lambda _: (),
        *,
        max_tokens: int | None = None,
    ) -> FoundPrefix:
        """The longest prefix that `TieredCache.match` would find now; same arguments."""
        limit = len(token_ids) if max_tokens is None else max(max_tokens, 0)
        hashes: list[BlockHash] = []
        is_hot: list[bool] = []
        for block_hash in self._paged.block_hashes(token_ids[:limit], extra_keys):
            tier = self._paged.tier_of(block_hash)
            if tier is None:
                break
            hashes.append(block_hash)
            is_hot.append(tier == "hot")
        num_blocks = len(hashes)
        while num_blocks and not self.can_restore(hashes[:num_blocks], needs):
            num_blocks -= 1
        cold_parts = {
            key.position
            for key in (needs(num_blocks) if num_blocks else ())
            if self._paged.tier_of(hash_part(hashes[key.position], key.part)) != "hot"
        }
        num_hot = sum(hot and position not in cold_parts for position, hot in enumerate(is_hot[:num_blocks]))
        return FoundPrefix(num_hot * self.block_size, (num_blocks - num_hot) * self.block_size)

    def can_restore(self, block_hashes: Sequence[BlockHash], needs: Needs) -> bool:
        """Whether a tier has the parts, besides rows, that a restore of a chain needs, root first."""
        return all(
            self._paged.tier_of(hash_part(block_hashes[key.position], key.part)) is not None
            for key in needs(len(block_hashes))
        )

    def chain(self, token_ids: Sequence[int], extra_keys: tuple[str, ...] = ()) -> list[BlockHash]:
        """The names of a sequence's full blocks, whether or not they are there."""
        return list(self._paged.block_hashes(token_ids, extra_keys))

    def children(self, parent_hash: BlockHash | None, extra_keys: tuple[str, ...], limit: int) -> list[ChildBlock]:
        """The blocks that follow one, or begin a chain: of each tier the latest, `limit` at the most. May read SSD."""
        children = self._paged.children(parent_hash, extra_keys, limit)
        if self._ssd is None:
            return children
        known = {child.block_hash for child in children}
        return [*children, *self._ssd.children(parent_hash, extra_keys, limit, known)]
