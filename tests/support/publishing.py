"""A scripted engine whose publisher writes to a real Redis, and what a test asks about the two."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import reduce
from operator import xor

from prometheus_client import REGISTRY

from kvindex.blocks import Pool
from kvindex.config import IndexConfig, PublisherConfig, index_config
from kvindex.contents import EngineContents
from kvindex.errors import IndexUnavailable, KvIndexError
from kvindex.publisher import LoadReport, Publisher
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Load, SlotPart, SlotState, Worker
from tests.support.scripted_engine import ScriptedSource, make_worker

PATIENT_S = 10.0


class CountingWriter(RedisIndexWriter):
    """Counts what a publisher does, and notes what each heartbeat was answered: the state, or the error."""

    def __init__(self, config: PublisherConfig) -> None:
        super().__init__(config)
        self.num_opened = 0
        self.opened_at: list[tuple[int, int]] = []  # heartbeats and audits before each slot
        self.answers: list[SlotState | KvIndexError] = []
        self.num_heartbeats = 0
        self.num_audits = 0

    def open_slot(self, worker: Worker, **options: int | bool) -> int:
        slot = super().open_slot(worker, **options)  # type: ignore[arg-type]
        self.opened_at.append((self.num_heartbeats, self.num_audits))
        self.num_opened += 1
        return slot

    def heartbeat(self, *args: object, **options: object) -> SlotState:
        try:
            state = super().heartbeat(*args, **options)  # type: ignore[arg-type]
        except KvIndexError as error:
            self.answers.append(error)
            raise
        self.answers.append(state)
        self.num_heartbeats += 1
        return state

    def blocks_of(self, pool: Pool, slot: int, incarnation: str, *, turn: int) -> SlotPart:
        part = super().blocks_of(pool, slot, incarnation, turn=turn)
        self.num_audits += 1
        return part


class Published:
    """One engine with its publisher.

    Args:
        url: the Redis it writes to.
        endpoint: of the engine.
        options: settings of the publisher that differ from short ones.
    """

    def __init__(self, url: str, endpoint: str = "127.0.0.1:8000", **options: float) -> None:
        known = {"redis_url": url, "lease_ms": 2_000, "heartbeat_ms": 100, "redis_timeout_s": PATIENT_S}
        self.config = PublisherConfig(**(known | options))
        self.worker = make_worker(endpoint)
        self.source = ScriptedSource()
        self.writer = CountingWriter(self.config)
        self.publisher = Publisher(
            self.worker,
            self.config,
            self.writer,
            EngineContents(self.worker, self.source),
            lambda: LoadReport(Load()),
        )
        self.publisher.start()

    def close(self) -> None:
        self.publisher.stop()


class Impatient(Published):
    """One whose Redis is away at times: neither the publisher nor a question waits long for it."""

    def __init__(self, url: str) -> None:
        super().__init__(url, lease_ms=1_000, redis_timeout_s=0.3)
        self.reader = RedisIndexReader(index_config(url))

    @property
    def num_unwritten(self) -> int:
        """How many changes the publisher keeps for the index."""
        label = {"worker": self.worker.worker_id}
        return int(REGISTRY.get_sample_value("kvlane_publisher_unwritten_changes", label) or 0)

    async def holds(self, blocks: Collection[int]) -> bool:
        """Whether the index holds exactly this; not while it does not answer."""
        try:
            _, workers = await self.reader.workers(self.worker.pool)
        except IndexUnavailable:
            return False
        return [(each.num_indexed_blocks, each.digest) for each in workers] == [summary(blocks)]

    async def holds_each(self, blocks: Collection[int]) -> bool:
        """Whether every block is found as well: counts and digests are kept apart from the blocks."""
        try:
            holders = [await self.reader.holders(self.worker.pool, block) for block in blocks]
        except IndexUnavailable:
            return False
        return all(len(each) == 1 for each in holders) and await self.holds(blocks)


async def slots_of(url: str, pool: Pool) -> dict[str, int]:
    """Return the live slots by incarnation."""
    reader = RedisIndexReader(IndexConfig(redis_url=url, redis_timeout_s=PATIENT_S))
    try:
        return {each.worker.incarnation: each.slot for each in (await reader.workers(pool))[1]}
    finally:
        await reader.close()


async def index_is(url: str, pool: Pool, expected: dict[str, Collection[int]]) -> bool:
    """Say whether the index holds exactly these blocks for exactly these live incarnations.

    Counts, digests and entries have to agree on it.
    """
    reader = RedisIndexReader(IndexConfig(redis_url=url, redis_timeout_s=PATIENT_S))
    try:
        _, workers = await reader.workers(pool)
        held: dict[int, set[int]] = {each.slot: set() for each in workers}
        first_bucket: int | None = 0
        while first_bucket is not None:
            entries = await reader.entries(pool, first_bucket=first_bucket)
            for block, slots in entries.holders.items():
                for slot in slots:
                    held.setdefault(slot, set()).add(block)
            first_bucket = entries.next_bucket
    finally:
        await reader.close()
    found = {
        each.worker.incarnation: (held[each.slot], each.num_indexed_blocks, each.digest) for each in workers
    }
    return found == {name: (set(blocks), *summary(blocks)) for name, blocks in expected.items()}


def summary(blocks: Iterable[int]) -> tuple[int, str]:
    """Return count and digest as the index lists them."""
    state = state_of(blocks)
    return state.num_blocks, f"{state.digest:016x}"


def state_of(blocks: Iterable[int]) -> SlotState:
    """Return what a slot with these blocks answers."""
    distinct = set(blocks)
    return SlotState(num_blocks=len(distinct), digest=reduce(xor, distinct, 0))
