"""KV goes from any cache to any other as if it were copied number by number."""

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from connectors.geometry import (
    Geometry,
    Layout,
    Wire,
    block_span,
    mismatch,
    num_receivers,
    plan_chunks,
    sources,
)
from connectors.kv_cache import KVCache
from kvindex.errors import ConfigError

NUM_BLOCKS = 24
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint8": torch.uint8,
    "float32": torch.float32,
}


def shape(geometry: Geometry) -> tuple[int, ...]:
    """What vLLM allocates for a layer."""
    lengths = {
        "B": NUM_BLOCKS,
        "K": 2,
        "T": geometry.block_size,
        "H": len(geometry.heads),
        "D": geometry.head_size,
    }
    if geometry.layout is Layout.PACKED:
        return (*(lengths[axis] for axis in "BHT"), 2 * geometry.head_size)
    if geometry.layout in (Layout.NHD_PAIRS, Layout.HND_PAIRS):
        return (*(lengths[axis] for axis in geometry.layout[:3]), 2 * geometry.head_size)
    return tuple(lengths[axis] for axis in geometry.layout)


class Rank:
    """A cache with random numbers in it, and a naive way to read one of them."""

    def __init__(self, geometry: Geometry, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.geometry = geometry
        self.layers = [
            torch.randint(0, 200, shape(geometry), generator=generator).to(DTYPES[geometry.dtype])
            for _ in range(geometry.num_layers)
        ]
        self.cache = KVCache(self.layers, geometry)

    def vector(self, layer: int, kind: int, token: int, head: int, block_ids: list[int]) -> torch.Tensor:
        """Return (D,) of one head of the model at a position of the prompt."""
        geometry = self.geometry
        block, slot = block_ids[token // geometry.block_size], token % geometry.block_size
        tensor, head = self.layers[layer], head - geometry.heads.start
        match geometry.layout:
            case Layout.NHD:
                return tensor[kind, block, slot, head]
            case Layout.HND:
                return tensor[kind, block, head, slot]
            case Layout.BLOCKS_NHD:
                return tensor[block, kind, slot, head]
            case Layout.BLOCKS_HND:
                return tensor[block, kind, head, slot]
            case Layout.PACKED:  # the kernel's secret; any order will do
                return tensor[block, head].view(2, geometry.block_size, -1)[kind, slot]
            case Layout.NHD_PAIRS:
                return tensor[block, slot, head].view(2, -1)[kind]
            case Layout.HND_PAIRS:
                return tensor[block, head, slot].view(2, -1)[kind]
            case Layout.MLA:
                return tensor[block, slot]

    def vectors(self, tokens: range, block_ids: list[int]) -> dict[tuple[int, ...], list[float]]:
        geometry = self.geometry
        return {
            (layer, kind, token, head): self.vector(layer, kind, token, head, block_ids).tolist()
            for layer in range(geometry.num_layers)
            for kind in range(geometry.num_kinds)
            for token in tokens
            for head in geometry.heads
        }


HEAD_LAYOUTS = [layout for layout in Layout if layout not in (Layout.MLA, Layout.PACKED)]


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, Geometry]:
    """Two caches of one model, rank 0 of each."""
    kind = draw(st.sampled_from([Layout.MLA, Layout.PACKED, None]))
    is_mla = kind is Layout.MLA
    layouts = st.just(kind) if kind else st.sampled_from(HEAD_LAYOUTS)
    block_sizes = st.sampled_from([1, 2, 3, 4, 8])
    if kind is Layout.PACKED:
        block_sizes = st.just(draw(block_sizes))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    model = {
        "num_layers": draw(st.integers(1, 3)),
        "num_heads": 1 if is_mla else draw(st.sampled_from([1, 2, 4])),
        "head_size": draw(st.sampled_from([2, 6])),
        "dtype": dtype,
        "itemsize": DTYPES[dtype].itemsize,
    }
    first, second = (
        Geometry(
            layout=draw(layouts),
            block_size=draw(block_sizes),
            tp_size=draw(st.sampled_from([1, 2, 4])),
            **model,
        )
        for _ in range(2)
    )
    return first, second


def ranks(geometry: Geometry, seed: int) -> list[Rank]:
    return [
        Rank(
            msgspec.structs.replace(geometry, tp_rank=rank),
            seed + (0 if geometry.layout is Layout.MLA else rank),
        )
        for rank in range(geometry.tp_size)
    ]


@given(geometries(), st.data())
def test_what_arrives_is_what_was_sent_and_nothing_else_changes(
    both: tuple[Geometry, Geometry], data: st.DataObject
):
    here, there = both
    stop = data.draw(st.integers(1, NUM_BLOCKS * min(here.block_size, there.block_size)), "stop")
    tokens = range(data.draw(st.integers(0, stop - 1), "start"), stop)
    ids = st.permutations(range(NUM_BLOCKS))
    sent_ids, received_ids = data.draw(ids, "sender's blocks"), data.draw(ids, "receiver's blocks")
    senders = ranks(here, seed=1)
    for rank in range(here.tp_size):  # ranks that share a head have the same numbers
        for other in range(rank):
            if senders[other].geometry.heads == senders[rank].geometry.heads:
                senders[rank] = Rank(senders[rank].geometry, seed=1 + other)
                break

    for receiver in ranks(there, seed=100):
        before = [layer.clone() for layer in receiver.layers]
        expected = receiver.vectors(range(NUM_BLOCKS * there.block_size), received_ids)
        for source in sources(receiver.geometry, here.tp_size):
            if not source.num_heads:
                continue
            sender = senders[source.tp_rank]
            wire = Wire.between(sender.geometry, receiver.geometry, source)
            sent = tokens
            if wire.is_blocks:
                sent = range(tokens.start - tokens.start % here.block_size, tokens.stop)
            max_bytes = data.draw(st.integers(1, 4), "blocks per chunk") * here.block_bytes
            for chunk in plan_chunks(sender.geometry, wire, sent, max_bytes):
                num_bytes = wire.chunk_bytes(sender.geometry, chunk)
                assert num_bytes == wire.chunk_bytes(receiver.geometry, chunk)
                assert num_bytes <= max_bytes
                buffer = torch.zeros(num_bytes, dtype=torch.uint8)
                sender.cache.gather(chunk, sent_ids, wire, buffer)
                receiver.cache.scatter(chunk, received_ids, wire, buffer)
            # Blocks as they lie are copied whole, the slots too that hold no token yet.
            if wire.is_blocks:
                span = block_span(sent, here.block_size)
                sent = range(span.start * here.block_size, span.stop * here.block_size)
            wanted = range(source.first_head, source.first_head + source.num_heads)
            expected |= {
                key: vector for key, vector in sender.vectors(sent, sent_ids).items() if key[3] in wanted
            }
        assert receiver.vectors(range(NUM_BLOCKS * there.block_size), received_ids) == expected
        assert len(before) == there.num_layers


@given(geometries())
def test_every_head_has_one_source_and_every_rank_is_heard(both: tuple[Geometry, Geometry]):
    here, there = both
    heard = [0] * here.tp_size
    for rank in range(there.tp_size):
        receiver = msgspec.structs.replace(there, tp_rank=rank)
        heads = []
        for source in sources(receiver, here.tp_size):
            heard[source.tp_rank] += 1
            heads += range(source.first_head, source.first_head + source.num_heads)
            sender = msgspec.structs.replace(here, tp_rank=source.tp_rank)
            assert set(heads) <= set(receiver.heads)
            assert not source.num_heads or source.first_head in sender.heads
        assert heads == list(receiver.heads)
    assert heard == [
        num_receivers(msgspec.structs.replace(here, tp_rank=rank), there.tp_size)
        for rank in range(here.tp_size)
    ]
    assert min(heard) >= 1


LLAMA = Geometry(
    layout=Layout.NHD, num_layers=4, block_size=16, num_heads=8, head_size=64, dtype="bfloat16", itemsize=2
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_layers": 5}, "num_layers is 4 here and 5 there"),
        ({"dtype": "float8_e4m3fn", "itemsize": 1}, "dtype is bfloat16 here and float8_e4m3fn there"),
        ({"head_size": 128}, "head_size is 64 here and 128 there"),
        ({"layout": Layout.MLA}, "the cache is NHD here and MLA there"),
        ({"layout": Layout.PACKED}, "the cache is NHD here and PACKED there"),
        ({"layout": Layout.PACKED, "block_size": 32}, "block_size is 16 here and 32 there"),
    ],
)
def test_what_cannot_be_converted_has_a_reason(change: dict[str, object], reason: str):
    assert mismatch(LLAMA, msgspec.structs.replace(LLAMA, **change)) == reason


def test_other_layouts_block_sizes_and_ranks_can_be_converted():
    other = msgspec.structs.replace(LLAMA, layout=Layout.HND_PAIRS, block_size=128, tp_size=4, tp_rank=3)
    assert mismatch(LLAMA, other) is None
    (source,) = sources(other, 1)
    assert Wire.between(LLAMA, other, source) == Wire(False, first_head=6, num_heads=2)
    assert Wire.between(LLAMA, LLAMA, sources(LLAMA, 1)[0]).is_blocks


def test_packed_blocks_are_exchanged_between_equal_kernels_only():
    packed = msgspec.structs.replace(LLAMA, layout=Layout.PACKED, packing="amx")
    assert mismatch(packed, msgspec.structs.replace(packed, tp_size=2)) is None
    assert mismatch(packed, msgspec.structs.replace(packed, packing="vec")) == (
        "packing is amx here and vec there"
    )


def test_bad_shapes_are_refused():
    with pytest.raises(ConfigError, match="6 KV heads cannot be divided among 4"):
        msgspec.structs.replace(LLAMA, num_heads=6, tp_size=4).check()
    with pytest.raises(ConfigError, match=r"is not NHD with blocks of \(1, 16, 8, 64\)"):
        KVCache([torch.zeros(3, 2, 16, 8, 64)], LLAMA)
    with pytest.raises(ConfigError, match=r"raise kvlane\.chunk_bytes"):
        list(plan_chunks(LLAMA, Wire(True, 0, 8), range(16), 1_000))
