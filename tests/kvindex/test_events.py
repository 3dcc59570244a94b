import contextlib
import time
import tracemalloc
from collections.abc import Callable
from functools import reduce
from operator import xor
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindex.block_state import BlockState
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


def follow(payload: bytes) -> None:
    """Decode and follow as a publisher does."""
    with contextlib.suppress(MalformedEvent):
        state = BlockState("m", 2)
        for event in decode_batch(payload):
            match event:
                case BlockStored():
                    state.store(event)
                case BlockRemoved():
                    state.remove(event)
        assert state.num_blocks <= len(payload)
        assert state.digest == reduce(xor, state.hashes, 0)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=9)
    | st.builds(msgspec.msgpack.Ext, st.integers(-128, 127), st.binary(max_size=12)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
HASHES = st.integers(0, 5) | st.sampled_from([b"x" * 32, 2**64 - 1])


@st.composite
def events(draw: st.DrawFn) -> object:
    """An event that is right but for up to two fields."""
    num_blocks = draw(st.integers(0, 3))
    several = st.lists(HASHES, min_size=num_blocks, max_size=num_blocks)
    event = draw(st.sampled_from([STORED, REMOVED, CLEARED])) | {"block_hashes": draw(several)}
    if event["type"] == "BlockStored":
        keys = draw(st.none() | st.lists(VALUES, min_size=num_blocks, max_size=num_blocks))
        event |= {"token_ids": [1] * (2 * num_blocks), "extra_keys": keys}
        event |= {"parent_block_hash": draw(st.none() | HASHES)}
    for name in draw(st.lists(st.sampled_from([*STORED, "kv_cache_spec_kind", "new"]), max_size=2)):
        event[name] = draw(VALUES)
    return draw(st.sampled_from([as_map, as_array]))(event)


@given(st.lists(VALUES | events(), max_size=6), st.lists(VALUES, max_size=2))
def test_whatever_an_engine_says_is_followed_or_refused_by_name(said: list[object], tail: list[object]):
    follow(batch(*said, tail=tuple(tail)))


@given(VALUES)
def test_any_value_is_followed_or_refused_by_name(value: object):
    follow(msgspec.msgpack.encode(value))


@pytest.mark.parametrize("depth", [20, 300, *range(880, 1_010, 3), 100_000])
def test_nesting_is_followed_or_refused_by_name(depth: int):
    keys = b"\x91" * depth + b"\xc0"
    for field in ("extra_keys", "new"):
        payload = batch(STORED | {"block_hashes": [1], "token_ids": [1, 2], field: [["here"]]})
        follow(payload.replace(b"\xa4here", keys))


@pytest.mark.parametrize("header", [b"\xdd", b"\xdf", b"\xc6", b"\xdb"])
def test_a_length_that_is_not_there_takes_no_memory(header: bytes):
    """Lists, maps, bytes and texts of 4 billion items, announced and not sent."""
    for field in ("block_hashes", "token_ids", "extra_keys", "new"):
        payload = batch(STORED | {field: "here"}).replace(b"\xa4here", header + b"\xff" * 4)
        tracemalloc.start()
        with pytest.raises(MalformedEvent):
            decode_batch(payload)
        _, most_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most_bytes < 1_000_000


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
