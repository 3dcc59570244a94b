"""Any history of publishers and of what may go wrong with the index, against a set of blocks an engine.

The publishers are the real outbox on a real index, driven step by step. `pytest --hypothesis-profile long`
searches for minutes.
"""

from __future__ import annotations

import asyncio
import random
import struct
from dataclasses import dataclass, field
from functools import reduce
from operator import xor

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from kvindex.config import IndexConfig
from kvindex.errors import SlotLost
from kvindex.index import IndexReader, IndexWriter
from kvindex.keys import LIVE_ROW, bucket_key, directory
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.outbox import Outbox
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Batch, Load, SlotState, Worker
from tests.support.oracle import check_overlap
from tests.support.workers import make_worker

LEASE_MS = 3_600_000
RANDOM = random.Random(0)
CHAINS = [[RANDOM.getrandbits(64) for _ in range(num_blocks)] for num_blocks in (5, 60, 600)]
ENGINES = st.integers(0, 3)
CHAIN = st.sampled_from(CHAINS)
POOL = make_worker().pool


@dataclass
class Publisher:
    """An engine with its publisher, which does one thing at a time."""

    worker: Worker
    blocks: set[int] = field(default_factory=set)
    outbox: Outbox = field(default_factory=Outbox)
    slot: int | None = None
    last: Batch | None = None
    turn: int = 0

    def change(self, stored: set[int], removed: set[int]) -> None:
        self.outbox.change(stored=stored - self.blocks)
        self.blocks |= stored
        self.outbox.change(removed=removed & self.blocks)
        self.blocks -= removed

    def start_over(self) -> None:
        self.slot, self.last, self.outbox = None, None, Outbox(self.blocks)


class Backend:
    """An index and what can be done to it behind its back."""

    writer: IndexWriter
    reader: IndexReader

    def flush(self) -> None: ...

    def expire(self, slot: int) -> None: ...

    def lose(self, slot: int, block: int) -> None: ...

    def check_integrity(self) -> None: ...

    def close(self) -> None: ...


class InMemory(Backend):
    def __init__(self) -> None:
        self.index = MemoryIndex()
        self.writer, self.reader = MemoryIndexWriter(self.index), MemoryIndexReader(self.index)

    def flush(self) -> None:
        self.index.pool(POOL).slots.clear()
        self.index.pool(POOL).dead.clear()

    def expire(self, slot: int) -> None:
        if slot in self.index.pool(POOL).slots:
            self.index.pool(POOL).slots[slot].expires_ms = 1

    def lose(self, slot: int, block: int) -> None:
        if slot in self.index.pool(POOL).slots:
            self.index.pool(POOL).slots[slot].blocks.discard(block)


class InRedis(Backend):
    def __init__(self, url: str) -> None:
        config = IndexConfig(redis_url=url, redis_timeout_s=30)
        self.client = redis.Redis.from_url(url)
        self.writer, self.reader = RedisIndexWriter(config), RedisIndexReader(config)
        self.was_damaged = False
        self.flush()

    def flush(self) -> None:
        self.client.flushall()
        self.was_damaged = False

    def expire(self, slot: int) -> None:
        at = slot * LIVE_ROW.size
        if any(self.client.getrange(f"{directory(POOL)}:live", at, at + 7)):
            self.client.setrange(f"{directory(POOL)}:live", at, struct.pack("<d", 1))

    def lose(self, slot: int, block: int) -> None:
        for key in self.client.scan_iter(match=directory(POOL) + ":b:*", count=1_000):
            self.was_damaged |= bool(self.client.hdel(key, block.to_bytes(8, "little")))

    def check_integrity(self) -> None:
        """Every entry lies in its bucket, the buckets are those that there should be, and counted."""
        num_buckets, num_entries = self.client.hmget(directory(POOL), "buckets", "entries")
        known = {bucket_key(POOL, bucket): bucket for bucket in range(int(num_buckets or 0))}
        found = 0
        for key in self.client.scan_iter(match=directory(POOL) + ":b:*", count=1_000):
            for block in self.client.hkeys(key):
                assert known[key] == bucket_of(int.from_bytes(block, "little"), len(known))
                found += 1
        assert self.was_damaged or found == int(num_entries or 0)

    def close(self) -> None:
        self.client.close()
        self.writer.close()


def bucket_of(block: int, num_buckets: int) -> int:
    power = 1 << (num_buckets.bit_length() - 1)
    bucket = block % (2 * power)
    return bucket if bucket < num_buckets else bucket - power


class Histories(RuleBasedStateMachine):
    """Rules are what may happen; `settle` is what two heartbeats do."""

    def __init__(self, backend: Backend, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.backend = backend
        self.loop = loop
        self.lives = 0
        self.engines = [self.fresh(number) for number in range(4)]

    def fresh(self, number: int) -> Publisher:
        self.lives += 1
        return Publisher(make_worker(f"10.0.0.{number}:8000", incarnation=f"life {self.lives}"))

    # What engines do

    @initialize(depths=st.lists(st.integers(0, 600), min_size=4, max_size=4))
    def begin(self, depths: list[int]) -> None:
        for engine, depth in zip(self.engines, depths, strict=True):
            engine.change(set(CHAINS[-1][:depth]), set())

    @rule(number=ENGINES, chain=CHAIN, start=st.sampled_from([0, 0, 0, 40, 300]), length=st.integers(1, 300))
    def store(self, number: int, chain: list[int], start: int, length: int) -> None:
        self.engines[number].change(set(chain[start : start + length]), set())

    @rule(number=ENGINES, chain=CHAIN, start=st.integers(0, 599), length=st.integers(1, 600))
    def remove(self, number: int, chain: list[int], start: int, length: int) -> None:
        self.engines[number].change(set(), set(chain[start : start + length]))

    # One rule for all that empties a cache, or most runs would be about nothing.
    @rule(number=ENGINES, what=st.sampled_from(["clear", "die_and_return", "leave"]))
    def empty(self, number: int, what: str) -> None:
        getattr(self, what)(number)

    def clear(self, number: int) -> None:
        self.engines[number].blocks.clear()
        self.engines[number].start_over()

    def die_and_return(self, number: int) -> None:
        if (slot := self.engines[number].slot) is not None:
            self.backend.expire(slot)
        self.engines[number] = self.fresh(number)

    def leave(self, number: int) -> None:
        engine = self.engines[number]
        if engine.slot is not None:
            self.backend.writer.close_slot(POOL, engine.slot, engine.worker.incarnation)
        self.engines[number] = self.fresh(number)

    # What publishers do

    @rule(number=ENGINES, num_batches=st.integers(1, 3))
    def write(self, number: int, num_batches: int) -> None:
        engine = self.engines[number]
        try:
            for _ in range(num_batches):
                self.write_once(engine)
        except SlotLost:
            engine.start_over()

    def write_once(self, engine: Publisher) -> None:
        if engine.slot is None:
            engine.slot = self.backend.writer.open_slot(engine.worker, lease_ms=LEASE_MS, takeover=True)
        if batches := engine.outbox.next_batches():
            state = self.apply(engine, *batches)
            engine.outbox.confirm()
            engine.last = batches[-1]
            if state != engine.outbox.told:
                raise SlotLost("drift")

    def apply(self, engine: Publisher, *batches: Batch) -> SlotState:
        assert engine.slot is not None
        return self.backend.writer.apply(POOL, engine.slot, engine.worker.incarnation, *batches)

    @rule(number=ENGINES)
    def lose_an_answer(self, number: int) -> None:
        engine = self.engines[number]
        if engine.slot is not None and (batches := engine.outbox.next_batches()):
            try:
                self.apply(engine, *batches)
            except SlotLost:
                engine.start_over()

    @rule(number=ENGINES)
    def deliver_a_batch_again(self, number: int) -> None:
        engine = self.engines[number]
        if engine.slot is not None and engine.last is not None and not engine.outbox.is_repeating:
            try:
                state = self.apply(engine, engine.last)
            except SlotLost:
                engine.start_over()
            else:
                assert state.num_blocks <= len(engine.blocks) + len(engine.outbox)

    @rule(number=ENGINES, ahead=st.integers(2, 9))
    def deliver_a_batch_too_early(self, number: int, ahead: int) -> None:
        engine = self.engines[number]
        if engine.slot is not None and not engine.outbox.is_repeating and engine.last is not None:
            early = Batch(sequence=engine.last.sequence + ahead, stored=(1, 2, 3))
            with pytest.raises(SlotLost):
                self.apply(engine, early)

    @rule(number=ENGINES)
    def beat(self, number: int) -> None:
        engine = self.engines[number]
        try:
            self.write_once(engine)
            self.beat_once(engine)
        except SlotLost:
            engine.start_over()

    def beat_once(self, engine: Publisher) -> None:
        """Renew the lease and compare; while a batch's fate is unknown nothing can be compared."""
        assert engine.slot is not None
        name = engine.worker.incarnation
        state = self.backend.writer.heartbeat(POOL, engine.slot, name, Load(), lease_ms=LEASE_MS)
        found = self.backend.writer.blocks_of(POOL, engine.slot, name, turn=engine.turn)
        engine.turn += 1
        if state != engine.outbox.told or any(engine.outbox.differences(found)):
            raise SlotLost("drift")

    # What goes wrong

    @rule(number=ENGINES)
    def fall_silent(self, number: int) -> None:
        if (slot := self.engines[number].slot) is not None:
            self.backend.expire(slot)

    @rule()
    def flush(self) -> None:
        self.backend.flush()

    @rule(number=ENGINES, which=st.integers(0, 1_000))
    def lose_an_entry(self, number: int, which: int) -> None:
        engine = self.engines[number]
        self.settle_one(engine)
        if engine.slot is not None and engine.blocks:
            blocks = sorted(engine.blocks)
            self.backend.lose(engine.slot, blocks[which % len(blocks)])
        self.settle()

    # What others do

    @rule(max_buckets=st.integers(1, 40))
    def sweep(self, max_buckets: int) -> None:
        self.loop.run_until_complete(self.backend.reader.sweep(POOL, max_buckets=max_buckets))

    # What must then be so

    @rule()
    def settle(self) -> None:
        """The publishers come to rest: two heartbeats each, and as many more as there are parts to audit."""
        for engine in self.engines:
            self.settle_one(engine)
        self.check()

    def settle_one(self, engine: Publisher) -> None:
        num_quiet = 0
        while num_quiet < 8:
            try:
                self.write_once(engine)
                while len(engine.outbox):
                    self.write_once(engine)
                self.beat_once(engine)
                num_quiet += 1
            except SlotLost:
                engine.start_over()
                num_quiet = 0

    def check(self) -> None:
        _, workers = self.loop.run_until_complete(self.backend.reader.workers(POOL))
        listed = {w.worker.incarnation: (w.slot, w.num_indexed_blocks, w.digest) for w in workers}
        expected = {
            engine.worker.incarnation: (
                engine.slot,
                len(engine.blocks),
                f"{reduce(xor, engine.blocks, 0):016x}",
            )
            for engine in self.engines
        }
        assert listed == expected
        assert self.scan() == {
            block: tuple(sorted(e.slot for e in self.engines if e.slot is not None and block in e.blocks))
            for block in set().union(*(engine.blocks for engine in self.engines))
        }
        for chain in CHAINS:
            match = self.loop.run_until_complete(self.backend.reader.match(POOL, chain))
            for engine in self.engines:
                assert engine.slot is not None
                check_overlap(chain, engine.blocks, match.overlap_blocks.get(engine.slot, 0), match.stride)
        self.backend.check_integrity()

    def scan(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        first_bucket: int | None = 0
        while first_bucket is not None:
            slice_of_it = self.backend.reader.entries(POOL, first_bucket=first_bucket)
            entries = self.loop.run_until_complete(slice_of_it)
            found |= entries.holders
            first_bucket = entries.next_bucket
        return found

    def teardown(self) -> None:
        self.settle()
        self.loop.run_until_complete(self.backend.reader.close())
        self.backend.close()


def search(backend: object, num_examples: int) -> None:
    loop = asyncio.new_event_loop()
    limits = settings(
        max_examples=num_examples,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(lambda: Histories(backend(), loop), settings=limits)  # type: ignore[operator]
    finally:
        loop.close()


def test_any_history_in_memory():
    search(InMemory, settings.default.max_examples // 5)


def test_any_history_in_redis(redis_url: str):
    search(lambda: InRedis(redis_url), settings.default.max_examples // 12)
