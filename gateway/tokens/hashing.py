"""Block hashes of prompts that begin like earlier ones."""

from __future__ import annotations

import secrets
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import cast

import xxhash

from gateway.tokens.cache import ByteCache
from kvindex.blocks import HASH_BYTES, BlockHash, Tokens, hash_blocks

CHUNK_TOKENS = 2_048
"""About this many tokens are remembered together: a prompt's last, incomplete chunk is hashed anew."""


class BlockHasher:
    """`hash_blocks`, for prompts of which only the end is new. Thread-safe.

    A chunk's hashes are remembered under a digest of the root, the block size and all tokens up to the
    chunk's end, which is much faster to compute than the chain of block hashes.

    Args:
        cache: where hashes are remembered.
    """

    def __init__(self, cache: ByteCache) -> None:
        self._cache = cache
        self._seed = secrets.randbits(64)

    def __call__(self, root: BlockHash, tokens: Tokens, block_size: int) -> Sequence[BlockHash]:
        """Return the chained hashes of the full blocks of `tokens`, an array of u64."""
        ids = array("I", tokens)
        chunk_tokens = max(1, CHUNK_TOKENS // block_size) * block_size
        keys = self._keys(root, ids, block_size, chunk_tokens)
        fresh: dict[bytes, bytes] = {}
        chunks: list[bytes] = []
        parent = root
        for number, (key, known) in enumerate(zip(keys, self._cache.get(keys), strict=True)):
            chunk = known
            if chunk is None:
                start = number * chunk_tokens
                chunk = _packed(hash_blocks(parent, ids[start : start + chunk_tokens], block_size))
                fresh[key] = chunk
            chunks.append(chunk)
            parent = BlockHash(int.from_bytes(chunk[-HASH_BYTES:], sys.byteorder))
        if fresh:
            self._cache.put(fresh)
        chunks.append(_packed(hash_blocks(parent, ids[len(keys) * chunk_tokens :], block_size)))
        # Nobody needs thousands of hashes as objects: the index is asked for a few hundred of them.
        return cast(Sequence[BlockHash], array("Q", b"".join(chunks)))

    def _keys(self, root: BlockHash, ids: array[int], block_size: int, chunk_tokens: int) -> list[bytes]:
        packed = memoryview(ids).cast("B")
        stride = chunk_tokens * ids.itemsize
        key = struct.pack("=QQ", root, block_size)
        keys = []
        for end in range(stride, len(packed) + 1, stride):
            key = xxhash.xxh3_128_digest(key + packed[end - stride : end], self._seed)
            keys.append(key)
        return keys


def _packed(hashes: Sequence[BlockHash]) -> bytes:
    return array("Q", hashes).tobytes()
