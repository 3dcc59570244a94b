"""What every index promises, whatever it is made of; and that both answer alike."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass

import msgspec
import pytest

from kvindex.blocks import BlockHash, Pool
from kvindex.config import IndexConfig
from kvindex.errors import SlotLost, WorkerConflict
from kvindex.history import EventKind, Opening
from kvindex.index import MAX_BATCH, IndexReader, IndexWriter
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.pending import MOST_PENDING, Pending, Sample
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.stores import Store, StoreSpeed
from kvindex.worker import Batch, Load, Reservation, Role, SlotState, StepCosts, Tier, Worker

POOL = Pool("m", 16)
LONG_MS = 60_000
BUSY = Load(
    waiting_requests=1, running_requests=2, waiting_prefill_tokens=300, running_tokens=4, kv_usage=0.5
)


def worker(number: int = 0, incarnation: str = "one", model: str = "m") -> Worker:
    return Worker(
        endpoint=f"10.0.0.{number}:8000",
        model=model,
        block_size=16,
        num_blocks=1000,
        bytes_per_token=1024,
        max_model_len=4096,
        incarnation=incarnation,
        labels={"zone": "a"},
    )


def digest(hashes) -> int:
    value = 0
    for block in hashes:
        value ^= block
    return value


@dataclass
class Index:
    writer: IndexWriter
    reader: IndexReader
    clock_ms: list[float] | None
    """None where time is real."""

    async def elapse(self, ms: float) -> None:
        if self.clock_ms is None:
            await asyncio.sleep((ms + 2) / 1000)
        else:
            self.clock_ms[0] += ms + 2

    def open(self, number: int = 0, incarnation: str = "one", lease_ms: int = LONG_MS, **options) -> int:
        return self.writer.open_slot(worker(number, incarnation), lease_ms=lease_ms, **options)

    def store(self, slot: int, hashes, incarnation: str = "one", sequence: int = 1) -> SlotState:
        state = None
        for at in range(0, len(hashes), MAX_BATCH):
            batch = Batch(sequence=sequence, stored=tuple(hashes[at : at + MAX_BATCH]))
            state = self.writer.apply(POOL, slot, incarnation, batch)
            sequence += 1
        return state

    async def overlap(self, hashes) -> dict[int, int]:
        return (await self.reader.match(POOL, hashes)).overlap_blocks

    async def scan(self, max_buckets: int = 64) -> dict[int, tuple[int, ...]]:
        found, first_bucket = {}, 0
        while first_bucket is not None:
            entries = await self.reader.entries(POOL, first_bucket=first_bucket, max_buckets=max_buckets)
            found |= entries.holders
            first_bucket = entries.next_bucket
        return found

    async def charged(self, slot: int) -> tuple[int, int]:
        [state] = [s for s in (await self.reader.match(POOL, [])).states if s.slot == slot]
        return state.charged_tokens, state.charged_requests

    async def reserve(self, decision_id: str, slot: int, tokens: int = 100, **options) -> Reservation:
        options = {"seen_backlog_tokens": None, "ttl_ms": LONG_MS} | options
        return await self.reader.reserve(POOL, decision_id, slot, prefill_tokens=tokens, **options)

    async def sweep_all(self, max_buckets: int = 4) -> None:
        for _ in range(10_000):
            if await self.reader.sweep(POOL, max_buckets=max_buckets) == 0:
                return
        raise AssertionError("the sweep does not end")


def memory_index() -> Index:
    clock_ms = [1_000_000.0]
    state = MemoryIndex(lambda: clock_ms[0] / 1000)
    return Index(MemoryIndexWriter(state), MemoryIndexReader(state), clock_ms)


@contextlib.asynccontextmanager
async def redis_index(url: str):
    config = IndexConfig(redis_url=url, redis_timeout_s=10)
    index = Index(RedisIndexWriter(config), RedisIndexReader(config), None)
    await index.reader.pools()  # connects, which takes longer than some leases below
    yield index
    index.writer.close()
    await index.reader.close()


@pytest.fixture(params=["memory", "redis", "valkey", "sentinel", "cluster"])
async def index(request):
    if request.param == "memory":
        yield memory_index()
    else:
        async with redis_index(request.getfixturevalue(f"{request.param}_url")) as made:
            yield made


# Registry


async def test_an_empty_index_knows_nobody(index):
    version, workers = await index.reader.workers(POOL)
    match = await index.reader.match(POOL, [1, 2, 3])
    assert (workers, match.states, match.overlap_blocks) == ([], (), {})
    assert match.registry_version == version
    assert await index.reader.pools() == []
    assert await index.reader.sweep(POOL, max_buckets=10) == 0


async def test_a_worker_is_listed_as_it_registered(index):
    slot = index.open(3)
    index.writer.heartbeat(POOL, slot, "one", BUSY, lease_ms=LONG_MS)
    state = index.store(slot, [5, 9])
    version, [listed] = await index.reader.workers(POOL)
    assert listed.worker == worker(3)
    assert listed.load == BUSY
    assert (listed.slot, listed.num_indexed_blocks, listed.digest) == (slot, 2, f"{5 ^ 9:016x}")
    assert 0 < listed.lease_left_ms <= LONG_MS
    assert state == SlotState(num_blocks=2, digest=5 ^ 9)
    assert (await index.reader.match(POOL, [])).registry_version == version


async def test_a_caller_can_work_while_batches_are_applied(index):
    slot = index.open()
    worked = []
    batches = [Batch(sequence=number, stored=(number,)) for number in (1, 2, 3)]
    state = index.writer.apply(POOL, slot, "one", *batches, meanwhile=lambda: worked.append(1))
    assert worked
    assert state == SlotState(num_blocks=3, digest=1 ^ 2 ^ 3)


async def test_pools_are_apart(index):
    index.open()
    other = index.writer.open_slot(worker(model="n"), lease_ms=LONG_MS)
    index.writer.apply(Pool("n", 16), other, "one", Batch(sequence=1, stored=(1,)))
    assert await index.overlap([1]) == {}
    assert sorted(pool.model for pool in await index.reader.pools()) == ["m", "n"]


async def test_the_version_changes_when_a_worker_joins_leaves_lapses_or_is_replaced(index):
    seen = [(await index.reader.match(POOL, [])).registry_version]

    async def changed() -> bool:
        seen.append((await index.reader.match(POOL, [])).registry_version)
        return seen[-1] not in seen[:-1]

    slot = index.open(0)
    assert await changed()
    assert not await changed()
    index.open(1, lease_ms=150)
    assert await changed()
    await index.elapse(150)
    assert await changed()
    slot = index.open(0)
    assert await changed()
    index.writer.close_slot(POOL, slot, "one")
    assert await changed()


async def test_a_live_worker_is_not_pushed_aside_by_another_process(index):
    slot = index.open(0, "one")
    with pytest.raises(WorkerConflict):
        index.open(0, "two")
    index.store(slot, [1])
    assert index.open(0, "two", takeover=True) != slot
    with pytest.raises(SlotLost):
        index.store(slot, [2], sequence=2)


async def test_a_lapsed_worker_may_be_replaced(index):
    former = index.open(0, "one", lease_ms=150)
    await index.elapse(150)
    assert index.open(0, "two") != former


async def test_ranks_of_one_endpoint_are_workers_of_their_own(index):
    ranks = [
        Worker(
            endpoint="10.0.0.1:8000",
            model="m",
            block_size=16,
            num_blocks=1,
            bytes_per_token=1,
            max_model_len=1,
            incarnation=f"rank {rank}",
            dp_rank=rank,
            dp_size=2,
        )
        for rank in (0, 1)
    ]
    slots = [index.writer.open_slot(rank, lease_ms=LONG_MS) for rank in ranks]
    assert len(set(slots)) == 2
    assert [w.worker for w in (await index.reader.workers(POOL))[1]] == ranks


# Sequenced writes


async def test_stores_and_removes_are_counted_once(index):
    slot = index.open()
    apply = index.writer.apply
    assert apply(POOL, slot, "one", Batch(sequence=1, stored=(1, 2, 3))).num_blocks == 3
    assert apply(POOL, slot, "one", Batch(sequence=2, stored=(3, 4))).num_blocks == 4
    assert apply(POOL, slot, "one", Batch(sequence=3, stored=(9,), removed=(2, 77))) == SlotState(
        num_blocks=4, digest=digest([1, 3, 4, 9])
    )
    assert await index.overlap([1, 2]) == {slot: 1}
    assert await index.reader.holders(POOL, 9) == [slot]
    assert await index.reader.holders(POOL, 2) == []


async def test_a_repeated_batch_changes_nothing(index):
    slot = index.open()
    first = Batch(sequence=1, stored=(1, 2))
    state = index.writer.apply(POOL, slot, "one", first)
    index.writer.apply(POOL, slot, "one", Batch(sequence=2, removed=(1,)))
    assert index.writer.apply(POOL, slot, "one", first) == SlotState(num_blocks=1, digest=2)
    assert state == SlotState(num_blocks=2, digest=3)
    assert await index.overlap([2]) == {slot: 1}


async def test_batches_go_in_order_and_the_answer_is_of_the_last(index):
    slot = index.open()
    batches = [Batch(sequence=n, stored=(n,), removed=(n - 1,) if n > 1 else ()) for n in range(1, 21)]
    assert index.writer.apply(POOL, slot, "one", *batches[:15]) == SlotState(num_blocks=1, digest=15)
    assert index.writer.apply(POOL, slot, "one", *batches) == SlotState(num_blocks=1, digest=20)
    assert await index.overlap([20]) == {slot: 1}


async def test_a_role_is_the_workers_own_until_one_is_given(index):
    index.open()
    version, (before,) = await index.reader.workers(POOL)
    assert before.role is Role.BOTH
    assert await index.reader.give_role(POOL, before.worker.worker_id, Role.PREFILL)
    newer, (given,) = await index.reader.workers(POOL)
    assert (given.role, given.worker.role) == (Role.PREFILL, Role.BOTH)
    assert newer != version
    index.open(incarnation="two", takeover=True)
    _, (restarted,) = await index.reader.workers(POOL)
    assert restarted.role is Role.PREFILL
    assert await index.reader.give_role(POOL, before.worker.worker_id, None)
    _, (own,) = await index.reader.workers(POOL)
    assert own.role is Role.BOTH
    assert not await index.reader.give_role(POOL, "nobody", Role.DECODE)


async def test_a_gap_between_batches_loses_the_slot(index):
    slot = index.open()
    with pytest.raises(SlotLost):
        index.writer.apply(POOL, slot, "one", Batch(sequence=1, stored=(1,)), Batch(sequence=3, stored=(3,)))


async def test_a_worker_drains_through_restarts_until_that_is_taken_back(index):
    index.open()
    version, (before,) = await index.reader.workers(POOL)
    assert not before.is_draining
    name = before.worker.worker_id
    assert await index.reader.drain(POOL, name, is_draining=True)
    newer, (draining,) = await index.reader.workers(POOL)
    assert draining.is_draining
    assert newer != version
    index.open(incarnation="two", takeover=True)
    _, (restarted,) = await index.reader.workers(POOL)
    assert restarted.is_draining
    for _ in range(2):
        assert await index.reader.drain(POOL, name, is_draining=False)
        _, (again,) = await index.reader.workers(POOL)
        assert not again.is_draining
    assert not await index.reader.drain(POOL, "nobody", is_draining=True)


async def test_a_worker_says_what_its_steps_cost_and_its_next_life_begins_anew(index):
    slot = index.open()
    _, (before,) = await index.reader.workers(POOL)
    assert before.step_costs is None
    costs = StepCosts(num_steps=7, prefill_tokens_per_s=None, step_ms=0.1 + 0.2)
    for told in (costs, msgspec.structs.replace(costs, num_steps=9, prefill_tokens_per_s=8_000.5)):
        index.writer.report_costs(POOL, slot, "one", told)
        _, (after,) = await index.reader.workers(POOL)
        assert after.step_costs == told
    with pytest.raises(SlotLost):
        index.writer.report_costs(POOL, slot, "two", costs)
    index.open(incarnation="two", takeover=True)
    _, (restarted,) = await index.reader.workers(POOL)
    assert restarted.step_costs is None
    with pytest.raises(SlotLost):
        index.writer.report_costs(POOL, slot, "one", costs)


async def test_a_heartbeat_carries_batches(index):
    slot = index.open()
    batches = [Batch(sequence=1, stored=(1,)), Batch(sequence=2, stored=(2,))]
    state = index.writer.heartbeat(POOL, slot, "one", BUSY, lease_ms=LONG_MS, batches=batches)
    assert state == SlotState(num_blocks=2, digest=3)
    assert await index.overlap([1, 2]) == {slot: 2}
    ((_, (worker,)),) = [await index.reader.workers(POOL)]
    assert worker.load == BUSY


async def test_a_gap_loses_the_slot(index):
    slot = index.open()
    index.store(slot, [1])
    with pytest.raises(SlotLost):
        index.store(slot, [2], sequence=3)
    assert await index.overlap([2]) == {}


@pytest.mark.parametrize(("slot_offset", "incarnation"), [(0, "other"), (1, "one")])
async def test_only_the_owner_writes_to_a_slot(index, slot_offset, incarnation):
    slot = index.open() + slot_offset
    with pytest.raises(SlotLost):
        index.store(slot, [1], incarnation)
    with pytest.raises(SlotLost):
        index.writer.heartbeat(POOL, slot, incarnation, BUSY, lease_ms=LONG_MS)
    index.writer.close_slot(POOL, slot, incarnation)
    assert len((await index.reader.workers(POOL))[1]) == 1


async def test_hashes_use_all_64_bits(index):
    hashes = [0, 1, 2**32 - 1, 2**32, 2**53 + 1, 2**63, 2**64 - 1, 0x3131313131313131]
    slot = index.open()
    assert index.store(slot, hashes) == SlotState(num_blocks=len(hashes), digest=digest(hashes))
    assert await index.overlap(hashes) == {slot: len(hashes)}
    for block in hashes:
        assert await index.reader.holders(POOL, block) == [slot]
        assert await index.reader.holders(POOL, block ^ (1 << 63)) == [slot] * ((block ^ (1 << 63)) in hashes)


# Match


async def test_overlaps_are_exact_for_short_prompts(index):
    slots = [index.open(number) for number in range(4)]
    for slot, depth in zip(slots, (0, 1, 7, 10), strict=True):
        index.store(slot, range(100, 100 + depth))
    assert await index.overlap(range(100, 110)) == {slots[1]: 1, slots[2]: 7, slots[3]: 10}
    assert await index.overlap(range(100, 105)) == {slots[1]: 1, slots[2]: 5, slots[3]: 5}
    assert await index.overlap([]) == {}
    match = await index.reader.match(POOL, [1])
    assert [state.slot for state in match.states] == slots


@pytest.mark.parametrize("num_blocks", [255, 256, 257, 1000, 6250])
async def test_overlaps_of_long_prompts_are_within_a_stride(index, num_blocks):
    rng = random.Random(num_blocks)
    hashes = [rng.getrandbits(64) for _ in range(num_blocks)]
    depths = {}
    for number in range(6):
        slot = index.open(number)
        depths[slot] = num_blocks if number == 0 else rng.randrange(1, num_blocks)
        index.store(slot, hashes[: depths[slot]])
    match = await index.reader.match(POOL, hashes)
    for slot, depth in depths.items():
        assert depth - match.stride < match.overlap_blocks.get(slot, 0) <= depth
    assert match.overlap_blocks[next(iter(depths))] == num_blocks


async def test_many_holders_of_one_block(index):
    """Beyond 31 slots the set of holders changes its form; beyond 504 it changes again."""
    slots = [index.open(number) for number in range(70)]
    for slot in slots:
        index.store(slot, [1, 2 if slot % 2 else 3])
    assert await index.overlap([1, 2]) == {slot: 1 + slot % 2 for slot in slots}
    for slot in slots[5:]:
        index.writer.apply(POOL, slot, "one", Batch(sequence=2, removed=(1,)))
    assert await index.reader.holders(POOL, 1) == slots[:5]


# Slices


async def test_a_scan_finds_every_block_with_its_live_holders(index):
    rng = random.Random(0)
    shared, own, gone = ([rng.getrandbits(64) for _ in range(700)] for _ in range(3))
    first, second, closed = (index.open(number) for number in range(3))
    lapsed = index.open(3, lease_ms=300)
    index.store(first, shared + own)
    for slot in (second, closed, lapsed):
        index.store(slot, shared if slot == second else shared + gone)
    index.writer.close_slot(POOL, closed, "one")
    await index.elapse(300)
    expected = dict.fromkeys(shared, (first, second)) | dict.fromkeys(own, (first,))
    assert await index.scan() == expected
    assert await index.scan(max_buckets=1) == expected


async def test_a_scan_of_nothing_has_one_empty_slice(index):
    entries = await index.reader.entries(POOL)
    assert (entries.holders, entries.next_bucket) == ({}, None)
    slot = index.open()
    index.store(slot, [1])
    assert (await index.reader.entries(POOL)).holders == {1: (slot,)}
    behind = await index.reader.entries(POOL, first_bucket=1_000_000)
    assert (behind.holders, behind.next_bucket) == ({}, None)


async def test_a_scan_misses_nothing_while_the_pool_grows(index):
    rng = random.Random(1)
    hashes = [rng.getrandbits(64) for _ in range(1_000)]
    slot = index.open()
    index.store(slot, hashes)
    found, first_bucket, sequence = {}, 0, -(-len(hashes) // MAX_BATCH)
    while first_bucket is not None:
        entries = await index.reader.entries(POOL, first_bucket=first_bucket, max_buckets=4)
        found |= entries.holders
        first_bucket = entries.next_bucket
        if sequence < 30:
            sequence += 1
            index.store(slot, [rng.getrandbits(64) for _ in range(MAX_BATCH)], sequence=sequence)
    assert found.keys() >= set(hashes)


async def test_a_scan_knows_many_holders_of_one_block(index):
    slots = tuple(index.open(number) for number in range(70))
    for slot in slots:
        index.store(slot, [1, 2, 3] if slot % 2 else [1, 2] if slot < 10 else [1])
    assert await index.scan() == {1: slots, 2: (*range(10), *slots[11::2]), 3: slots[1::2]}


@pytest.mark.parametrize("num_blocks", [0, 10, 3_000])
async def test_the_parts_of_a_slot_are_its_blocks(index, num_blocks):
    rng = random.Random(num_blocks)
    mine, others = ([rng.getrandbits(64) for _ in range(num_blocks)] for _ in range(2))
    slot, other = index.open(0), index.open(1)
    index.store(slot, mine)
    index.store(other, mine[::2] + others)
    parts = [index.writer.blocks_of(POOL, slot, "one", turn=0)]
    num_parts = parts[0].num_parts
    assert num_parts & (num_parts - 1) == 0
    parts += [index.writer.blocks_of(POOL, slot, "one", turn=turn) for turn in range(1, num_parts)]
    assert [part.part for part in parts] == list(range(num_parts))
    for part in parts:
        assert part.blocks == {block for block in mine if block % num_parts == part.part}
    assert index.writer.blocks_of(POOL, slot, "one", turn=num_parts + 1).part == 1 % num_parts


async def test_only_the_owner_reads_a_slot_back(index):
    slot = index.open()
    with pytest.raises(SlotLost):
        index.writer.blocks_of(POOL, slot, "other", turn=0)
    with pytest.raises(SlotLost):
        index.writer.blocks_of(POOL, slot + 1, "one", turn=0)
    index.writer.close_slot(POOL, slot, "one")
    with pytest.raises(SlotLost):
        index.writer.blocks_of(POOL, slot, "one", turn=0)


async def test_the_holders_of_many_blocks_are_read_at_once(index):
    slots = [index.open(number) for number in range(40)]
    for slot in slots:
        index.store(slot, [slot + 1, 1000, 2**64 - 1 - slot])
    index.writer.close_slot(POOL, slots[3], "one")
    holders = await index.reader.holders_of(POOL, [1000, 4, 5, 2**64 - 1, *range(2000, 2600)])
    assert holders[1000] == tuple(slot for slot in slots if slot != slots[3])
    assert (holders[4], holders[5], holders[2**64 - 1]) == ((), (slots[4],), (slots[0],))
    assert all(holders[block] == () for block in range(2000, 2600))
    assert await index.reader.holders_of(POOL, []) == {}


# Leases


async def test_a_worker_that_misses_its_lease_is_in_no_answer_and_may_resume(index):
    slot = index.open(lease_ms=150)
    index.store(slot, [1])
    assert await index.overlap([1]) == {slot: 1}
    await index.elapse(150)
    match = await index.reader.match(POOL, [1])
    assert (match.states, match.overlap_blocks) == ((), {})
    assert (await index.reader.workers(POOL))[1] == []
    assert not (await index.reserve("a", slot)).charged
    assert index.writer.heartbeat(POOL, slot, "one", BUSY, lease_ms=LONG_MS).num_blocks == 1
    assert await index.overlap([1]) == {slot: 1}
    assert (await index.reader.match(POOL, [])).states[0].load == BUSY


async def test_a_worker_silent_for_ten_leases_is_swept(index):
    slot = index.open(lease_ms=50)
    kept = index.open(1)
    for each in (slot, kept):
        index.store(each, [1])
    await index.elapse(100)
    await index.sweep_all()
    assert index.store(slot, [2], sequence=2).num_blocks == 2
    await index.elapse(400)
    await index.sweep_all()
    with pytest.raises(SlotLost):
        index.writer.heartbeat(POOL, slot, "one", BUSY, lease_ms=50)
    assert await index.overlap([1]) == {kept: 1}


# Fencing and sweeping


async def test_a_restart_begins_with_an_empty_slot(index):
    former = index.open(0, "one")
    index.store(former, [1, 2])
    fresh = index.open(0, "two", takeover=True)
    assert await index.overlap([1, 2]) == {}
    assert index.store(fresh, [1], "two") == SlotState(num_blocks=1, digest=1)
    assert await index.overlap([1, 2]) == {fresh: 1}


async def test_the_same_incarnation_resyncs_into_a_fresh_slot(index):
    former = index.open()
    index.store(former, [1, 2])
    fresh = index.open()
    assert fresh != former
    with pytest.raises(SlotLost):
        index.store(former, [3], sequence=2)
    assert index.store(fresh, [2]).num_blocks == 1
    assert await index.reader.holders(POOL, 1) == []


async def test_closing_is_idempotent(index):
    slot = index.open()
    index.store(slot, [1])
    index.writer.close_slot(POOL, slot, "one")
    index.writer.close_slot(POOL, slot, "one")
    assert (await index.reader.match(POOL, [1])).states == ()


async def test_slots_are_reused_only_when_swept(index):
    first = index.open(0)
    index.store(first, [1, 2, 3])
    index.writer.close_slot(POOL, first, "one")
    second = index.open(1)
    assert second != first
    await index.sweep_all()
    reused = index.open(2)
    assert reused == first
    assert await index.overlap([1, 2, 3]) == {}
    assert index.store(reused, [1]) == SlotState(num_blocks=1, digest=1)


async def test_sweeping_empties_a_pool(index):
    slot = index.open()
    index.store(slot, range(1000))
    index.writer.close_slot(POOL, slot, "one")
    assert await index.reader.pools() == [POOL]
    await index.sweep_all()
    assert await index.reader.pools() == []


async def test_a_slot_that_dies_during_a_sweep_is_swept_as_well(index):
    rng = random.Random(1)
    hashes = [rng.getrandbits(64) for _ in range(1000)]
    doomed = [index.open(number) for number in range(3)]
    kept = index.open(3)
    for slot in (*doomed, kept):
        index.store(slot, hashes)
    for slot in doomed:
        index.writer.close_slot(POOL, slot, "one")
        await index.reader.sweep(POOL, max_buckets=1)
    await index.sweep_all()
    assert [index.open(number) for number in range(4, 7)] == doomed
    assert await index.overlap(hashes) == {kept: len(hashes)}


# Log


def kinds(events) -> list[tuple[str, int, str]]:
    return [(event.kind, event.slot, event.detail) for event in events]


async def test_the_log_tells_what_happened_to_slots(index):
    slot = index.open(0, "one")
    resync = index.open(0, "one", because=Opening(EventKind.DRIFT, "3 blocks, not 2"))
    taken = index.open(0, "two", takeover=True)
    index.writer.close_slot(POOL, taken, "two")
    events = await index.reader.events(POOL, max_events=100)
    assert kinds(events) == [
        ("opened", slot, ""),
        ("fenced", slot, "it has a fresh slot"),
        ("drift", resync, "3 blocks, not 2"),
        ("fenced", resync, "another process took its place"),
        ("opened", taken, ""),
        ("closed", taken, ""),
    ]
    assert {event.worker_id for event in events} == {worker(0).worker_id}
    assert [event.incarnation for event in events] == ["one"] * 4 + ["two"] * 2
    assert [event.at_ms for event in events] == sorted(event.at_ms for event in events)
    await index.sweep_all()
    swept = await index.reader.events(POOL, after=events[-1].event_id, max_events=100)
    assert sorted(kinds(swept)) == [("swept", each, "") for each in sorted({slot, resync, taken})]


async def test_the_log_tells_of_a_silent_worker(index):
    slot = index.open(lease_ms=50)
    await index.elapse(500)
    await index.sweep_all()
    events = await index.reader.events(POOL, max_events=100)
    assert kinds(events)[1:] == [("fenced", slot, "silent for 10 leases"), ("swept", slot, "")]


async def test_evicted_blocks_are_remembered_with_their_time(index):
    slot, other = index.open(0), index.open(1)
    index.store(slot, [1, 2, 3])
    index.writer.apply(POOL, slot, "one", Batch(sequence=2, stored=(4,), removed=(1, 2**64 - 1)))
    batch = Batch(sequence=3, removed=(2,))
    for _ in range(2):  # a repeated batch is one removal
        index.writer.apply(POOL, slot, "one", batch)
    index.writer.apply(POOL, other, "one", Batch(sequence=1, removed=(2,)))
    first, *later = await index.reader.removals(POOL, max_events=100)
    assert (first.slot, first.incarnation, first.blocks) == (slot, "one", (1, 2**64 - 1))
    assert [(each.slot, each.blocks) for each in later] == [(slot, (2,)), (other, (2,))]
    assert first.at_ms <= later[0].at_ms


@pytest.mark.parametrize("what", ["events", "removals"])
async def test_a_log_is_read_from_its_end_and_on_from_any_place(index, what):
    read = getattr(index.reader, what)
    assert await read(POOL, max_events=10) == []
    for number in range(7):
        slot = index.open(number)
        index.writer.apply(POOL, slot, "one", Batch(sequence=1, removed=(number,)))
    lines = await read(POOL, max_events=100)
    assert len(lines) == 7
    assert len({each.event_id for each in lines}) == 7
    assert await read(POOL, max_events=3) == lines[4:]
    assert await read(POOL, after=lines[1].event_id, max_events=3) == lines[2:5]
    assert await read(POOL, after=lines[-1].event_id, max_events=3) == []
    assert await read(POOL, after=str(lines[0].at_ms - 1), max_events=100) == lines


# Reservations


async def test_a_reservation_charges_until_it_is_settled(index):
    slot = index.open()
    assert (await index.reserve("a", slot, 100)).charged
    assert (await index.reserve("b", slot, 20)).charged
    assert await index.charged(slot) == (120, 2)
    [listed] = (await index.reader.workers(POOL))[1]
    assert (listed.charged_tokens, listed.charged_requests) == (120, 2)
    assert await index.reader.settle(POOL, "a")
    assert not await index.reader.settle(POOL, "a")
    assert not await index.reader.settle(POOL, "unknown")
    assert await index.charged(slot) == (20, 1)


async def test_nothing_is_charged_when_the_backlog_has_grown(index):
    slot, other = index.open(0), index.open(1)
    index.writer.heartbeat(POOL, slot, "one", BUSY, lease_ms=LONG_MS)
    assert (await index.reserve("a", slot, 100, seen_backlog_tokens=300)).charged
    refused = await index.reserve("b", slot, 100, seen_backlog_tokens=300)
    assert not refused.charged
    assert [(s.slot, s.backlog_tokens) for s in refused.states] == [(slot, 400), (other, 0)]
    assert (await index.reserve("b", slot, 100, seen_backlog_tokens=400)).charged
    assert (await index.reserve("c", slot, 100, seen_backlog_tokens=None)).charged


SAMPLE = Sample((1, 4), (BlockHash(11), BlockHash(2**64 - 1)))


async def pending(index) -> tuple[Pending, ...]:
    return (await index.reader.match(POOL, [])).pending


async def test_what_is_to_be_computed_is_told_until_it_is_settled(index):
    slot, other = index.open(0), index.open(1)
    await index.reserve("a", slot, 100, sample=SAMPLE, pending_ms=LONG_MS)
    await index.reserve("b", other, 100)
    assert await pending(index) == (Pending(slot, SAMPLE),)
    refused = await index.reserve("c", slot, 100, seen_backlog_tokens=0, sample=SAMPLE, pending_ms=LONG_MS)
    assert refused.pending == (Pending(slot, SAMPLE),)
    # An engine that has accepted the request has not computed it.
    index.writer.heartbeat(POOL, slot, "one", BUSY, lease_ms=LONG_MS, accepted=["a"])
    assert await index.charged(slot) == (0, 0)
    assert await pending(index) == (Pending(slot, SAMPLE),)
    await index.reader.settle(POOL, "a")
    assert await pending(index) == ()


async def test_what_is_to_be_computed_goes_with_its_time_its_decision_and_its_worker(index):
    slot, other = index.open(0), index.open(1)
    await index.reserve("short", slot, 1, sample=SAMPLE, pending_ms=100)
    await index.reserve("moves", slot, 1, sample=SAMPLE, pending_ms=LONG_MS)
    await index.reserve("moves", other, 1, sample=SAMPLE, pending_ms=LONG_MS)
    await index.elapse(100)
    assert await pending(index) == (Pending(other, SAMPLE),)
    index.writer.close_slot(POOL, other, "one")
    assert await pending(index) == ()


async def test_pending_prefixes_are_bounded_and_their_requests_are_charged_all_the_same(index):
    slot = index.open()
    for number in range(MOST_PENDING + 3):
        await index.reserve(f"d{number}", slot, 1, sample=SAMPLE, pending_ms=100)
    assert len(await pending(index)) <= MOST_PENDING
    assert await index.charged(slot) == (MOST_PENDING + 3, MOST_PENDING + 3)
    await index.elapse(100)
    await index.reserve("next", slot, 1, sample=SAMPLE, pending_ms=LONG_MS)
    assert await pending(index) == (Pending(slot, SAMPLE),)


async def test_a_dead_slot_cannot_be_charged(index):
    slot, other = index.open(0), index.open(1)
    index.writer.close_slot(POOL, slot, "one")
    refused = await index.reserve("a", slot)
    assert not refused.charged
    assert [state.slot for state in refused.states] == [other]


async def test_a_decision_has_one_reservation(index):
    slot, other = index.open(0), index.open(1)
    await index.reserve("a", slot, 100)
    await index.reserve("a", other, 30)
    assert await index.charged(slot) == (0, 0)
    assert await index.charged(other) == (30, 1)


async def test_an_expired_reservation_stops_counting_by_itself(index):
    slot = index.open()
    await index.reserve("short", slot, 100, ttl_ms=150)
    await index.reserve("long", slot, 7)
    await index.elapse(150)
    assert await index.charged(slot) == (7, 1)
    assert not await index.reader.settle(POOL, "short")
    assert await index.charged(slot) == (7, 1)
    assert (await index.reserve("next", slot, 1, seen_backlog_tokens=7)).charged
    assert await index.charged(slot) == (8, 2)


async def test_reservations_that_nobody_settles_are_counted_for_good(index):
    slot = index.open()
    assert await index.reader.expired_reservations(POOL) == 0
    for name in ("settled", "named", "first", "second"):
        await index.reserve(name, slot, ttl_ms=150)
    assert await index.reader.settle(POOL, "settled")
    index.writer.heartbeat(POOL, slot, "one", BUSY, lease_ms=LONG_MS, accepted=["named"])
    await index.elapse(150)
    await index.sweep_all()
    assert await index.reader.expired_reservations(POOL) == 2
    await index.reserve("third", slot, ttl_ms=150)
    await index.elapse(150)
    await index.reserve("fourth", slot)
    for name in ("first", "third"):
        assert not await index.reader.settle(POOL, name)
    assert await index.reader.expired_reservations(POOL) == 3


async def test_the_engine_settles_what_it_names_exactly_once(index):
    slot, other = index.open(0), index.open(1)
    for decision_id, target in (("a", slot), ("b", slot), ("c", other)):
        await index.reserve(decision_id, target, 100)
    for _ in range(2):
        index.writer.heartbeat(POOL, slot, "one", BUSY, lease_ms=LONG_MS, accepted=["a", "c", "unknown"])
        assert await index.charged(slot) == (100, 1)
        assert await index.charged(other) == (0, 0)
    assert not await index.reader.settle(POOL, "a")


async def test_an_engine_that_names_nothing_settles_by_age(index):
    slot, other = index.open(0), index.open(1)
    await index.reserve("old", slot)
    await index.reserve("elsewhere", other)
    await index.elapse(200)
    await index.reserve("young", slot, 5)
    index.writer.heartbeat(POOL, slot, "one", Load(), lease_ms=LONG_MS, settle_older_than_ms=150)
    assert await index.charged(slot) == (5, 1)
    assert await index.charged(other) == (100, 1)


async def test_reservations_of_a_former_owner_do_not_touch_the_slot_s_next(index):
    slot = index.open(0)
    await index.reserve("former", slot, 100)
    index.writer.close_slot(POOL, slot, "one")
    await index.sweep_all()
    assert index.open(1) == slot
    await index.reserve("present", slot, 30)
    index.writer.heartbeat(POOL, slot, "one", Load(), lease_ms=LONG_MS, accepted=["former"])
    assert await index.charged(slot) == (30, 1)


# Both alike


@pytest.mark.parametrize("seed", range(6))
async def test_redis_and_memory_agree_on_any_history(redis_url, seed):
    """Histories without holes: a worker stores a run of a shared chain and removes from its end."""
    rng = random.Random(seed)
    chains = [[rng.getrandbits(64) for _ in range(400)] for _ in range(3)]
    async with redis_index(redis_url) as real:
        both = (memory_index(), real)
        slots: dict[int, int] = {}
        sequences: dict[int, int] = {}
        depths: dict[int, list[int]] = {}

        def apply(number: int, **blocks) -> None:
            sequences[number] += 1
            batch = Batch(sequence=sequences[number], **blocks)
            states = [i.writer.apply(POOL, slots[number], "one", batch) for i in both]
            assert states[0] == states[1]

        for _ in range(300):
            number, chain = rng.randrange(12), rng.randrange(3)
            action = rng.choice(
                ["store"] * 6 + ["remove"] * 3 + ["open", "close", "sweep", "reserve", "settle"]
            )
            if action == "open" or number not in slots:
                opened = [i.open(number) for i in both]
                slots[number], sequences[number], depths[number] = opened[1], 0, [0] * 3
                assert opened[0] == opened[1]
            elif action == "store":
                depth = depths[number][chain]
                end = min(400, depth + rng.randrange(MAX_BATCH))
                apply(number, stored=tuple(chains[chain][depth:end]))
                depths[number][chain] = end
            elif action == "remove":
                depth = depths[number][chain]
                start = max(0, depth - rng.randrange(MAX_BATCH))
                apply(number, removed=tuple(chains[chain][start:depth]))
                depths[number][chain] = start
            elif action == "close":
                for i in both:
                    i.writer.close_slot(POOL, slots[number], "one")
                del slots[number]
            elif action == "sweep":
                for i in both:
                    await i.sweep_all(rng.randrange(1, 20))
            elif action == "reserve":
                seen = rng.choice([None, 0, 100, 200])
                answers = [
                    await i.reserve(f"d{number}", slots[number], 50, seen_backlog_tokens=seen) for i in both
                ]
                assert answers[0] == answers[1]
            else:
                answers = [await i.reader.settle(POOL, f"d{number}") for i in both]
                assert answers[0] == answers[1]
            short = chains[chain][: rng.randrange(256)]
            exact, found = [await i.reader.match(POOL, short) for i in both]
            assert (found.overlap_blocks, found.states) == (exact.overlap_blocks, exact.states)


def store(name: str, teller: str = "") -> Store:
    return Store(
        name=name, teller=teller, tier=Tier.OBJECT, model="m", chunk_size=256, incarnation=f"{name} {teller}"
    )


async def test_stores_have_pools_of_their_own(index: Index):
    listing, events = store("s3://b"), store("s3://b", "node")
    pool = listing.pool
    first, second = (index.writer.open_slot(each, lease_ms=LONG_MS) for each in (listing, events))
    worker_slot = index.open()
    index.writer.apply(pool, first, listing.incarnation, Batch(sequence=1, stored=(1, 2)))
    index.writer.apply(pool, second, events.incarnation, Batch(sequence=1, stored=(2, 3)))
    _, stores = await index.reader.stores(pool)
    assert [(each.store, each.slot, each.num_indexed_blocks) for each in stores] == [
        (listing, first, 2),
        (events, second, 2),
    ]
    assert [each.lease_ms for each in stores] == [LONG_MS, LONG_MS]
    speed = StoreSpeed(num_loads=3, gb_per_s=0.1 + 0.2, latency_ms=12.5)
    index.writer.report_costs(pool, second, events.incarnation, speed)
    assert [each.speed for each in (await index.reader.stores(pool))[1]] == [None, speed]
    found = await index.reader.holders_of(pool, [BlockHash(each) for each in (1, 2, 3, 4)])
    assert found == {1: (first,), 2: (first, second), 3: (second,), 4: ()}
    assert await index.reader.chunk_pools() == [pool]
    assert await index.reader.pools() == [POOL]
    assert [each.slot for each in (await index.reader.workers(POOL))[1]] == [worker_slot]
    index.writer.close_slot(pool, first, listing.incarnation)
    assert [each.slot for each in (await index.reader.stores(pool))[1]] == [second]


async def test_a_listing_has_one_teller_at_a_time(index: Index):
    index.writer.open_slot(store("s3://b"), lease_ms=LONG_MS)
    other = Store(name="s3://b", tier=Tier.OBJECT, model="m", chunk_size=256, incarnation="other")
    with pytest.raises(WorkerConflict):
        index.writer.open_slot(other, lease_ms=LONG_MS)
