"""Remembered hashes are those of the whole prompt, whatever came before."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.tokens import hashing
from gateway.tokens.cache import ByteCache
from gateway.tokens.hashing import CHUNK_TOKENS, BlockHasher
from kvindex.blocks import hash_blocks, root_hash

# Prompts that share beginnings, of some chunks each.
PROMPTS = st.lists(st.integers(0, 2), max_size=5).map(
    lambda parts: [100 * part + position % 7 for part in parts for position in range(1_500)]
)
ROOTS = st.builds(
    root_hash,
    st.sampled_from(["a", "b"]),
    lora_name=st.sampled_from([None, "adapter"]),
    cache_salt=st.sampled_from([None, "salt"]),
)


@pytest.fixture(scope="module", params=[1 << 20, 20_000, 0])
def hasher(request):
    return BlockHasher(ByteCache(request.param))


@settings(deadline=None, max_examples=50)
@given(
    tokens=PROMPTS, length=st.integers(0, 7_500), root=ROOTS, block_size=st.sampled_from([1, 16, 48, 4096])
)
def test_hashes_are_those_of_the_whole_prompt(hasher, tokens, length, root, block_size):
    tokens = array("I", tokens[:length])
    assert list(hasher(root, tokens, block_size)) == hash_blocks(root, tokens, block_size)


@pytest.fixture
def hashed(monkeypatch):
    """The number of tokens in each call that really hashes."""
    lengths = []

    def counting(parent, tokens, block_size):
        lengths.append(len(tokens))
        return hash_blocks(parent, tokens, block_size)

    monkeypatch.setattr(hashing, "hash_blocks", counting)
    return lengths


def test_only_the_end_is_hashed_anew(hashed):
    hasher = BlockHasher(ByteCache(1 << 20))
    tokens = array("I", range(100_000))
    hasher(root_hash("m"), tokens, 16)
    assert sum(hashed) == 100_000
    hashed.clear()
    hasher(root_hash("m"), tokens + array("I", range(500)), 16)
    assert sum(hashed) <= CHUNK_TOKENS + 500
    hashed.clear()
    hasher(root_hash("m"), tokens[:50_000], 16)
    assert sum(hashed) <= CHUNK_TOKENS
    hashed.clear()
    hasher(root_hash("m", cache_salt="s"), tokens, 16)
    assert sum(hashed) == 100_000
