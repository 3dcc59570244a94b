"""Blocks and their hashes: the vocabulary that workers and gateways share.

Pure: no I/O, no third party but the hash function.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NewType, cast

import msgspec
import xxhash

BlockHash = NewType("BlockHash", int)
"""Unsigned 64-bit chained hash of a full block and everything before it."""

Tokens = Sequence[int]

SCHEME = "xxh3-64/1"
"""Names the rules below. Two hashes are comparable only under the same scheme."""

HASH_BYTES = 8

ExtraKeys = Sequence[object]
"""What distinguishes a block beside its tokens, without LoRA name and salt, which live in the root."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Everything that must be equal for two block hashes to be comparable."""

    model: str
    block_size: int
    scheme: str = SCHEME

    @property
    def pool_id(self) -> str:
        """16 hex digits; the hash tag of every Redis key of this pool."""
        return xxhash.xxh3_64_hexdigest(msgspec.msgpack.encode((self.scheme, self.model, self.block_size)))


@functools.lru_cache(maxsize=1024)
def root_hash(model: str, *, lora_name: str | None = None, cache_salt: str | None = None) -> BlockHash:
    """Return the parent of a sequence's first block.

    The LoRA name and the cache salt enter here, once, so that every block behind them differs.
    An empty name or salt is the same as none, as it is for the engine.
    """
    identity = (SCHEME, model, lora_name or None, cache_salt or None)
    return BlockHash(xxhash.xxh3_64_intdigest(msgspec.msgpack.encode(identity)))


def hash_blocks(
    parent: BlockHash,
    tokens: Tokens,
    block_size: int,
    extra_keys: Sequence[ExtraKeys | None] | None = None,
) -> list[BlockHash]:
    """Return the chained hashes of the full blocks of `tokens`; a partial last block has none.

    Args:
        parent: hash of the block before `tokens`, or `root_hash(...)` at the start of a sequence.
        tokens: token ids, each below 2**32.
        block_size: tokens per block.
        extra_keys: one entry per full block (multimodal identifiers, embedding digests), or None.
    """
    packed = array("I", tokens).tobytes()
    stride = block_size * 4
    num_blocks = len(tokens) // block_size
    digest = xxhash.xxh3_64_intdigest
    hashes: list[int] = []
    current: int = parent
    for index in range(num_blocks):
        content = current.to_bytes(HASH_BYTES, "little") + packed[index * stride : (index + 1) * stride]
        if extra_keys is not None and (extra := extra_keys[index]):
            content += msgspec.msgpack.encode(extra)
        current = digest(content)
        hashes.append(current)
    return cast("list[BlockHash]", hashes)  # naming each would cost a tenth of the whole


def pack_hashes(hashes: Iterable[int]) -> bytes:
    """Return the hashes as consecutive 8-byte little-endian words, the form that Redis holds."""
    words = tuple(hashes)
    return struct.pack(f"<{len(words)}Q", *words)


def unpack_hashes(packed: bytes) -> list[BlockHash]:
    """Read what `pack_hashes` wrote."""
    return [BlockHash(word) for (word,) in struct.iter_unpack("<Q", packed)]


def format_hash(block: int) -> str:
    """Return the 16 hex digits that the command line shows and reads."""
    return f"{block:016x}"


def parse_hash(text: str) -> BlockHash:
    """Read what `format_hash` wrote.

    Raises:
        ValueError: not 1 to 16 hex digits.
    """
    value = int(text.removeprefix("0x"), 16)
    if not 0 <= value < 1 << 64:
        raise ValueError(f"a block hash has at most 16 hex digits, got {text!r}")
    return BlockHash(value)
