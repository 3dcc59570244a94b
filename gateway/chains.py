"""What a receipt keeps of a prompt: hashes of its blocks and their count, never text or token ids. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvindex.blocks import (
    HASH_BYTES,
    BlockHash,
    Pool,
    pack_hashes,
    root_hash,
    unpack_hashes,
)


class Chain(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A prompt's chained block hashes at even strides, in one pool.

    The stride is a power of two, so that of two chains the coarser one's depths are all in the finer.
    """

    pool: Pool
    num_blocks: int
    """Full blocks of the prompt."""
    stride: int
    hashes: bytes
    """Packed hashes of every `stride`-th block, as the index knows them."""
    contents: bytes
    """The same without LoRA name and salt: equal tokens are equal here. It stays in this process: with it,
    guesses of salted content could be tested. Empty where nobody compares them."""
    salt_mark: BlockHash
    """Tells two salts apart; stays in this process, too."""
    overlap_stride: int = 1
    """How exact the overlaps of this decision are, in blocks."""

    def block(self, depth_blocks: int) -> BlockHash:
        """Return the hash of the block that ends a prefix of `depth_blocks`, a multiple of the stride."""
        return unpack_hashes(_word(self.hashes, depth_blocks // self.stride - 1))[0]

    def depth_at_least(self, depth_blocks: int) -> int | None:
        """Return the first kept depth from `depth_blocks` on, None if the chain ends before."""
        depth = -(-depth_blocks // self.stride) * self.stride
        return depth if depth <= self.num_blocks else None


class Common(msgspec.Struct, frozen=True):
    """How far two chains are equal."""

    num_blocks: int
    """Leading blocks that are equal for certain."""
    differs_within_blocks: int | None
    """The prefix of this many blocks is not equal any more; None if one chain ends before a difference."""


def make_chain(
    pool: Pool,
    hashes: Sequence[BlockHash],
    plain: Sequence[BlockHash],
    cache_salt: str | None,
    *,
    max_hashes: int,
    overlap_stride: int,
) -> Chain:
    """Return what is kept of a prompt.

    Args:
        hashes: of every full block.
        plain: of the same blocks, without LoRA name and salt.
        cache_salt: of the request.
        max_hashes: most hashes to keep.
    """
    stride = 1
    while len(hashes) > stride * max_hashes:
        stride *= 2
    return Chain(
        pool=pool,
        num_blocks=len(hashes),
        stride=stride,
        hashes=pack_hashes(hashes[stride - 1 :: stride]),
        contents=pack_hashes(plain[stride - 1 :: stride]),
        salt_mark=root_hash("", cache_salt=cache_salt),
        overlap_stride=overlap_stride,
    )


def common_blocks(left: Chain, right: Chain) -> Common:
    """Return how far the index sees both as one."""
    return _common(left, right, left.hashes, right.hashes)


def common_contents(left: Chain, right: Chain) -> Common:
    """Return how far both are made of the same tokens, whatever their LoRA and salt."""
    return _common(left, right, left.contents, right.contents)


def _common(left: Chain, right: Chain, left_hashes: bytes, right_hashes: bytes) -> Common:
    stride = max(left.stride, right.stride)
    num_compared = min(left.num_blocks, right.num_blocks) // stride
    # Hashes are chained: once different, they stay so.
    equal, different = 0, num_compared + 1
    while different - equal > 1:
        middle = (equal + different) // 2
        depth = middle * stride
        if _word(left_hashes, depth // left.stride - 1) == _word(right_hashes, depth // right.stride - 1):
            equal = middle
        else:
            different = middle
    return Common(equal * stride, different * stride if different <= num_compared else None)


def _word(packed: bytes, index: int) -> bytes:
    return packed[index * HASH_BYTES : (index + 1) * HASH_BYTES]
