"""The hot tier against a model of it, in any order of operations.

The model says the same with lists and sets, keyed by the tokens themselves instead of by hashes and links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from omlx_core.cache.block_hash import BlockHash, hash_namespace, iter_block_hashes
from omlx_core.cache.block_pool import CacheBlock
from omlx_core.cache.block_table import BlockTable
from omlx_core.cache.paged_cache import PagedCacheManager
from omlx_core.cache.parts import CHECKPOINT, PARTS, ROWS, Part, PartKey, hash_part
from omlx_core.cache.payload import BlockPayload, BlockTensor
from omlx_core.errors import BlockPoolExhaustedError

NAMESPACE = hash_namespace({"model": "tiny"})

Identity = tuple[tuple[str, ...], tuple[int, ...], Part]
"""The extra keys, all tokens up to the end of the block, and what of the block it is."""


class ModelExhaustedError(Exception):
    """The model's pool is exhausted."""


@dataclass(eq=False)
class ModelBlock:
    ref_count: int = 1
    num_tokens: int = 0
    identity: Identity | None = None
    is_hot: bool = False

    @property
    def is_checkpoint(self) -> bool:
        return self.identity is not None and self.identity[2] == CHECKPOINT


@dataclass(eq=False)
class ModelTable:
    extra_keys: tuple[str, ...]
    token_ids: list[int] = field(default_factory=list)
    blocks: list[ModelBlock] = field(default_factory=list)
    num_committed: int = 0
    parts: dict[PartKey, ModelBlock] = field(default_factory=dict)


def content_of(identity: Identity) -> bytes:
    """Bytes that no other identity has, of one of three sizes."""
    _, token_ids, part = identity
    smallest = 200 if part == CHECKPOINT else 100
    return repr(identity).encode().ljust(smallest + 20 * (sum(token_ids) % 3), b".")


class Model:
    def __init__(
        self,
        block_size: int,
        num_blocks: int,
        hot_max_bytes: int | None,
        max_checkpoint_bytes: int | None,
        max_blocks: int | None,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks if max_blocks is None else min(num_blocks, max_blocks)
        self.hot_max_bytes = hot_max_bytes
        self.max_checkpoint_bytes = max_checkpoint_bytes
        self.max_blocks = max_blocks
        self.cold: set[Identity] = set()
        self.used: list[ModelBlock] = []  # held or cached
        self.cached: list[ModelBlock] = []  # least recently used first
        self.evictions = self.promotions = self.cow_copies = 0

    def find(self, identity: Identity) -> ModelBlock | None:
        return next((block for block in self.used if block.identity == identity), None)

    def hot_bytes(self, blocks: Sequence[ModelBlock] | None = None) -> int:
        blocks = self.used if blocks is None else blocks
        return sum(len(content_of(block.identity)) for block in blocks if block.is_hot and block.identity)

    def allocate(self) -> ModelBlock:
        if len(self.used) == self.num_blocks:
            doubled = 2 * self.num_blocks
            self.num_blocks = doubled if self.max_blocks is None else min(doubled, self.max_blocks)
        if len(self.used) == self.num_blocks:
            if not self.cached:
                raise ModelExhaustedError
            self.evict()
        self.used.append(block := ModelBlock())
        return block

    def evict(self, block: ModelBlock | None = None) -> None:
        block = self.cached[0] if block is None else block
        self.cached.remove(block)
        self.used.remove(block)
        self.evictions += 1

    def checkpoints(self) -> list[ModelBlock]:
        return [block for block in self.used if block.is_checkpoint]

    def make_room(self, identity: Identity) -> bool:
        size_bytes = len(content_of(identity))
        if self.hot_max_bytes is None or self.max_checkpoint_bytes is None:
            return True
        held = [block for block in self.used if block.ref_count]
        if self.hot_bytes(held) + size_bytes > self.hot_max_bytes:
            return False
        if identity[2] == CHECKPOINT:
            held = [block for block in held if block.is_checkpoint]
            if self.hot_bytes(held) + size_bytes > self.max_checkpoint_bytes:
                return False
            while self.hot_bytes(self.checkpoints()) + size_bytes > self.max_checkpoint_bytes:
                self.evict(next(block for block in self.cached if block.is_checkpoint))
        while self.hot_bytes() + size_bytes > self.hot_max_bytes:
            self.evict()
        return True

    def acquire(self, block: ModelBlock) -> None:
        if block in self.cached:
            self.cached.remove(block)
        block.ref_count += 1

    def release(self, block: ModelBlock) -> None:
        block.ref_count -= 1
        if block.ref_count == 0 and block.is_hot:
            self.cached.append(block)
        elif block.ref_count == 0:
            self.used.remove(block)

    def identities(self, extra_keys: tuple[str, ...], token_ids: Sequence[int]) -> list[Identity]:
        ends = range(self.block_size, len(token_ids) + 1, self.block_size)
        return [(extra_keys, tuple(token_ids[:end]), ROWS) for end in ends]

    def match(self, extra_keys: tuple[str, ...], token_ids: Sequence[int]) -> ModelTable:
        table = ModelTable(extra_keys)
        for identity in self.identities(extra_keys, token_ids):
            block = self.find(identity)
            if block is not None:
                self.acquire(block)
            elif identity in self.cold:
                try:
                    block = self.allocate()
                except ModelExhaustedError:
                    break
                block.num_tokens, block.identity = self.block_size, identity
            else:
                break
            table.blocks.append(block)
        table.num_committed = len(table.blocks)
        table.token_ids = list(token_ids[: table.num_committed * self.block_size])
        return table

    def append(self, table: ModelTable, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            filled = len(table.token_ids) % self.block_size
            if not filled:
                table.blocks.append(self.allocate())
            elif table.blocks[-1].ref_count > 1:
                table.blocks[-1] = self.copy_on_write(table.blocks[-1])
            table.token_ids.append(token_id)
            table.blocks[-1].num_tokens = filled + 1

    def copy_on_write(self, block: ModelBlock) -> ModelBlock:
        copy = self.allocate()
        copy.num_tokens = block.num_tokens
        self.release(block)
        self.cow_copies += 1
        return copy

    def next_identity(self, table: ModelTable) -> Identity | None:
        remaining = self.identities(table.extra_keys, table.token_ids)[table.num_committed :]
        return remaining[0] if remaining else None

    def publish(self, table: ModelTable, identity: Identity) -> ModelBlock:
        block, published = table.blocks[table.num_committed], self.find(identity)
        if published is not None:
            self.acquire(published)
            self.release(block)
            block = published
        elif block.ref_count > 1:
            block = self.copy_on_write(block)
        block.identity = identity
        table.blocks[table.num_committed] = block
        table.num_committed += 1
        return block

    def share(self, table: ModelTable, identity: Identity) -> bool:
        published = self.find(identity)
        if published is None or not published.is_hot:
            return False
        self.publish(table, identity)
        return True

    def commit(self, table: ModelTable, identity: Identity, *, in_cold_tier: bool) -> bool:
        published = self.find(identity)
        is_hot = published is not None and published.is_hot
        if not is_hot and not in_cold_tier and not self.make_room(identity):
            return False
        try:
            block = self.publish(table, identity)
        except ModelExhaustedError:
            return False
        block.is_hot = block.is_hot or self.make_room(identity)
        return True

    def part_of(self, table: ModelTable, key: PartKey) -> Identity:
        extra_keys, token_ids, _ = self.identities(table.extra_keys, table.token_ids)[key.position]
        return extra_keys, token_ids, key.part

    def acquire_part(self, table: ModelTable, key: PartKey) -> bool:
        identity = self.part_of(table, key)
        block = self.find(identity)
        if block is not None:
            self.acquire(block)
        elif identity in self.cold:
            try:
                block = self.allocate()
            except ModelExhaustedError:
                return False
            block.num_tokens, block.identity = self.block_size, identity
        else:
            return False
        table.parts[key] = block
        return True

    def commit_part(self, table: ModelTable, key: PartKey, *, in_cold_tier: bool) -> bool:
        identity = self.part_of(table, key)
        block = self.find(identity)
        is_hot = block is not None and block.is_hot
        if not is_hot and not in_cold_tier and not self.make_room(identity):
            return False
        if block is None:
            try:
                block = self.allocate()
            except ModelExhaustedError:
                return False
            block.identity = identity
        elif key not in table.parts:
            self.acquire(block)
        table.parts[key] = block
        block.is_hot = block.is_hot or self.make_room(identity)
        return True

    def promote(self, block: ModelBlock) -> None:
        if block.identity is not None and not block.is_hot and self.make_room(block.identity):
            block.is_hot = True
            self.promotions += 1

    def truncate(self, table: ModelTable, num_blocks: int) -> None:
        for position in range(len(table.blocks) - 1, num_blocks - 1, -1):
            for key in sorted((key for key in table.parts if key.position == position), reverse=True):
                self.release(table.parts.pop(key))
            self.release(table.blocks[position])
        del table.blocks[num_blocks:]
        del table.token_ids[num_blocks * self.block_size :]
        table.num_committed = min(table.num_committed, num_blocks)

    def fork(self, table: ModelTable) -> ModelTable:
        for block in (*table.blocks, *table.parts.values()):
            block.ref_count += 1
        return ModelTable(table.extra_keys, [*table.token_ids], [*table.blocks], table.num_committed, dict(table.parts))


@dataclass(eq=False)
class Request:
    """The same table on both sides."""

    real: BlockTable
    model: ModelTable


# Two stems, cut anywhere, with a short tail: most prompts share a prefix with some other.
prompts = st.builds(
    lambda stem, num_tokens, tail: [*stem[:num_tokens], *tail],
    st.sampled_from([[0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]),
    st.sampled_from([8, 7, 6, 4, 2, 0]),
    st.lists(st.integers(0, 1), max_size=2),
)
salts = st.sampled_from([(), (), (), ("salt:a",)])
mostly = st.sampled_from([True, True, False])
positions = st.lists(st.integers(0, 3), unique=True, max_size=3)


class PagedCacheMachine(RuleBasedStateMachine):
    requests: Bundle[Request] = Bundle("requests")

    @initialize(
        block_size=st.integers(1, 3),
        initial_blocks=st.integers(1, 4),
        hot_max_bytes=st.sampled_from([None, 420, 1400, 700, 1000, 290, 110]),
        max_blocks=st.sampled_from([None, None, 16, 8, 3]),
        checkpoint_share=st.sampled_from([0.5, 0.35, 0.7, 1.0]),
        has_cold_tier=mostly,
        stored_by_an_earlier_process=st.lists(prompts, max_size=3),
    )
    def open(
        self,
        block_size: int,
        initial_blocks: int,
        hot_max_bytes: int | None,
        max_blocks: int | None,
        checkpoint_share: float,
        has_cold_tier: bool,
        stored_by_an_earlier_process: list[list[int]],
    ) -> None:
        max_checkpoint_bytes = None if hot_max_bytes is None else int(hot_max_bytes * checkpoint_share)
        self.model = Model(block_size, initial_blocks, hot_max_bytes, max_checkpoint_bytes, max_blocks)
        if has_cold_tier:
            for token_ids in stored_by_an_earlier_process:
                identities = self.model.identities((), token_ids)
                self.model.cold.update(identities)
                self.model.cold.update((extra_keys, tokens, CHECKPOINT) for extra_keys, tokens, _ in identities[-1:])
        self.has_cold_tier = has_cold_tier
        self.manager = PagedCacheManager(
            NAMESPACE,
            block_size=block_size,
            initial_blocks=initial_blocks,
            hot_max_bytes=hot_max_bytes,
            max_blocks=max_blocks,
            checkpoint_share=checkpoint_share,
            cold=self if has_cold_tier else None,
        )
        self.live: list[Request] = []

    def has_block(self, block_hash: BlockHash) -> bool:
        return block_hash in {self.hash_of(identity) for identity in self.model.cold}

    def hash_of(self, identity: Identity) -> BlockHash:
        extra_keys, token_ids, part = identity
        *_, last = iter_block_hashes(NAMESPACE, token_ids, self.model.block_size, extra_keys)
        return last if part == ROWS else hash_part(last, part)

    def payload_of(self, identity: Identity) -> BlockPayload:
        content = content_of(identity)
        return BlockPayload({"kv": BlockTensor("U8", (len(content),), memoryview(content))})

    def begin(self, token_ids: list[int], extra_keys: tuple[str, ...], leaves_one: bool) -> Request:
        limit = len(token_ids) - leaves_one
        reusable = token_ids[: max(limit, 0)]
        present = 0
        for identity in self.model.identities(extra_keys, reusable):
            if self.model.find(identity) is None and identity not in self.model.cold:
                break
            present += 1
        request = Request(
            self.manager.get_computed_blocks(token_ids, extra_keys, max_tokens=limit),
            self.model.match(extra_keys, reusable),
        )
        if self.model.max_blocks is None:
            assert len(request.real.blocks) == present
        self.live.append(request)
        return request

    def run(
        self,
        token_ids: list[int],
        extra_keys: tuple[str, ...],
        promotes: bool,
        checkpoints: list[int],
        is_accepted_by_cold_tier: bool,
    ) -> Request:
        """A request up to its end."""
        request = self.begin(token_ids, extra_keys, leaves_one=True)
        self.acquire_part(request, request.model.num_committed - 1, CHECKPOINT, promotes)
        if promotes:
            self.promote(request)
        self.append(request, token_ids[len(request.model.token_ids) :])
        self.commit(request, is_accepted_by_cold_tier, shares=True)
        for position in checkpoints:
            self.keep_part(request, position, CHECKPOINT, is_accepted_by_cold_tier)
        return request

    @rule(
        target=requests,
        token_ids=prompts,
        extra_keys=salts,
        promotes=mostly,
        checkpoints=positions,
        is_accepted_by_cold_tier=mostly,
    )
    def serve(
        self,
        token_ids: list[int],
        extra_keys: tuple[str, ...],
        promotes: bool,
        checkpoints: list[int],
        is_accepted_by_cold_tier: bool,
    ) -> Request:
        return self.run(token_ids, extra_keys, promotes, checkpoints, is_accepted_by_cold_tier)

    @rule(
        token_ids=prompts,
        extra_keys=salts,
        promotes=mostly,
        checkpoints=positions,
        is_accepted_by_cold_tier=mostly,
    )
    def serve_to_the_end(
        self,
        token_ids: list[int],
        extra_keys: tuple[str, ...],
        promotes: bool,
        checkpoints: list[int],
        is_accepted_by_cold_tier: bool,
    ) -> None:
        self.free(self.run(token_ids, extra_keys, promotes, checkpoints, is_accepted_by_cold_tier), times=1)

    @rule(target=requests, token_ids=prompts, extra_keys=salts, leaves_one=st.booleans())
    def match(self, token_ids: list[int], extra_keys: tuple[str, ...], leaves_one: bool) -> Request:
        return self.begin(token_ids, extra_keys, leaves_one)

    @rule(request=requests, token_ids=prompts)
    def append(self, request: Request, token_ids: list[int]) -> None:
        try:
            self.model.append(request.model, token_ids)
        except ModelExhaustedError:
            with pytest.raises(BlockPoolExhaustedError):
                self.manager.append_tokens(request.real, token_ids)
        else:
            self.manager.append_tokens(request.real, token_ids)

    @rule(request=requests, is_accepted_by_cold_tier=mostly, shares=st.booleans())
    def commit(self, request: Request, is_accepted_by_cold_tier: bool, shares: bool) -> None:
        while True:
            full, identity = self.manager.next_full_block(request.real), self.model.next_identity(request.model)
            assert (full is None) == (identity is None)
            if full is None or identity is None:
                return
            assert (full.block_hash, full.position) == (self.hash_of(identity), request.model.num_committed)
            if shares:
                is_shared = self.model.share(request.model, identity)
                assert self.manager.share_block(request.real, full) == is_shared
                if is_shared:
                    continue
            in_cold_tier = self.has_cold_tier and is_accepted_by_cold_tier
            if in_cold_tier:
                self.model.cold.add(identity)
            is_published = self.model.commit(request.model, identity, in_cold_tier=in_cold_tier)
            payload = self.payload_of(identity)
            assert self.manager.commit_block(request.real, full, payload, in_cold_tier=in_cold_tier) == is_published
            if not is_published:
                return

    @rule(request=requests)
    def promote(self, request: Request) -> None:
        pairs = list(zip(request.real.blocks, request.model.blocks, strict=True))
        pairs += [(request.real.parts[key], model) for key, model in request.model.parts.items()]
        for real, model in pairs:
            if model.identity is not None:
                self.manager.promote(real, self.payload_of(model.identity))
                self.model.promote(model)

    @rule(request=requests, position=st.integers(0, 3), part=st.sampled_from(PARTS), is_accepted_by_cold_tier=mostly)
    def keep_part(self, request: Request, position: int, part: Part, is_accepted_by_cold_tier: bool) -> None:
        if position < request.model.num_committed:
            self.commit_part(request, PartKey(position, part), is_accepted_by_cold_tier)

    def commit_part(self, request: Request, key: PartKey, is_accepted_by_cold_tier: bool) -> None:
        in_cold_tier = self.has_cold_tier and is_accepted_by_cold_tier
        identity = self.model.part_of(request.model, key)
        if in_cold_tier:
            self.model.cold.add(identity)
        is_published = self.model.commit_part(request.model, key, in_cold_tier=in_cold_tier)
        payload = self.payload_of(identity)
        assert self.manager.commit_part(request.real, key, payload, in_cold_tier=in_cold_tier) == is_published

    @rule(request=requests, position=st.integers(0, 3), part=st.sampled_from(PARTS), promotes=mostly)
    def acquire_part(self, request: Request, position: int, part: Part, promotes: bool) -> None:
        key = PartKey(position, part)
        if not 0 <= position < request.model.num_committed or key in request.model.parts:
            return
        is_found = self.model.acquire_part(request.model, key)
        assert self.manager.acquire_parts(request.real, [key]) == is_found
        if promotes:
            self.promote(request)

    @rule(target=requests, request=requests, token_ids=prompts, original_writes=st.booleans())
    def fork(self, request: Request, token_ids: list[int], original_writes: bool) -> Request:
        fork = Request(self.manager.fork_block_table(request.real), self.model.fork(request.model))
        self.live.append(fork)
        self.append(request if original_writes else fork, token_ids)
        return fork

    @rule(request=requests, num_blocks=st.integers(0, 4))
    def truncate(self, request: Request, num_blocks: int) -> None:
        self.manager.truncate(request.real, num_blocks)
        self.model.truncate(request.model, num_blocks)

    @rule(request=consumes(requests), times=st.integers(1, 2))
    def free(self, request: Request, times: int) -> None:
        for _ in range(times):
            self.manager.free_block_table(request.real)
        self.model.truncate(request.model, 0)
        self.live.remove(request)

    @precondition(lambda self: len(self.model.cold) > 4)
    @rule(data=st.data())
    def evict_from_cold_tier(self, data: st.DataObject) -> None:
        self.model.cold.remove(data.draw(st.sampled_from(sorted(self.model.cold))))

    @invariant()
    def tables_are_equal(self) -> None:
        pairs: dict[CacheBlock, ModelBlock] = {}
        for request in self.live:
            assert request.real.token_ids == request.model.token_ids
            assert request.real.num_committed == request.model.num_committed
            for real, model in zip(request.real.blocks, request.model.blocks, strict=True):
                assert pairs.setdefault(real, model) is model
            assert request.real.parts.keys() == request.model.parts.keys()
            for key, real in request.real.parts.items():
                assert pairs.setdefault(real, request.model.parts[key]) is request.model.parts[key]
            assert [block.block_hash is not None for block in request.real.blocks] == [
                position < request.model.num_committed for position in range(len(request.real.blocks))
            ]
        assert len(set(pairs.values())) == len(pairs)
        for real, model in pairs.items():
            assert (real.ref_count, real.num_tokens) == (model.ref_count, model.num_tokens)
            self.blocks_are_equal(real, model)

    @invariant()
    def eviction_order_is_equal_with_leaves_before_their_parents(self) -> None:
        cached = list(self.manager._pool.eviction_order())
        for real, model in zip(cached, self.model.cached, strict=True):
            self.blocks_are_equal(real, model)
        hashes = [block.block_hash for block in cached]
        for position, block in enumerate(self.model.cached):
            assert block.identity is not None
            extra_keys, token_ids, part = block.identity
            parent = (extra_keys, token_ids[: -self.model.block_size] if part == ROWS else token_ids, ROWS)
            if parent[1] and not self.has_cold_tier:
                assert self.model.find(parent) is not None
            assert not parent[1] or self.hash_of(parent) not in hashes[:position]

    @invariant()
    def sizes_are_equal_and_within_the_budget(self) -> None:
        self.manager.check()
        stats, model = self.manager.stats(), self.model
        assert (stats.num_blocks, stats.blocks_cached) == (model.num_blocks, len(model.cached))
        assert stats.blocks_in_use == len(model.used) - len(model.cached)
        assert (stats.hot_bytes, stats.hot_blocks) == (model.hot_bytes(), sum(block.is_hot for block in model.used))
        assert (stats.evictions, stats.promotions) == (model.evictions, model.promotions)
        assert stats.cow_copies == model.cow_copies
        assert stats.checkpoint_bytes == model.hot_bytes(model.checkpoints())
        assert model.max_checkpoint_bytes is None or stats.checkpoint_bytes <= model.max_checkpoint_bytes
        assert model.hot_max_bytes is None or stats.hot_bytes <= model.hot_max_bytes
        assert model.max_blocks is None or stats.num_blocks <= model.max_blocks

    def blocks_are_equal(self, real: CacheBlock, model: ModelBlock) -> None:
        assert real.block_hash == (model.identity and self.hash_of(model.identity))
        assert (real.payload is not None) == model.is_hot
        if real.payload is not None and model.identity is not None:
            assert real.payload.tensors["kv"].data == content_of(model.identity)

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for request in self.live:
            self.manager.free_block_table(request.real)
        assert self.manager.stats().blocks_in_use == 0
        assert all(block.ref_count == 0 for block in self.manager._pool._blocks)
        self.manager.check()


PagedCacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPagedCacheAgainstItsModel = PagedCacheMachine.TestCase
