"""Every transport keeps the same promises.

UCXX and NIXL bring a UCX each, and two of them in one process crash: so NIXL's turn is in a process of its
own.
"""

import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
import torch

from connectors.errors import PeerLost, TransferTimeout
from connectors.transport import Peer, Transport
from connectors.transports import TRANSPORTS
from tests.support.waiting import eventually

BUFFER_BYTES = 1 << 20
PATIENCE_S = 60.0
ONLY = "KVLANE_TEST_TRANSPORT"
TRANSPORTS_HERE = [os.environ[ONLY]] if ONLY in os.environ else ["memory", "ucx"]


class Side:
    """A transport with registered memory, connected to another."""

    def __init__(self, name: str) -> None:
        self.transport: Transport = TRANSPORTS[name]()
        self.memory = torch.zeros(8, BUFFER_BYTES, dtype=torch.uint8)
        self.transport.register(self.memory)
        self.peer: Peer

    def connect(self, other: "Side") -> None:
        self.peer = self.transport.connect("other:1", other.transport.address)


@pytest.fixture(params=TRANSPORTS_HERE)
async def sides(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Side, Side]]:
    both = Side(request.param), Side(request.param)
    both[0].connect(both[1])
    both[1].connect(both[0])
    yield both
    for side in both:
        side.transport.close()


def pattern(seed: int, num_bytes: int = BUFFER_BYTES) -> torch.Tensor:
    return torch.randint(
        0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("num_bytes", [1, 4_000, BUFFER_BYTES])
async def test_what_is_offered_is_what_is_fetched(sides: tuple[Side, Side], num_bytes: int):
    sender, receiver = sides
    source, target = sender.memory[0, :num_bytes], receiver.memory[0]
    source.copy_(pattern(1, num_bytes))
    ticket, offered = sender.transport.offer(sender.peer, source)
    fetched = receiver.transport.fetch(receiver.peer, ticket, target[:num_bytes])
    await asyncio.gather(offered.wait(PATIENCE_S), fetched.wait(PATIENCE_S))
    assert torch.equal(target[:num_bytes], pattern(1, num_bytes))
    assert not target[num_bytes:].any()


async def test_many_at_once_in_both_directions_and_any_order(sides: tuple[Side, Side]):
    work = []
    for here, there in (sides, sides[::-1]):
        for i in range(4):
            here.memory[i] = pattern(10 + i)
        offers = [here.transport.offer(here.peer, here.memory[i]) for i in range(4)]
        for i in (2, 0, 3, 1):
            ticket, offered = offers[i]
            work += [offered, there.transport.fetch(there.peer, ticket, there.memory[4 + i])]
    await asyncio.gather(*(request.wait(PATIENCE_S) for request in work))
    for side in sides:
        for i in range(4):
            assert torch.equal(side.memory[4 + i], pattern(10 + i))


async def test_nothing_moves_before_it_is_fetched(sides: tuple[Side, Side]):
    sender, receiver = sides
    sender.memory[0] = pattern(1)
    ticket, offered = sender.transport.offer(sender.peer, sender.memory[0])
    with pytest.raises(TransferTimeout, match="other:1"):
        await offered.wait(0.05)
    assert not offered.finished.done()
    fetched = receiver.transport.fetch(receiver.peer, ticket, receiver.memory[0])
    await asyncio.gather(offered.wait(PATIENCE_S), fetched.wait(PATIENCE_S))
    assert torch.equal(receiver.memory[0], sender.memory[0])


async def test_giving_a_peer_up_finishes_what_it_had_open(sides: tuple[Side, Side]):
    sender, _ = sides
    _, offered = sender.transport.offer(sender.peer, sender.memory[0])
    waiting = asyncio.create_task(offered.wait(PATIENCE_S))
    await asyncio.sleep(0)
    sender.transport.disconnect(sender.peer)
    sender.transport.disconnect(sender.peer)
    with pytest.raises(PeerLost, match="other:1"):
        await waiting
    await eventually(offered.finished.done)
    with pytest.raises(PeerLost):
        sender.transport.offer(sender.peer, sender.memory[0])
    with pytest.raises(PeerLost):
        sender.transport.fetch(sender.peer, b"x" * 8, sender.memory[0])


async def test_the_others_do_not_notice_a_lost_peer(sides: tuple[Side, Side]):
    sender, receiver = sides
    third = Side(sender.transport.name)
    third.connect(sender)
    lost = sender.transport.connect("third:1", third.transport.address)
    ticket, offered = sender.transport.offer(sender.peer, sender.memory[0])
    sender.transport.disconnect(lost)
    third.transport.close()
    fetched = receiver.transport.fetch(receiver.peer, ticket, receiver.memory[0])
    await asyncio.gather(offered.wait(PATIENCE_S), fetched.wait(PATIENCE_S))
    assert not sender.peer.is_lost


async def test_a_peer_that_was_given_up_can_be_connected_again(sides: tuple[Side, Side]):
    sender, receiver = sides
    for side in sides:
        side.transport.disconnect(side.peer)
    sender.connect(receiver)
    receiver.connect(sender)
    sender.memory[0] = pattern(5)
    ticket, offered = sender.transport.offer(sender.peer, sender.memory[0])
    fetched = receiver.transport.fetch(receiver.peer, ticket, receiver.memory[0])
    await asyncio.gather(offered.wait(PATIENCE_S), fetched.wait(PATIENCE_S))
    assert torch.equal(receiver.memory[0], pattern(5))


async def test_an_idle_transport_uses_no_cpu(sides: tuple[Side, Side]):
    sender, receiver = sides
    ticket, offered = sender.transport.offer(sender.peer, sender.memory[0])
    fetched = receiver.transport.fetch(receiver.peer, ticket, receiver.memory[0])
    await asyncio.gather(offered.wait(PATIENCE_S), fetched.wait(PATIENCE_S))
    await asyncio.sleep(0.05)

    def used_s() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    before = used_s()
    await asyncio.sleep(1)
    assert used_s() - before < 0.1


@pytest.mark.parametrize("address", [b"", os.urandom(64)])
async def test_an_address_that_is_none_is_refused(sides: tuple[Side, Side], address: bytes):
    with pytest.raises(PeerLost, match="bad:1"):
        sides[0].transport.connect("bad:1", address)


@pytest.mark.skipif(ONLY in os.environ, reason="this is that process")
def test_nixl_keeps_them_too():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, ONLY: "nixl-ucx"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    assert "failed" not in done.stdout
