import contextlib
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindex.errors import MalformedEvent
from kvindex.events import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch, split_extra_keys
from tests.support.recordings import VERSIONS, recorded_payloads

STORED: dict[str, Any] = {
    "type": "BlockStored",
    "block_hashes": [1, 2],
    "parent_block_hash": None,
    "token_ids": [10, 11, 12, 13],
    "block_size": 2,
    "lora_id": 7,
    "medium": "GPU",
    "lora_name": "adapter",
    "extra_keys": [["adapter", ["image", -1], "salt", b"digest"], ["adapter"]],
    "group_idx": 0,
}
REMOVED: dict[str, Any] = {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU", "group_idx": 0}
CLEARED = {"type": "AllBlocksCleared"}


def as_map(event: dict[str, Any]) -> object:
    return event


def as_array(event: dict[str, Any]) -> object:
    return list(event.values())


def batch(*events: object, tail: tuple[object, ...] = (0,)) -> bytes:
    return msgspec.msgpack.encode((time.time(), events, *tail))


@pytest.mark.parametrize("encoding", [as_map, as_array])
@pytest.mark.parametrize("tail", [(), (None,), (3,)])
def test_maps_and_positional_arrays_mean_the_same(
    encoding: Callable[[dict[str, Any]], object], tail: tuple[object, ...]
):
    stored, removed, cleared = decode_batch(
        batch(encoding(STORED), encoding(REMOVED), encoding(CLEARED), tail=tail)
    )
    assert stored == BlockStored(
        block_hashes=[1, 2],
        parent_block_hash=None,
        token_ids=[10, 11, 12, 13],
        block_size=2,
        lora_id=7,
        medium="GPU",
        lora_name="adapter",
        extra_keys=[["adapter", ["image", -1], "salt", b"digest"], ["adapter"]],
        group_idx=0,
    )
    assert removed == BlockRemoved(block_hashes=[1], medium="GPU", group_idx=0)
    assert cleared == AllBlocksCleared()


def test_old_arrays_may_be_shorter_and_new_ones_longer():
    short = ["BlockStored", [b"x" * 32], None, [1, 2], 2]
    (stored,) = decode_batch(batch(short))
    assert isinstance(stored, BlockStored)
    assert (stored.block_hashes, stored.medium, stored.extra_keys) == ([b"x" * 32], None, None)
    (stored,) = decode_batch(batch([*STORED.values(), "full_attention", "a field of the future"]))
    assert isinstance(stored, BlockStored)
    assert stored.kv_cache_spec_kind == "full_attention"


def test_unknown_fields_of_newer_engines_are_ignored():
    (stored,) = decode_batch(batch(STORED | {"session_id": "s", "locality": "LOCAL"}))
    assert isinstance(stored, BlockStored)


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_streams_decode(version: str):
    events = [event for payload in recorded_payloads(version) for event in decode_batch(payload)]
    kinds = [type(event) for event in events]
    assert (kinds.count(BlockStored), kinds.count(BlockRemoved), kinds.count(AllBlocksCleared)) == (21, 39, 1)
    assert all(event.kv_cache_spec_kind == "full_attention" for event in events if type(event) is BlockStored)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff",
        msgspec.msgpack.encode("text"),
        batch({"type": "BlockMoved"}),
        batch({"no": "type"}),
        batch([]),
        batch(["BlockMoved", [1]]),
        batch([[1], 2]),
        batch({"type": "BlockStored", "block_hashes": [1]}),
        batch(STORED | {"token_ids": [-1, 0, 0, 0]}),
        batch(STORED | {"token_ids": [1 << 32, 0, 0, 0]}),
        batch(STORED | {"block_size": 0}),
        batch(REMOVED | {"block_hashes": ["text"]}),
    ],
)
def test_malformed_payloads_raise_the_named_error(payload: bytes):
    with pytest.raises(MalformedEvent):
        decode_batch(payload)


@given(st.binary(max_size=200))
def test_random_bytes_decode_or_raise_the_named_error(payload: bytes):
    with contextlib.suppress(MalformedEvent):
        decode_batch(payload)


@given(st.data())
def test_damaged_recordings_decode_or_raise_the_named_error(data: st.DataObject):
    payload = bytearray(data.draw(st.sampled_from(recorded_payloads("0.32.0"))))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MalformedEvent):
        decode_batch(bytes(payload))


def stored(
    extra_keys: list[list[Any] | None] | None, *, lora: str | None = None, parent: int | None = None
) -> BlockStored:
    num_blocks = len(extra_keys or [None])
    return BlockStored(
        block_hashes=list(range(num_blocks)),
        parent_block_hash=parent,
        token_ids=[0] * num_blocks,
        block_size=1,
        lora_name=lora,
        extra_keys=extra_keys,
    )


@pytest.mark.parametrize(
    ("event", "salt", "rest"),
    [
        (stored(None), None, None),
        (stored([None, None]), None, None),
        (stored([["salt"], None]), "salt", None),
        (stored([["lora"], ["lora"]], lora="lora"), None, None),
        (stored([["lora", "lora"], ["lora"]], lora="lora"), "lora", None),
        (stored([["lora", "salt"], ["lora"]], lora="lora"), "salt", None),
        (stored([[["image", 0], "salt"], [["image", -4]]]), "salt", [[["image", 0]], [["image", -4]]]),
        (stored([[b"embeddings"], None]), None, [[b"embeddings"], None]),
        (stored([["not a salt here"]], parent=5), None, [["not a salt here"]]),
    ],
)
def test_lora_name_and_salt_are_taken_out_of_the_extra_keys(
    event: BlockStored, salt: str | None, rest: list[Any] | None
):
    assert split_extra_keys(event) == (salt, rest)
