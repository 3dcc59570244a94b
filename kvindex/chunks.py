"""LMCache's chunk keys and our block hashes, tied together here and nowhere else. Pure.

LMCache names a chunk of tokens by a chained hash of its own and keeps model, cache salt and rank beside
it. Its tiers tell of chunks without their tokens, so what they hold cannot be turned into an engine's block
hashes; but whoever has a prompt can compute its chunk hashes. So chunks have pools of their own, in which
a block is a chunk, and its block hash stands for everything in the key but the rank.

Source: LMCache 0.5.6 `lmcache/v1/multiprocess/token_hasher.py` (hash), `lmcache/v1/distributed/api.py`
(`ObjectKey`), `lmcache/v1/distributed/l2_adapters/fs_l2_adapter.py` and `s3_l2_adapter.py` (names).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

import msgspec
import xxhash
from blake3 import blake3

from kvindex.blocks import BlockHash, Pool, Tokens

CHUNK_SCHEME = "lmcache-blake3/1"
"""Names the rules of this module, as `blocks.SCHEME` does those of blocks."""

CHUNK_HASH_BYTES = 32

_FIRST_PARENT = blake3((0).to_bytes(8, "big") + (0).to_bytes(4, "big")).digest()
_FILE_ENDING = ".data"
_SLASH_IN_FILE = "-SEP-"


class ChunkKey(msgspec.Struct, frozen=True, kw_only=True):
    """The name of one object: one rank's KV of one chunk."""

    chunk_hash: bytes
    model: str
    kv_rank: int
    """World size, rank, local world size and local rank, one byte each."""
    group_idx: int
    """KV cache group, of a server that keeps them apart."""
    salt: str

    @property
    def world_size(self) -> int:
        """Tensor and pipeline parallel ranks of the engine; each has an object of its own."""
        return self.kv_rank >> 24

    @property
    def rank(self) -> int:
        """Which of them this is of."""
        return self.kv_rank >> 16 & 0xFF

    @property
    def block(self) -> BlockHash:
        """What stands for the chunk in its pool, whatever the rank."""
        return _fold(self.chunk_hash, self.salt, self.world_size)


def chunk_pool(model: str, chunk_size: int) -> Pool:
    """Return the pool of a model's chunks.

    Args:
        model: as LMCache knows it, which is the engine's model and not its served name. A leading slash is
            lost in object stores, and so here.
        chunk_size: tokens per chunk.
    """
    return Pool(model.lstrip("/"), chunk_size, CHUNK_SCHEME)


def chunk_salt(lora_name: str | None, cache_salt: str | None) -> str:
    """Return the salt that an engine gives LMCache, which has no field for the LoRA name.

    One digest of both, so that neither can be made to look like the other, the salt of a tenant is in no
    file name, and LMCache's limits (128 characters, none of @ / \\ NUL) are kept.
    """
    if not lora_name and not cache_salt:
        return ""
    return blake3(msgspec.msgpack.encode((lora_name or None, cache_salt or None))).hexdigest(length=16)


def hash_chunks(tokens: Tokens, chunk_size: int) -> list[bytes]:
    """Return LMCache's hashes of the complete chunks of a prompt.

    Args:
        tokens: from the beginning of the prompt, each below 2**32.
    """
    words = array("I", tokens)
    if sys.byteorder == "little":
        words.byteswap()
    packed = words.tobytes()
    stride = chunk_size * words.itemsize
    hashes = []
    parent = _FIRST_PARENT
    for end in range(stride, len(packed) + 1, stride):
        parent = blake3(parent + packed[end - stride : end]).digest()
        hashes.append(parent)
    return hashes


def chunk_blocks(hashes: Sequence[bytes], salt: str, world_size: int) -> list[BlockHash]:
    """Return what stands for the chunks of a prompt in their pool.

    Args:
        hashes: of `hash_chunks`.
        salt: of `chunk_salt`.
        world_size: ranks of the engine that would load them: chunks of another number of ranks are others.
    """
    return [_fold(chunk_hash, salt, world_size) for chunk_hash in hashes]


def _fold(chunk_hash: bytes, salt: str, world_size: int) -> BlockHash:
    return BlockHash(xxhash.xxh3_64_intdigest(chunk_hash + msgspec.msgpack.encode((salt, world_size))))


def read_key(chunk_hash_hex: str, model: str, kv_rank: int, group_idx: int, salt: str) -> ChunkKey:
    """Return the key of an object.

    Raises:
        ValueError: no chunk has such a key.
    """
    chunk_hash = bytes.fromhex(chunk_hash_hex)
    key = ChunkKey(chunk_hash=chunk_hash, model=model, kv_rank=kv_rank, group_idx=group_idx, salt=salt)
    if len(chunk_hash) != CHUNK_HASH_BYTES or not 0 <= key.rank < key.world_size <= 0xFF or group_idx < 0:
        raise ValueError(f"not the key of a chunk: {chunk_hash_hex} rank {kv_rank:#x} group {group_idx}")
    return key


def write_key(key: ChunkKey) -> dict[str, str | int]:
    """Return the form of a key that LMCache's HTTP API takes, which `read_key` reads."""
    return {
        "chunk_hash_hex": key.chunk_hash.hex(),
        "model_name": key.model,
        "kv_rank": key.kv_rank,
        "object_group_id": key.group_idx,
        "cache_salt": key.salt,
    }


def read_file_name(name: str) -> ChunkKey:
    """Return the key of a file that LMCache's `fs` adapter wrote.

    Raises:
        ValueError: it did not write such a file.
    """
    stem, ending = name[: -len(_FILE_ENDING)], name[-len(_FILE_ENDING) :]
    parts = stem.split("@")
    if ending != _FILE_ENDING or len(parts) not in (4, 5):
        raise ValueError(f"not a chunk's file: {name!r}")
    model, kv_rank, group_idx, chunk_hash_hex, salt = [*parts, ""][:5]
    return read_key(
        chunk_hash_hex, model.replace(_SLASH_IN_FILE, "/"), int(kv_rank, 16), int(group_idx, 16), salt
    )
