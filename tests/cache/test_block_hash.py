from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omlx_core.cache import block_hash
from omlx_core.cache.block_hash import HASH_SIZE_BYTES, NamespaceHash, hash_block, hash_namespace, iter_block_hashes

NAMESPACE = hash_namespace({"model": "tiny", "block_size": 2})
OTHER_NAMESPACE = hash_namespace({"model": "tiny-2", "block_size": 2})

# Two or three values each, so that equal and nearly equal chains are both common.
chains = st.tuples(
    st.sampled_from([NAMESPACE, OTHER_NAMESPACE]),
    st.integers(1, 3),
    st.lists(st.sampled_from([0, 1, 2**32 - 1]), max_size=7),
    st.lists(st.sampled_from(["", "a", "aa", "\0", "é", "\ud800"]), max_size=3),
)


def chain_hashes(chain: tuple[NamespaceHash, int, list[int], list[str]]) -> list[bytes]:
    namespace, block_size, token_ids, extra_keys = chain
    return list(iter_block_hashes(namespace, token_ids, block_size, extra_keys))


def test_block_identity_never_changes_between_versions() -> None:
    # A change here makes every block that users have on disk unreachable: it needs a new format version.
    first, second = iter_block_hashes(NAMESPACE, [1, 2, 70_000, 2**32 - 1], 2, ["salt:é"])
    assert NAMESPACE.hex() == "00de8b49c061cf94bfd04a452878ee9ed5d28519fb81439a60efa982ac4c5617"
    assert first.hex() == "fba54aa781656e94a639f5342b5b902c1f59da5b9f8fdc016cab9b366961422d"
    assert second.hex() == "2fe3935a96f3672abe3120ad45ab1ceff9a99f053b5b5378c3b8cb20cded3d9c"


def test_hash_covers_parent_then_counted_tokens_then_counted_keys() -> None:
    tokens = bytes.fromhex("02000000" + "01000000" + "70110100")
    keys = b"\x07\0\0\0" + "salt:é".encode()
    expected = hashlib.sha256(NAMESPACE + tokens + keys).digest()
    assert hash_block(NAMESPACE, [1, 70_000], ["salt:é"]) == expected
    assert len(expected) == HASH_SIZE_BYTES


def test_same_tokens_after_another_prefix_are_another_block() -> None:
    _, y_after_x = iter_block_hashes(NAMESPACE, [1, 1, 7, 8], 2)
    _, y_after_z = iter_block_hashes(NAMESPACE, [2, 2, 7, 8], 2)
    [y_at_the_root] = iter_block_hashes(NAMESPACE, [7, 8], 2)
    assert len({y_after_x, y_after_z, y_at_the_root}) == 3


@settings(deadline=None)
@given(chains, chains)
@example((NAMESPACE, 1, [0], ["a", ""]), (NAMESPACE, 1, [0], ["", "a"]))
@example((NAMESPACE, 1, [0], ["aa"]), (NAMESPACE, 1, [0], ["a", "a"]))
@example((NAMESPACE, 1, [0], ["?"]), (NAMESPACE, 1, [0], ["\ud800"]))
@example((NAMESPACE, 3, [1, 4, 0x64636261], []), (NAMESPACE, 1, [1], ["abcd"]))
def test_hashes_are_equal_if_and_only_if_everything_up_to_the_block_end_is(
    left: tuple[NamespaceHash, int, list[int], list[str]], right: tuple[NamespaceHash, int, list[int], list[str]]
) -> None:
    def identities(chain: tuple[NamespaceHash, int, list[int], list[str]]) -> list[tuple[object, ...]]:
        namespace, block_size, token_ids, extra_keys = chain
        ends = range(block_size, len(token_ids) + 1, block_size)
        return [(namespace, block_size, tuple(token_ids[:end]), tuple(extra_keys)) for end in ends]

    named = list(zip(identities(left) + identities(right), chain_hashes(left) + chain_hashes(right), strict=True))
    for identity, name in named:
        for other_identity, other_name in named:
            assert (identity == other_identity) == (name == other_name)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_hashes_are_the_same_in_every_process(hash_seed: str) -> None:
    program = """
from omlx_core.cache.block_hash import hash_namespace, iter_block_hashes
namespace = hash_namespace({"model": "tiny", "block_size": 2})
print(*(name.hex() for name in iter_block_hashes(namespace, [1, 2, 3, 4], 2, ["salt:a"])))
"""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert printed == [name.hex() for name in iter_block_hashes(NAMESPACE, [1, 2, 3, 4], 2, ["salt:a"])]


def test_a_partial_block_has_no_hash() -> None:
    assert chain_hashes((NAMESPACE, 4, [], [])) == []
    assert chain_hashes((NAMESPACE, 4, [1, 2, 3], [])) == []
    assert len(chain_hashes((NAMESPACE, 4, list(range(11)), []))) == 2


def test_only_the_blocks_asked_for_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []

    def counting_hash_block(parent: NamespaceHash, token_ids: np.ndarray, extra_keys: object = ()) -> bytes:
        hashed.append(token_ids.tolist())
        return bytes(32)

    monkeypatch.setattr(block_hash, "hash_block", counting_hash_block)
    list(islice(iter_block_hashes(NAMESPACE, [1, 2, 3, 4, 5, 6], 2), 2))
    assert hashed == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "token_ids",
    [
        (1, 2),
        np.array([1, 2], "<i8"),
        np.array([1, 2], ">u4"),
        np.array([9, 1, 2], "<u4")[1:],
        np.array([1, 0, 2])[::2],
    ],
    ids=["tuple", "int64", "big-endian", "view", "strided"],
)
def test_the_container_of_the_tokens_does_not_matter(token_ids: np.ndarray) -> None:
    assert hash_block(NAMESPACE, token_ids) == hash_block(NAMESPACE, [1, 2])


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**63 - 1, 2**64, -(2**64)])
def test_a_token_id_beyond_32_bits_is_refused_instead_of_wrapped(token_id: int) -> None:
    with pytest.raises(OverflowError, match=str(token_id)):
        hash_block(NAMESPACE, [0, token_id])
    with pytest.raises(OverflowError, match=str(token_id)):
        list(iter_block_hashes(NAMESPACE, [0, token_id], 1))


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_an_array_of_wider_integers_is_refused_instead_of_wrapped(token_id: int) -> None:
    with pytest.raises(OverflowError, match=str(token_id)):
        hash_block(NAMESPACE, np.array([0, token_id], "<i8"))


@pytest.mark.parametrize("token_ids", [[0.5, 1.0], ["1"], [None], np.array([True])])
def test_what_is_not_an_integer_is_refused_instead_of_rounded(token_ids: list[int]) -> None:
    with pytest.raises(TypeError):
        hash_block(NAMESPACE, token_ids)


def test_a_namespace_depends_on_its_facts_and_not_on_their_order() -> None:
    facts = {"model": "tiny", "layers": [{"kind": "sliced", "heads": 2}]}
    reordered = {"layers": [{"heads": 2, "kind": "sliced"}], "model": "tiny"}
    changed = {"model": "tiny", "layers": [{"kind": "sliced", "heads": 3}]}
    assert hash_namespace(facts) == hash_namespace(reordered)
    assert hash_namespace(facts) != hash_namespace(changed)
    assert len(hash_namespace(facts)) == HASH_SIZE_BYTES
