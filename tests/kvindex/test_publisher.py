"""The publisher between a scripted engine and an index that can fail in every way."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import reduce
from itertools import chain
from operator import xor

import pytest

from kvindex import publisher
from kvindex.config import PublisherConfig
from kvindex.contents import EngineContents
from kvindex.errors import EventsLost, IndexUnavailable
from kvindex.events import AllBlocksCleared, BlockStored
from kvindex.history import EventKind, PoolEvent
from kvindex.index import nothing
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.publisher import LoadReport, Publisher
from kvindex.worker import Batch, Load, RegisteredWorker, SlotState, StepCosts, Worker
from tests.support.scripted_engine import ScriptedSource, make_worker, prompt, removal
from tests.support.waiting import eventually

CONFIG = PublisherConfig(lease_ms=600, heartbeat_ms=50, flush_ms=1)


class FaultyWriter(MemoryIndexWriter):
    """A writer whose index can be away, or lose the answer after applying a batch."""

    def __init__(self, index: MemoryIndex) -> None:
        super().__init__(index)
        self.away = False
        self.lose_answers = 0
        self.lose_batches = 0
        self.num_calls = 0
        self.num_opened = 0
        self.batches: list[Batch] = []
        self.during_write: list[Callable[[], None]] = []
        self.accepted: list[str] = []
        self.settle_older_than_ms: set[int | None] = set()
        self.is_closed = False

    def _called(self) -> None:
        self.num_calls += 1
        if self.away:
            raise IndexUnavailable("away")

    def open_slot(self, worker: Worker, **options) -> int:
        self._called()
        self.num_opened += 1
        return super().open_slot(worker, **options)

    def apply(self, pool, slot: int, incarnation: str, *batches: Batch, meanwhile=nothing) -> SlotState:
        self._called()
        self.batches += batches
        if self.during_write and meanwhile is not nothing:
            self.during_write.pop()()
            meanwhile()
        if self.lose_batches:
            self.lose_batches -= 1
            before = self._slot(pool, slot, incarnation).state
            changes = [(*batch.stored, *batch.removed) for batch in batches]
            return SlotState(
                num_blocks=before.num_blocks
                + sum(len(batch.stored) - len(batch.removed) for batch in batches),
                digest=reduce(xor, chain(*changes), before.digest),
            )
        state = super().apply(pool, slot, incarnation, *batches)
        if self.lose_answers:
            self.lose_answers -= 1
            raise IndexUnavailable("the answer was lost")
        return state

    def heartbeat(
        self,
        pool,
        slot: int,
        incarnation: str,
        load: Load,
        *,
        lease_ms: int,
        batches: Sequence[Batch] = (),
        accepted: Sequence[str] = (),
        settle_older_than_ms: int | None = None,
    ) -> SlotState:
        self._called()
        told = self.apply(pool, slot, incarnation, *batches) if batches else None
        self.accepted += accepted
        self.settle_older_than_ms.add(settle_older_than_ms)
        state = super().heartbeat(pool, slot, incarnation, load, lease_ms=lease_ms, accepted=accepted)
        return told or state

    def close(self) -> None:
        self.is_closed = True


class Bench:
    """One publisher with everything around it."""

    def __init__(
        self,
        index: MemoryIndex | None = None,
        worker: Worker | None = None,
        config: PublisherConfig = CONFIG,
    ) -> None:
        self.index = index or MemoryIndex()
        self.worker = worker or make_worker()
        self.writer = FaultyWriter(self.index)
        self.source = ScriptedSource()
        self.load = LoadReport(Load())
        contents = EngineContents(self.worker, self.source)
        self.publisher = Publisher(self.worker, config, self.writer, contents, lambda: self.load)

    async def registered(self) -> RegisteredWorker | None:
        _, workers = await MemoryIndexReader(self.index).workers(self.worker.pool)
        ours = [w for w in workers if w.worker.incarnation == self.worker.incarnation]
        return ours[0] if ours else None

    async def reports(self, load: Load) -> bool:
        """Return whether the index knows this load."""
        found = await self.registered()
        return found is not None and found.load == load

    def log(self) -> list[PoolEvent]:
        """Return what the index remembers of the worker's slots."""
        return list(self.index.pool(self.worker.pool).events)

    async def holds(self, hashes: Sequence[int]) -> bool:
        """Return whether the live slot holds exactly these blocks."""
        found = await self.registered()
        return (
            found is not None
            and found.num_indexed_blocks == len(hashes)
            and int(found.digest, 16) == reduce(xor, hashes, 0)
        )


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.publisher.start()
    yield bench
    bench.publisher.stop()


async def test_blocks_appear_and_vanish(bench: Bench):
    event, hashes = prompt(1, 2, 3, 4, 5, 6)
    bench.source.put(event)
    await eventually(lambda: bench.holds(hashes))
    bench.source.put(removal(hashes[1:]))
    await eventually(lambda: bench.holds(hashes[:1]))
    assert bench.writer.num_opened == 1


async def test_load_is_reported_when_it_changes_and_decisions_are_accepted_once(bench: Bench):
    await eventually(bench.registered)
    busy = Load(waiting_requests=2, running_requests=1, waiting_prefill_tokens=300, kv_usage=0.5)
    bench.load = LoadReport(busy, accepted=("0123456789abcdef",))
    await eventually(lambda: bench.writer.accepted)
    bench.load = LoadReport(busy)
    found = await bench.registered()
    assert found is not None
    assert found.load == busy


async def test_a_load_report_follows_the_blocks_that_were_written(monkeypatch: pytest.MonkeyPatch):
    """Or the next turn of a conversation would be routed around a backlog that is gone."""
    monkeypatch.setattr("kvindex.publisher.LOAD_INTERVAL_S", 3_600)
    bench = Bench(config=PublisherConfig(lease_ms=600_000, flush_ms=1))
    busy = Load(running_requests=1, waiting_prefill_tokens=300)
    bench.load = LoadReport(busy)
    bench.publisher.start()
    await eventually(lambda: bench.reports(busy))
    for number in range(3):
        after = Load(running_requests=1, running_tokens=300 + number)
        bench.load = LoadReport(after)
        bench.source.put(prompt(number, 5)[0])
        await eventually(lambda expected=after: bench.reports(expected))
    bench.publisher.stop()


async def test_the_lease_is_renewed_while_nothing_happens(bench: Bench):
    await eventually(bench.registered)
    opened = time.monotonic()
    while time.monotonic() - opened < 3 * CONFIG.lease_ms / 1000:
        assert await bench.registered() is not None
        await asyncio.sleep(0.01)
    assert bench.writer.num_opened == 1


async def test_stop_takes_the_worker_out_and_releases_everything(bench: Bench):
    await eventually(bench.registered)
    bench.publisher.stop()
    assert await bench.registered() is None
    assert bench.writer.is_closed
    assert not bench.source.is_open


async def test_while_the_index_is_away_only_the_outcome_is_kept(bench: Bench):
    kept, kept_hashes = prompt(1, 2, 3, 4)
    passing, passing_hashes = prompt(7, 8)
    await eventually(bench.registered)
    bench.writer.away = True
    bench.source.put(kept)
    for _ in range(100):
        bench.source.put(passing, removal(passing_hashes))
    num_calls = bench.writer.num_calls
    await eventually(lambda: bench.writer.num_calls > num_calls + 2)
    bench.writer.away = False
    await eventually(lambda: bench.holds(kept_hashes))
    assert sum(len(batch.stored) + len(batch.removed) for batch in bench.writer.batches) <= 4


async def test_a_batch_whose_answer_is_lost_is_repeated_unchanged(bench: Bench):
    event, hashes = prompt(1, 2, 3, 4)
    bench.writer.lose_answers = 2
    bench.source.put(event)
    await eventually(lambda: len(bench.writer.batches) >= 3)
    await eventually(lambda: bench.holds(hashes))
    assert len(set(bench.writer.batches[:3])) == 1
    assert bench.writer.num_opened == 1


async def test_a_batch_that_was_answered_and_lost_leads_to_a_fresh_slot(bench: Bench):
    """A Redis that answered and failed over without the write; the next batch or heartbeat shows it."""
    event, hashes = prompt(1, 2, 3, 4)
    await eventually(bench.registered)
    bench.writer.lose_batches = 1
    bench.source.put(event)
    await eventually(lambda: bench.writer.num_opened == 2)
    await eventually(lambda: bench.holds(hashes))


async def test_an_index_that_is_away_stops_neither_events_nor_the_load(bench: Bench):
    """8,000 changes pass while Redis is away; what is kept is about what the engine holds."""
    await eventually(bench.registered)
    bench.writer.away = True
    last: list[int] = []
    for number in range(2_000):
        event, hashes = prompt(number, 1, 2, 3)
        bench.source.put(event, *([removal(last)] if last else []))
        last = hashes
    await eventually(lambda: bench.source.is_drained, patience_s=60)
    bench.writer.batches.clear()
    bench.writer.away = False
    await eventually(lambda: bench.holds(last))
    assert sum(len(batch.stored) + len(batch.removed) for batch in bench.writer.batches) < 100


async def test_a_lost_slot_is_replaced_by_a_fresh_one_with_the_whole_state(bench: Bench):
    event, hashes = prompt(1, 2, 3, 4)
    bench.source.put(event)
    await eventually(lambda: bench.holds(hashes))
    for slot in list(bench.index.pool(bench.worker.pool).slots.values()):
        bench.index.pool(bench.worker.pool).fence(slot, EventKind.FENCED, "", bench.index.now_ms())
    await eventually(lambda: bench.holds(hashes))
    assert bench.writer.num_opened == 2
    assert bench.log()[-1].kind == EventKind.RESYNC


@pytest.mark.parametrize("damage", ["lost", "added", "altered"])
async def test_drift_in_the_index_is_found_and_repaired(bench: Bench, damage: str):
    event, hashes = prompt(1, 2, 3, 4)
    bench.source.put(event)
    await eventually(lambda: bench.holds(hashes))
    (slot,) = bench.index.pool(bench.worker.pool).slots.values()
    lost, added = {hashes[0]}, {12345}
    slot.change(set() if damage == "lost" else added, set() if damage == "added" else lost)
    await eventually(lambda: bench.writer.num_opened == 2)
    await eventually(lambda: bench.holds(hashes))
    assert bench.log()[-1].kind == EventKind.DRIFT
    assert "it was told 2 with" in bench.log()[-1].detail


async def test_a_cleared_cache_takes_a_fresh_slot(bench: Bench):
    event, hashes = prompt(1, 2, 3, 4)
    after, after_hashes = prompt(5, 6)
    bench.source.put(event)
    await eventually(lambda: bench.holds(hashes))
    bench.source.put(AllBlocksCleared(), after)
    await eventually(lambda: bench.holds(after_hashes))
    assert bench.writer.num_opened == 2
    assert not any(batch.removed for batch in bench.writer.batches)
    assert [event.kind for event in bench.log()] == [EventKind.OPENED, EventKind.FENCED, EventKind.CLEARED]


@pytest.fixture
async def idle(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    """A publisher that has reported its load and does not look again unless it wrote blocks."""
    monkeypatch.setattr("kvindex.publisher.LOAD_INTERVAL_S", 3_600)
    bench = Bench(config=PublisherConfig(lease_ms=600_000, flush_ms=1))
    bench.load = LoadReport(Load(running_requests=1))
    bench.publisher.start()
    await eventually(lambda: bench.reports(bench.load.load))
    yield bench
    threading.Timer(0.05, bench.source.put, [AllBlocksCleared()]).start()  # it waits for an event
    bench.publisher.stop()


async def test_the_engine_is_followed_during_a_write(idle: Bench):
    (first, hashes), (second, more_hashes) = prompt(1, 2, 3, 4), prompt(5, 6)
    idle.writer.during_write.append(lambda: idle.source.put(second))
    idle.source.put(first)
    await eventually(lambda: idle.holds(hashes + more_hashes))
    assert not idle.writer.during_write
    assert [batch.stored for batch in idle.writer.batches] == [tuple(hashes), tuple(more_hashes)]


@pytest.mark.parametrize("end", [AllBlocksCleared(), EventsLost("gap")])
async def test_what_ends_the_slot_waits_until_a_write_is_done(idle: Bench, end):
    (before, _), (after, after_hashes) = prompt(1, 2, 3, 4), prompt(5, 6)
    idle.writer.during_write.append(lambda: idle.source.put(end, after))
    idle.source.put(before)
    await eventually(lambda: idle.holds(after_hashes))
    assert not idle.writer.during_write
    assert idle.writer.num_opened == 2


async def test_lost_events_leave_no_claim_behind(bench: Bench):
    event, hashes = prompt(1, 2, 3, 4)
    child = BlockStored(
        block_hashes=[99], parent_block_hash=hashes[-1] ^ 1, token_ids=[5, 6], block_size=2, medium="GPU"
    )
    again, again_hashes = prompt(7, 8)
    bench.source.put(event)
    await eventually(lambda: bench.holds(hashes))
    bench.source.put(EventsLost("gap"), child, again)
    await eventually(lambda: bench.holds(again_hashes))
    assert (bench.log()[-1].kind, bench.log()[-1].detail) == (EventKind.RESYNC, "gap")


async def test_nothing_is_resent_when_nothing_was_known(bench: Bench):
    event, hashes = prompt(1, 2)
    bench.source.put(EventsLost("joined late"), AllBlocksCleared(), event)
    await eventually(lambda: bench.holds(hashes))
    assert bench.writer.num_opened == 1


async def test_a_second_process_on_the_endpoint_waits_for_the_lease():
    first, event = Bench(), prompt(1, 2)[0]
    second = Bench(first.index, make_worker())
    first.publisher.start()
    first.source.put(event)
    await eventually(first.registered)
    second.publisher.start()
    await eventually(lambda: second.writer.num_opened)
    assert await first.registered() is not None
    assert await second.registered() is None
    first.publisher.stop()
    await eventually(second.registered)
    second.publisher.stop()


async def test_a_large_state_is_sent_in_many_batches_while_the_lease_goes_on(bench: Bench):
    event, hashes = prompt(*range(20_000))
    bench.source.put(event)
    await eventually(lambda: bench.holds(hashes))
    assert len(bench.writer.batches) == -(-len(hashes) // 128)


async def test_what_steps_cost_is_told_when_it_changes_and_again_in_a_fresh_slot(monkeypatch):
    monkeypatch.setattr(publisher, "COSTS_INTERVAL_S", 0.01)
    bench = Bench()
    known: list[StepCosts | None] = [None]
    contents = EngineContents(bench.worker, bench.source)
    made = Publisher(bench.worker, CONFIG, bench.writer, contents, lambda: bench.load, costs=lambda: known[0])
    made.start()

    async def told() -> StepCosts | None:
        found = await bench.registered()
        return found.step_costs if found else None

    async def is_told() -> bool:
        return await told() == known[0]

    await eventually(bench.registered)
    assert await told() is None
    for num_steps in (5, 6):
        known[0] = StepCosts(num_steps=num_steps, prefill_tokens_per_s=1_000.0 * num_steps)
        await eventually(is_told)
    bench.source.put(prompt(1, 2)[0], EventsLost("gap"))
    await eventually(lambda: bench.writer.num_opened == 2)
    await eventually(is_told)
    made.stop()


async def test_age_settles_reservations_for_publishers_that_cannot_name_them():
    bench = Bench()
    publisher = Publisher(
        bench.worker,
        CONFIG,
        bench.writer,
        EngineContents(bench.worker, bench.source),
        lambda: bench.load,
        settle_older_than_ms=700,
    )
    publisher.start()
    await eventually(lambda: bench.writer.settle_older_than_ms)
    publisher.stop()
    assert bench.writer.settle_older_than_ms == {700}
