"""Chains of receipts: what is kept of a prompt, and how two are compared."""

from __future__ import annotations

import random

import pytest

from gateway.chains import Chain, common_blocks, common_contents, make_chain
from kvindex.blocks import Pool, hash_blocks, root_hash, unpack_hashes

POOL = Pool("tiny", 16)


def chain(tokens, max_hashes: int = 8, **identity) -> Chain:
    hashes = hash_blocks(root_hash("tiny", **identity), tokens, 16)
    plain = hash_blocks(root_hash("tiny"), tokens, 16)
    salt = identity.get("cache_salt")
    return make_chain(POOL, hashes, plain, salt, max_hashes=max_hashes, overlap_stride=1)


def prompt(num_blocks: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(50_000) for _ in range(16 * num_blocks)]


@pytest.mark.parametrize(("num_blocks", "stride"), [(0, 1), (8, 1), (9, 2), (16, 2), (17, 4), (100, 16)])
def test_a_chain_keeps_a_bounded_number_of_hashes_at_a_power_of_two(num_blocks, stride):
    kept = chain(prompt(num_blocks))
    hashes = hash_blocks(root_hash("tiny"), prompt(num_blocks), 16)
    assert (kept.stride, kept.num_blocks) == (stride, num_blocks)
    assert unpack_hashes(kept.hashes) == hashes[stride - 1 :: stride]
    assert len(kept.hashes) <= 8 * 8
    for depth in range(stride, num_blocks + 1, stride):
        assert kept.block(depth) == hashes[depth - 1]
    assert kept.depth_at_least(num_blocks + 1) is None


@pytest.mark.parametrize("shared", [0, 1, 5, 8, 9, 31, 64])
@pytest.mark.parametrize(("left", "right"), [(64, 64), (64, 9), (8, 64), (64, 100)])
def test_what_two_prompts_share_is_bracketed(shared, left, right):
    shared = min(shared, left, right)
    common = prompt(shared, seed=1)
    ours = chain(common + prompt(left - shared, seed=2))
    theirs = chain(common + prompt(right - shared, seed=3))
    for found in (common_blocks(ours, theirs), common_blocks(theirs, ours), common_contents(ours, theirs)):
        stride = max(ours.stride, theirs.stride)
        assert shared - stride < found.num_blocks <= shared
        if found.differs_within_blocks is None:
            assert min(left, right) - shared < stride
        else:
            assert found.num_blocks < found.differs_within_blocks == found.num_blocks + stride
            assert found.differs_within_blocks > shared


@pytest.mark.parametrize(
    "other", [{"lora_name": "sql"}, {"cache_salt": "s"}, {"lora_name": "a", "cache_salt": "b"}]
)
def test_equal_tokens_of_another_identity_are_equal_in_content_alone(other):
    ours, theirs = chain(prompt(20)), chain(prompt(20), **other)
    assert common_blocks(ours, theirs).num_blocks == 0
    assert common_contents(ours, theirs).num_blocks == 20
    assert (ours.salt_mark == theirs.salt_mark) == ("cache_salt" not in other)


def test_neither_text_nor_tokens_nor_salt_are_kept():
    kept = repr(chain([7] * 160, cache_salt="tenant-secret"))
    assert "tenant-secret" not in kept
    assert "7, 7" not in kept
