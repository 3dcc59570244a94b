"""Workers are checked when they join, a few at a time, and again until they pass."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import pytest

from gateway import parity_watch
from gateway.config import GatewayConfig
from gateway.fleet import Fleet
from gateway.parity import Parity, Reason, State, degraded, unverified
from gateway.parity_watch import ParityWatch
from gateway.probe import ModelCard, worker_client
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from tests.support.waiting import eventually
from tests.support.workers import make_worker

EXACT = Parity(state=State.EXACT, checked_at=1.0)


class ScriptedProber:
    """Ends each check when `open` is set, with `verdict`, and remembers what it was asked."""

    def __init__(self) -> None:
        self.verdict = lambda worker: EXACT
        self.open = asyncio.Event()
        self.open.set()
        self.checked: list[tuple[str, str | None]] = []
        self.now = self.most = 0

    async def check(self, registered, adapter=None):
        self.checked.append((registered.worker.incarnation, adapter))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.open.wait()
        finally:
            self.now -= 1
        return self.verdict(registered.worker)


class Watched:
    """A fleet on a memory index, whose workers accept connections once `answering`."""

    def __init__(self, client, silent_workers=tuple, **options) -> None:
        self.memory = MemoryIndex()
        self.config = GatewayConfig(**({"poll_interval_ms": 5} | options))
        self.fleet = Fleet(self.config, MemoryIndexReader(self.memory), client)
        self.prober = ScriptedProber()
        self.watch = ParityWatch(self.config, self.fleet, self.prober, silent_workers)

    async def join(self, endpoint, *, takeover=False, **fields):
        worker = make_worker(endpoint, **fields)
        MemoryIndexWriter(self.memory).open_slot(worker, lease_ms=60_000, takeover=takeover)
        await self.fleet.poll()
        return worker

    def answering(self, *cards):
        """Note that every endpoint has told that it serves `cards`."""
        self.fleet._replace(cards=dict.fromkeys(self.fleet.addresses, cards))

    def state(self, worker):
        return self.fleet.snapshot.parity_of(worker).state


@pytest.fixture
async def watched():
    async with contextlib.AsyncExitStack() as exits:
        client = await exits.enter_async_context(worker_client(GatewayConfig()))

        def make(**options) -> Watched:
            made = Watched(client, **options)
            made.watch.start()
            exits.push_async_callback(made.watch.stop)
            return made

        yield make


async def test_a_worker_is_checked_once_it_accepts_connections_and_then_left_alone(watched):
    at = watched(parity_again_s=0.01)
    worker = await at.join("a:1")
    await asyncio.sleep(0.05)
    assert at.prober.checked == []
    assert at.state(worker) is State.CHECKING
    at.answering()
    await eventually(lambda: at.state(worker) is State.EXACT)
    await asyncio.sleep(0.05)
    assert at.prober.checked == [(worker.incarnation, None)]


async def test_an_adapter_is_checked_with_its_worker(watched):
    at = watched()
    worker = await at.join("a:1")
    at.answering(ModelCard(id="tiny"), ModelCard(id="sql", parent="tiny"), ModelCard(id="art", parent="tiny"))
    await eventually(lambda: at.prober.checked)
    assert at.prober.checked == [(worker.incarnation, "art")]


async def test_two_hundred_workers_that_join_at_once_are_checked_a_few_at_a_time(watched):
    at = watched(parity_concurrency=3)
    at.prober.open.clear()
    workers = [await at.join(f"10.0.0.{number}:8000") for number in range(200)]
    at.answering()
    await eventually(lambda: at.prober.now == 3)
    at.prober.open.set()
    await eventually(lambda: all(at.state(worker) is State.EXACT for worker in workers))
    assert at.prober.most == 3
    assert set(Counter(name for name, _ in at.prober.checked).values()) == {1}


async def test_a_degraded_worker_is_checked_again_until_it_is_exact(watched):
    at = watched(parity_again_s=0.02)
    at.prober.verdict = lambda worker: degraded(worker, Reason.TOKENS, "")
    worker = await at.join("a:1")
    at.answering()
    await eventually(lambda: len(at.prober.checked) >= 3)
    assert at.state(worker) is State.DEGRADED
    at.prober.verdict = lambda worker: EXACT
    await eventually(lambda: at.state(worker) is State.EXACT)


async def test_a_new_life_is_checked_anew(watched):
    at = watched()
    first = await at.join("a:1")
    at.answering()
    await eventually(lambda: at.state(first) is State.EXACT)
    at.prober.verdict = lambda worker: degraded(worker, Reason.HASHES, "")
    second = await at.join("a:1", incarnation="second", takeover=True)
    assert at.state(second) is State.CHECKING
    at.answering()
    await eventually(lambda: at.state(second) is State.DEGRADED)
    assert set(at.fleet.snapshot.parity) == {"second"}


async def test_a_worker_whose_lease_lapsed_is_checked_again(watched):
    at = watched()
    worker = await at.join("a:1")
    at.answering()
    await eventually(lambda: at.state(worker) is State.EXACT)
    writer = MemoryIndexWriter(at.memory)
    (slot,) = [each.slot for each in at.fleet.snapshot.workers()]
    writer.close_slot(worker.pool, slot, worker.incarnation)
    # Both reads come between two looks of the watch.
    await at.fleet.poll()
    await at.join("a:1")
    assert at.state(worker) is State.CHECKING
    await eventually(lambda: at.state(worker) is State.EXACT)
    assert len(at.prober.checked) == 2


async def test_a_check_without_end_is_made_again_soon_and_changes_no_verdict(watched, monkeypatch):
    monkeypatch.setattr(parity_watch, "FIRST_AGAIN_S", 0.01)
    at = watched(parity_again_s=0.02)
    at.prober.verdict = lambda worker: unverified(worker, Reason.NO_ANSWER, "busy")
    worker = await at.join("a:1")
    at.answering()
    await eventually(lambda: len(at.prober.checked) >= 3)
    parity = at.fleet.snapshot.parity_of(worker)
    assert (parity.state, parity.reason) == (State.CHECKING, Reason.NO_ANSWER)
    at.prober.verdict = lambda worker: degraded(worker, Reason.TOKENS, "")
    await eventually(lambda: at.state(worker) is State.DEGRADED)
    at.prober.verdict = lambda worker: unverified(worker, Reason.NO_ANSWER, "busy")
    so_far = len(at.prober.checked)
    await eventually(lambda: len(at.prober.checked) >= so_far + 2)
    parity = at.fleet.snapshot.parity_of(worker)
    assert (parity.reason, parity.answers) == (Reason.TOKENS, False)
    at.prober.verdict = lambda worker: degraded(worker, Reason.TOKENS, "")
    await eventually(lambda: at.fleet.snapshot.parity_of(worker).answers)


async def test_a_worker_that_falls_silent_is_checked_and_may_lose_its_requests(watched, monkeypatch):
    monkeypatch.setattr(parity_watch, "FIRST_AGAIN_S", 0.01)
    silent = set()
    at = watched(parity_again_s=0.02, silent_workers=lambda: silent)
    worker = await at.join("a:1")
    at.answering()
    await eventually(lambda: at.state(worker) is State.EXACT)
    checked = len(at.prober.checked)
    silent.add(worker.worker_id)
    # Its answers are only long: it passes again.
    await eventually(lambda: len(at.prober.checked) >= checked + 2)
    assert at.fleet.snapshot.parity_of(worker).answers
    at.prober.verdict = lambda worker: unverified(worker, Reason.NO_ANSWER, "hangs")
    await eventually(lambda: not at.fleet.snapshot.parity_of(worker).answers)
    assert at.state(worker) is State.EXACT
    silent.clear()
    at.prober.verdict = lambda worker: EXACT
    await eventually(lambda: at.fleet.snapshot.parity_of(worker).answers)


async def test_a_worker_that_left_while_it_waited_for_its_turn_is_not_checked(watched):
    at = watched(parity_concurrency=1)
    at.prober.open.clear()
    await at.join("a:1")
    second = await at.join("b:1")
    at.answering()
    await eventually(lambda: at.prober.now == 1)
    (waiting,) = {"life-of-a:1", "life-of-b:1"} - {name for name, _ in at.prober.checked}
    gone = next(each for each in at.fleet.snapshot.workers() if each.worker.incarnation == waiting)
    MemoryIndexWriter(at.memory).close_slot(second.pool, gone.slot, waiting)
    await at.fleet.poll()
    at.prober.open.set()
    await eventually(lambda: len(at.fleet.snapshot.parity) == 1)
    await asyncio.sleep(0.05)
    assert len(at.prober.checked) == 1
