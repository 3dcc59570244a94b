"""A scripted engine whose publisher writes to a real Redis."""

from collections.abc import Sequence
from functools import reduce
from operator import xor

from prometheus_client import REGISTRY

from kvindex.config import PublisherConfig, index_config
from kvindex.errors import IndexUnavailable
from kvindex.publisher import LoadReport, Publisher
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Load, SlotState, Worker
from tests.support.scripted_engine import ScriptedSource, make_worker


class _NotingWriter(RedisIndexWriter):
    """Notes what each heartbeat was answered: the slot's state, or the error."""

    def __init__(self, config: PublisherConfig) -> None:
        super().__init__(config)
        self.answers: list[SlotState | Exception] = []

    def heartbeat(self, *args: object, **kwargs: object) -> SlotState:
        try:
            state = super().heartbeat(*args, **kwargs)
        except Exception as error:
            self.answers.append(error)
            raise
        self.answers.append(state)
        return state


def expected_state(hashes: Sequence[int]) -> SlotState:
    return SlotState(num_blocks=len(hashes), digest=reduce(xor, hashes, 0))


class Published:
    """A scripted engine whose publisher writes to the Redis of `url`, with a heartbeat every 100 ms."""

    def __init__(self, url: str) -> None:
        self.config = PublisherConfig(redis_url=url, lease_ms=1_000, heartbeat_ms=100, redis_timeout_s=0.3)
        self.worker: Worker = make_worker()
        self.source = ScriptedSource()
        self.writer = _NotingWriter(self.config)
        self.reader = RedisIndexReader(index_config(url))
        self._publisher = Publisher(
            self.worker, self.config, self.writer, self.source, lambda: LoadReport(Load())
        )
        self._publisher.start()

    @property
    def num_unwritten(self) -> int:
        """How many changes the publisher keeps for the index."""
        label = {"worker": self.worker.worker_id}
        return int(REGISTRY.get_sample_value("kvlane_publisher_unwritten_changes", label) or 0)

    async def holds(self, hashes: Sequence[int]) -> bool:
        """Whether the index holds exactly this; not while it does not answer."""
        try:
            _, workers = await self.reader.workers(self.worker.pool)
        except IndexUnavailable:
            return False
        state = expected_state(hashes)
        expected = (state.num_blocks, f"{state.digest:016x}")
        return [(each.num_indexed_blocks, each.digest) for each in workers] == [expected]

    async def holds_each(self, hashes: Sequence[int]) -> bool:
        """Whether every block is found as well: counts and digests are kept apart from the blocks."""
        try:
            holders = [await self.reader.holders(self.worker.pool, block) for block in hashes]
        except IndexUnavailable:
            return False
        return all(len(each) == 1 for each in holders) and await self.holds(hashes)

    def close(self) -> None:
        self._publisher.stop()
