"""Blocks go from one rank to another while they are computed, and nothing is left behind when they cannot."""

import asyncio
import itertools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from connectors.bench.ports import free_ports
from connectors.config import TransferConfig
from connectors.geometry import Geometry, Layout
from connectors.kv_cache import KVCache
from connectors.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Hello,
    Ready,
    Refused,
    Subscribe,
    Welcome,
    decode,
    encode,
)
from connectors.mover import KVMover
from connectors.params import TransferParams, new_transfer_id
from kvindex.errors import ConfigError
from kvindex.tls import PeerTls
from tests.support.certificates import Authority
from tests.support.waiting import eventually

PATIENCE_S = 60.0
MODEL = "tiny"
NUM_BLOCKS = 40
CHUNK_BYTES = 16_384
GEOMETRY = Geometry(
    layout=Layout.NHD, num_layers=3, block_size=8, num_heads=4, head_size=16, dtype="float32", itemsize=4
)


class Rank:
    """A mover with a cache of random numbers."""

    def __init__(self, geometry: Geometry, port: int, seed: int, **settings: Any) -> None:
        heads = len(geometry.heads)
        generator = torch.Generator().manual_seed(seed)
        shape = (2, NUM_BLOCKS, geometry.block_size, heads, geometry.head_size)
        self.layers = [torch.rand(shape, generator=generator) for _ in range(geometry.num_layers)]
        self.base_port = port
        self.port = port + geometry.tp_rank
        self.geometry = geometry
        settings = {"transport": "ucx", "chunk_bytes": CHUNK_BYTES, "staging_chunks": 2, **settings}
        config = TransferConfig(
            transfer_port=port, transfer_host="127.0.0.1", staging_poison=True, **settings
        )
        self.mover = KVMover(MODEL, KVCache(self.layers, geometry), config)
        self.ended_sends: list[str] = []
        self.ended_receives: dict[str, set[int]] = {}

    def poll(self) -> None:
        sends, receives = self.mover.take_ended()
        self.ended_sends += sends
        self.ended_receives |= receives

    def receive(self, name: str, sender: "Rank", transfer_id: str, blocks: list[int], tokens: range) -> None:
        params = TransferParams(
            transfer_id, "receive", f"127.0.0.1:{sender.base_port}", sender.geometry.tp_size
        )
        self.mover.receive(name, params, blocks, tokens)

    async def sent(self, name: str) -> None:
        await eventually(lambda: self.poll() or name in self.ended_sends, PATIENCE_S)

    async def received(self, name: str) -> set[int]:
        await eventually(lambda: self.poll() or name in self.ended_receives, PATIENCE_S)
        return self.ended_receives[name]

    def rows(self, blocks: list[int], tokens: range) -> torch.Tensor:
        """Return (layer, K, token, head, D)."""
        picked = torch.stack([layer[:, blocks].flatten(1, 2) for layer in self.layers])
        return picked[:, :, tokens.start : tokens.stop]

    async def is_clean(self) -> bool:
        """Whether nothing is under way and every buffer is free."""

        async def look() -> bool:
            return all(
                part.num_live == 0 and part.ring.num_free == part.ring.num_buffers
                for part in (self.mover._sender, self.mover._receiver)
            )

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(look(), self.mover._loop))


Start = Callable[..., Rank]


@pytest.fixture
def start() -> Iterator[Start]:
    seeds = itertools.count()
    with ExitStack() as stack:

        def start_rank(geometry: Geometry = GEOMETRY, port: int | None = None, **settings: Any) -> Rank:
            rank = Rank(geometry, port or free_ports(1)[0], next(seeds), **settings)
            rank.mover.start()
            stack.callback(rank.mover.stop)
            return rank

        yield start_rank


def engine(start: Start, tp_size: int, **settings: Any) -> list[Rank]:
    """Start the ranks of one engine, on adjacent ports."""
    while True:
        (base,) = free_ports(1)
        try:
            return [
                start(msgspec.structs.replace(GEOMETRY, tp_rank=rank, tp_size=tp_size), base, **settings)
                for rank in range(tp_size)
            ]
        except ConfigError:
            continue


SENT, RECEIVED = [7, 3, 11, 30, 1, 22], [5, 6, 20, 0, 39, 13]


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 48, 41])
async def test_every_token_arrives(start: Start, num_tokens: int):
    sender, receiver = start(), start()
    before = [layer.clone() for layer in receiver.layers]
    transfer_id = new_transfer_id()
    sender.mover.open_send("p", transfer_id, num_tokens)
    receiver.receive("d", sender, transfer_id, RECEIVED, range(num_tokens))
    sender.mover.computed(transfer_id, SENT, num_tokens, None)
    assert await receiver.received("d") == set()
    await sender.sent("p")
    tokens = range(num_tokens)
    assert torch.equal(receiver.rows(RECEIVED, tokens), sender.rows(SENT, tokens))
    (moved,) = receiver.mover.take_moved()
    num_blocks = -(-num_tokens // GEOMETRY.block_size)
    assert moved.num_bytes == num_blocks * GEOMETRY.block_bytes * GEOMETRY.num_layers
    assert moved.seconds > 0
    untouched = [block for block in range(NUM_BLOCKS) if block not in RECEIVED]
    for layer, old in zip(receiver.layers, before, strict=True):
        assert torch.equal(layer[:, untouched], old[:, untouched])
    await eventually(sender.is_clean)
    await eventually(receiver.is_clean)


async def test_chunks_leave_as_soon_as_they_are_computed_and_known_blocks_are_not_sent(start: Start):
    sender, receiver = start(), start()
    known = receiver.rows(RECEIVED, range(8)).clone()
    transfer_id = new_transfer_id()
    receiver.receive("d", sender, transfer_id, RECEIVED, range(8, 45))  # before there is such a request
    sender.mover.open_send("p", transfer_id, 45)
    sender.mover.computed(transfer_id, SENT[:4], 28, None)
    first = range(8, 24)
    await eventually(
        lambda: torch.equal(receiver.rows(RECEIVED, first), sender.rows(SENT, first)), PATIENCE_S
    )
    sender.poll()
    receiver.poll()
    assert not sender.ended_sends
    assert not receiver.ended_receives
    sender.mover.computed(transfer_id, SENT, 45, None)
    assert await receiver.received("d") == set()
    assert torch.equal(receiver.rows(RECEIVED, range(8, 45)), sender.rows(SENT, range(8, 45)))
    assert torch.equal(receiver.rows(RECEIVED, range(8)), known)


async def test_a_few_tokens_wait_for_the_next_ones(start: Start):
    sender, receiver = start(chunk_bytes=1 << 20), start(chunk_bytes=1 << 20)
    transfer_id = new_transfer_id()
    receiver.receive("d", sender, transfer_id, RECEIVED, range(45))
    sender.mover.open_send("p", transfer_id, 45)
    sender.mover.computed(transfer_id, SENT[:3], 20, None)

    async def num_offered() -> int | None:
        """Buffers that left, once the sender knows both its receiver and the tokens."""
        part = sender.mover._sender
        outgoing = part._live[transfer_id]
        if not outgoing.receivers or not outgoing.num_ready_tokens:
            return None
        for _ in range(10):
            await asyncio.sleep(0)
        return part.ring.num_buffers - part.ring.num_free

    async def none_was_offered() -> bool:
        asked = asyncio.run_coroutine_threadsafe(num_offered(), sender.mover._loop)
        return await asyncio.wrap_future(asked) == 0

    await eventually(none_was_offered, PATIENCE_S)
    sender.mover.computed(transfer_id, SENT, 45, None)
    assert await receiver.received("d") == set()
    assert torch.equal(receiver.rows(RECEIVED, range(45)), sender.rows(SENT, range(45)))


async def test_a_slow_prefill_sends_a_few_tokens_before_its_receiver_gives_up(start: Start):
    sender, receiver = start(chunk_bytes=1 << 20, chunk_timeout_s=2), start(chunk_bytes=1 << 20)
    transfer_id = new_transfer_id()
    receiver.receive("d", sender, transfer_id, RECEIVED, range(45))
    sender.mover.open_send("p", transfer_id, 45)
    sender.mover.computed(transfer_id, SENT[:3], 20, None)
    first = range(16)
    await eventually(
        lambda: torch.equal(receiver.rows(RECEIVED, first), sender.rows(SENT, first)), PATIENCE_S
    )
    sender.mover.computed(transfer_id, SENT, 45, None)
    assert await receiver.received("d") == set()


@pytest.mark.parametrize(("sender_tp", "receiver_tp"), [(1, 2), (2, 1), (2, 4), (4, 2)])
async def test_heads_find_their_ranks(start: Start, sender_tp: int, receiver_tp: int):
    senders, receivers = engine(start, sender_tp), engine(start, receiver_tp)
    transfer_id = new_transfer_id()
    tokens = range(8, 43)
    for receiver in receivers:
        receiver.receive("d", senders[0], transfer_id, RECEIVED, tokens)
    for sender in senders:
        sender.mover.open_send("p", transfer_id, 43)
        sender.mover.computed(transfer_id, SENT, 43, None)
    for receiver in receivers:
        assert await receiver.received("d") == set()
    for sender in senders:
        await sender.sent("p")
    whole = [
        torch.cat([r.rows(b, tokens) for r in rs], dim=3)
        for rs, b in ((senders, SENT), (receivers, RECEIVED))
    ]
    assert torch.equal(*whole)


async def test_other_block_sizes_are_converted(start: Start):
    sender = start()
    receiver = start(msgspec.structs.replace(GEOMETRY, block_size=4))
    transfer_id = new_transfer_id()
    blocks = list(range(11))
    receiver.receive("d", sender, transfer_id, blocks, range(4, 43))
    sender.mover.open_send("p", transfer_id, 43)
    sender.mover.computed(transfer_id, SENT, 17, None)
    sender.mover.computed(transfer_id, SENT, 43, None)
    assert await receiver.received("d") == set()
    assert torch.equal(receiver.rows(blocks, range(4, 43)), sender.rows(SENT, range(4, 43)))


@pytest.mark.parametrize("sizes", [(4_096, CHUNK_BYTES), (CHUNK_BYTES, 4_096)])
async def test_of_two_sizes_of_chunks_the_smaller_is_used(start: Start, sizes: tuple[int, int]):
    sender, receiver = (start(chunk_bytes=size) for size in sizes)
    transfer_id = new_transfer_id()
    sender.mover.open_send("p", transfer_id, 45)
    receiver.receive("d", sender, transfer_id, RECEIVED, range(45))
    sender.mover.computed(transfer_id, SENT, 45, None)
    assert await receiver.received("d") == set()
    assert torch.equal(receiver.rows(RECEIVED, range(45)), sender.rows(SENT, range(45)))


async def test_many_transfers_share_a_connection_and_the_staging(start: Start):
    sender, receiver = start(), start()
    jobs = {new_transfer_id(): [block] for block in range(20)}
    for transfer_id, blocks in jobs.items():
        receiver.receive(transfer_id, sender, transfer_id, [blocks[0] + 10], range(8))
        sender.mover.open_send(transfer_id, transfer_id, 8)
        sender.mover.computed(transfer_id, blocks, 8, None)
    for transfer_id, blocks in jobs.items():
        assert await receiver.received(transfer_id) == set()
        assert torch.equal(receiver.rows([blocks[0] + 10], range(8)), sender.rows(blocks, range(8)))
    assert len(sender.mover._channels) == 1


async def test_a_preempted_request_goes_on_when_it_is_computed_again(start: Start):
    sender, receiver = start(), start()
    transfer_id = new_transfer_id()
    sender.mover.open_send("p", transfer_id, 45)
    sender.mover.computed(transfer_id, SENT[:3], 16, None)
    receiver.receive("d", sender, transfer_id, RECEIVED, range(45))
    await eventually(
        lambda: torch.equal(receiver.rows(RECEIVED, range(16)), sender.rows(SENT, range(16))), PATIENCE_S
    )
    sender.mover.suspend(transfer_id)
    expected = sender.rows(SENT, range(45)).clone()
    for layer in sender.layers:  # somebody else has the blocks now
        moved = layer[:, SENT].clone()
        layer[:, SENT] = 0
        layer[:, [33, 34, 35, 36, 37, 38]] = moved
    sender.mover.computed(transfer_id, [33, 34], 16, None)
    sender.mover.computed(transfer_id, [33, 34, 35, 36, 37, 38], 45, None)
    assert await receiver.received("d") == set()
    assert torch.equal(receiver.rows(RECEIVED, range(45)), expected)


class TestFailures:
    """The receiver is told what is missing, the sender gets its blocks back, no buffer is lost."""

    async def clean(self, *ranks: Rank) -> None:
        for rank in ranks:
            await eventually(rank.is_clean, PATIENCE_S)

    async def test_the_sender_aborts(self, start: Start):
        sender, receiver = start(), start()
        transfer_id = new_transfer_id()
        sender.mover.open_send("p", transfer_id, 45)
        sender.mover.computed(transfer_id, SENT, 24, None)
        receiver.receive("d", sender, transfer_id, RECEIVED, range(45))
        await eventually(
            lambda: torch.equal(receiver.rows(RECEIVED, range(24)), sender.rows(SENT, range(24))), PATIENCE_S
        )
        sender.mover.abort_send(transfer_id)
        assert await receiver.received("d") == set(RECEIVED[3:])
        await sender.sent("p")
        await self.clean(sender, receiver)

    async def test_the_receiver_cancels(self, start: Start):
        sender, receiver = start(), start()
        transfer_id = new_transfer_id()
        sender.mover.open_send("p", transfer_id, 45)
        receiver.receive("d", sender, transfer_id, RECEIVED, range(45))
        sender.mover.computed(transfer_id, SENT, 24, None)
        receiver.mover.cancel_receive(transfer_id)
        assert await receiver.received("d")
        await sender.sent("p")
        await self.clean(sender, receiver)

    async def test_nobody_comes_for_the_blocks(self, start: Start):
        sender = start(lease_s=0.05)
        transfer_id = new_transfer_id()
        sender.mover.open_send("p", transfer_id, 8)
        sender.mover.computed(transfer_id, SENT, 8, None)
        await sender.sent("p")
        receiver = start()
        receiver.receive("late", sender, transfer_id, RECEIVED, range(8))
        assert await receiver.received("late") == {RECEIVED[0]}
        await self.clean(sender, receiver)

    async def test_a_forged_transfer_id_gets_nothing(self, start: Start):
        sender, receiver = start(lease_s=0.05), start()
        receiver.receive("d", sender, new_transfer_id(), RECEIVED, range(16))
        assert await receiver.received("d") == set(RECEIVED[:2])
        await self.clean(sender, receiver)

    async def test_a_transfer_id_is_of_use_once(self, start: Start):
        sender, receiver, thief = start(), start(), start()
        transfer_id = new_transfer_id()
        receiver.receive("d", sender, transfer_id, RECEIVED, range(16))
        sender.mover.open_send("p", transfer_id, 16)
        sender.mover.computed(transfer_id, SENT, 16, None)
        assert await receiver.received("d") == set()
        await sender.sent("p")
        thief.receive("again", sender, transfer_id, RECEIVED, range(16))
        assert await thief.received("again") == set(RECEIVED[:2])
        sender.mover.open_send("p2", transfer_id, 16)
        await sender.sent("p2")
        await self.clean(sender, receiver, thief)

    async def test_the_sender_is_not_there(self, start: Start):
        sender, receiver = start(), start()
        sender.mover.stop()
        receiver.receive("d", sender, new_transfer_id(), RECEIVED, range(16))
        assert await receiver.received("d") == set(RECEIVED[:2])
        await self.clean(receiver)

    @pytest.mark.parametrize("who", ["sender", "receiver"])
    async def test_one_dies_in_the_middle(self, start: Start, who: str):
        sender, receiver = start(), start()
        transfer_id = new_transfer_id()
        sender.mover.open_send("p", transfer_id, 45)
        receiver.receive("d", sender, transfer_id, RECEIVED, range(45))
        sender.mover.computed(transfer_id, SENT, 16, None)
        await eventually(
            lambda: torch.equal(receiver.rows(RECEIVED, range(16)), sender.rows(SENT, range(16))), PATIENCE_S
        )
        if who == "sender":
            sender.mover.stop()
            assert await receiver.received("d") == set(RECEIVED[2:])
            await self.clean(receiver)
        else:
            receiver.mover.stop()
            await sender.sent("p")
            await self.clean(sender)

    @pytest.mark.parametrize(
        ("geometry", "settings"),
        [
            ({"dtype": "float16", "itemsize": 2, "head_size": 32}, {}),
            ({}, {"transport": "nixl-ucx"}),
        ],
    )
    async def test_what_cannot_be_is_refused(self, start: Start, geometry: Any, settings: Any, capfd: Any):
        sender = start()
        host = ("127.0.0.1", sender.port)
        other = msgspec.structs.replace(GEOMETRY, **geometry)
        transports = [settings.get("transport", "ucx")]
        answer = await talk(host, encode(Hello(PROTOCOL_VERSION, MODEL, other, transports, CHUNK_BYTES)))
        assert isinstance(answer, Refused)
        assert ("no common transport: ucx here, nixl-ucx there" in answer.reason) == bool(settings)
        await self.clean(sender)


async def talk(address: tuple[str, int], *frames: bytes, end: bool = False) -> object:
    """Send frames; return the answer to the last one, or None if the connection was closed."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        for frame in frames:
            writer.write(frame)
        if end:
            writer.write_eof()
        head = await asyncio.wait_for(reader.read(4), PATIENCE_S)
        return decode(await reader.readexactly(int.from_bytes(head, "big"))) if head else None
    finally:
        writer.close()


async def test_engines_of_one_authority_talk_and_others_are_not_listened_to(start: Start, tmp_path: Path):
    def tls(authority: Authority, name: str) -> PeerTls:
        own = authority.issue(name)
        return PeerTls(cert=own.certfile, key=own.keyfile, ca=authority.cafile)

    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for folder in folders:
        folder.mkdir()
    ours, theirs = map(Authority, folders)
    sender, receiver = (start(transfer_tls=tls(ours, name)) for name in ("p", "d"))
    for stranger in (start(transfer_tls=tls(theirs, "x")), start()):
        stranger.receive("x", sender, new_transfer_id(), RECEIVED, range(16))
        assert await stranger.received("x") == set(RECEIVED[:2])
    transfer_id = new_transfer_id()
    receiver.receive("d", sender, transfer_id, RECEIVED, range(16))
    sender.mover.open_send("p", transfer_id, 16)
    sender.mover.computed(transfer_id, SENT, 16, None)
    assert await receiver.received("d") == set()
    assert torch.equal(receiver.rows(RECEIVED, range(16)), sender.rows(SENT, range(16)))
    await eventually(sender.is_clean)


BAD = {
    "too large": (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "not msgpack": (4).to_bytes(4, "big") + b"\xc1\xc1\xc1\xc1",
    "cut off": encode(Hello(PROTOCOL_VERSION, MODEL, GEOMETRY, ["ucx"], CHUNK_BYTES))[:-3],
    "wrong order": encode(Subscribe(new_transfer_id(), 0)),
    "silence": b"",
    "other version": encode(Hello(PROTOCOL_VERSION + 1, MODEL, GEOMETRY, ["ucx"], CHUNK_BYTES)),
    "too small for a block": encode(Hello(PROTOCOL_VERSION, MODEL, GEOMETRY, ["ucx"], 4_095)),
    "other model": encode(Hello(PROTOCOL_VERSION, "huge", GEOMETRY, ["ucx"], CHUNK_BYTES)),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_peers_are_refused_and_others_served(start: Start, name: str):
    sender, receiver = start(peer_timeout_s=0.5), start()
    answer = await talk(("127.0.0.1", sender.port), BAD[name], end=name == "cut off")
    assert isinstance(answer, Refused)
    transfer_id = new_transfer_id()
    receiver.receive("d", sender, transfer_id, RECEIVED, range(16))
    sender.mover.open_send("p", transfer_id, 16)
    sender.mover.computed(transfer_id, SENT, 16, None)
    assert await receiver.received("d") == set()


async def test_a_bad_address_or_message_after_the_greeting(start: Start):
    sender = start(peer_timeout_s=0.5)
    reader, writer = await asyncio.open_connection("127.0.0.1", sender.port)
    writer.write(encode(Hello(PROTOCOL_VERSION, MODEL, GEOMETRY, ["ucx"], CHUNK_BYTES)))
    size = int.from_bytes(await reader.readexactly(4), "big")
    assert isinstance(decode(await reader.readexactly(size)), Welcome)
    writer.write(encode(Ready(b"nonsense")))
    size = int.from_bytes(await reader.readexactly(4), "big")
    answer = decode(await reader.readexactly(size))
    assert isinstance(answer, Refused)
    assert "no address of the transport ucx" in answer.reason
    assert await reader.read() == b""
    writer.close()


async def test_a_silent_peer_with_a_transfer_is_given_up(start: Start):
    receiver = start(peer_timeout_s=0.3)
    sender = start()
    transfer_id = new_transfer_id()
    receiver.receive("d", sender, transfer_id, RECEIVED, range(16))
    await eventually(lambda: sender.mover._sender.num_live == 1)
    frozen = asyncio.run_coroutine_threadsafe(_block(2), sender.mover._loop)
    assert await receiver.received("d") == set(RECEIVED[:2])
    assert not frozen.done()


async def _block(seconds: float) -> None:
    time.sleep(seconds)  # noqa: ASYNC251 - a peer that is frozen


def test_a_port_that_is_taken_is_said_at_the_start():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        rank = Rank(GEOMETRY, taken.getsockname()[1], 0)
        with pytest.raises(ConfigError, match=r"cannot be used.*choose another"):
            rank.mover.start()
