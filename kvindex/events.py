"""KV cache events of a vLLM engine, decoded.

Source: vLLM 0.32 and 0.24 `vllm/distributed/kv_events.py` (fields) and `vllm/v1/core/block_pool.py`
(meaning). Both send maps keyed by `type`; older engines sent positional arrays, read here as well.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from kvindex.blocks import ExtraKeys
from kvindex.errors import MalformedEvent

EngineHash = int | bytes
"""An engine's own name for a block. It means nothing outside the process that made it."""


TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class BlockStored(msgspec.Struct, frozen=True, tag=True):
    """Consecutive blocks became reusable; one event for every physical copy.

    A request that asks vLLM for `kv_cache_report_mode` "full" also has the blocks reported that it reuses,
    which nothing tells from new copies: see `BlockState`.
    """

    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None
    token_ids: list[TokenId]
    block_size: Annotated[int, msgspec.Meta(gt=0)]
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, tag=True):
    """One physical copy of each block was evicted."""

    block_hashes: list[EngineHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """The engine's prefix cache was reset."""


EngineEvent = BlockStored | BlockRemoved | AllBlocksCleared


class _Batch(msgspec.Struct, array_like=True):
    timestamp_s: float
    events: list[EngineEvent]


class _UntypedBatch(msgspec.Struct, array_like=True):
    timestamp_s: float
    events: list[dict[str, Any] | list[Any]]


_MAPS = msgspec.msgpack.Decoder(_Batch)
_ANY = msgspec.msgpack.Decoder(_UntypedBatch)
_FIELDS: dict[str, tuple[str, ...]] = {
    event.__name__: ("type", *event.__struct_fields__)
    for event in (BlockStored, BlockRemoved, AllBlocksCleared)
}


def decode_batch(payload: bytes) -> list[EngineEvent]:
    """Return the events of one message, in order.

    Raises:
        MalformedEvent: not an event batch, or one of a shape that no known engine sends.
    """
    try:
        return _MAPS.decode(payload).events
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # positional arrays, or not an event batch at all
    try:
        named = [_by_name(event) for event in _ANY.decode(payload).events]
        return msgspec.convert(named, list[EngineEvent], builtin_types=(bytes,))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError) as error:
        raise MalformedEvent(f"cannot read a KV event batch of {len(payload)} bytes: {error}") from error


def _by_name(event: dict[str, Any] | list[Any]) -> dict[str, Any]:
    """Return a positional event as a map; fields newer than we know are dropped, as in a map."""
    return event if isinstance(event, dict) else dict(zip(_FIELDS[event[0]], event, strict=False))


def split_extra_keys(event: BlockStored) -> tuple[str | None, list[ExtraKeys | None] | None]:
    """Return the cache salt and, for each block, the keys that are neither LoRA name nor salt.

    The engine puts the LoRA name first in every block's keys, and the salt, a bare string, into a
    sequence's first block only. What stays: multimodal `(identifier, offset)` pairs and digests of
    prompt embeddings.
    """
    if not event.extra_keys:
        return None, None
    salt: str | None = None
    per_block: list[ExtraKeys | None] = []
    for index, keys in enumerate(event.extra_keys):
        rest: list[Any] = []
        for position, key in enumerate(keys or ()):
            if position == 0 and event.lora_name and key == event.lora_name:
                continue
            if isinstance(key, str) and index == 0 and event.parent_block_hash is None:
                salt = key
            else:
                rest.append(key)
        per_block.append(rest or None)
    return salt, per_block if any(per_block) else None
