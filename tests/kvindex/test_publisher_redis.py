"""The publisher on a real Redis that loses what it was told."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import reduce
from operator import xor

import redis

from kvindex.config import PublisherConfig, index_config
from kvindex.embedded import embedded_redis
from kvindex.publisher import LoadReport, Publisher
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Load, Worker
from tests.support.ports import free_ports
from tests.support.scripted_engine import ScriptedSource, make_worker, prompt
from tests.support.waiting import eventually


class Published:
    """A scripted engine whose publisher writes to the Redis of `url`."""

    def __init__(self, url: str) -> None:
        config = PublisherConfig(redis_url=url, lease_ms=1_000, heartbeat_ms=100, redis_timeout_s=0.3)
        self.worker: Worker = make_worker()
        self.source = ScriptedSource()
        self._reader = RedisIndexReader(index_config(url))
        self._publisher = Publisher(
            self.worker, config, RedisIndexWriter(config), self.source, lambda: LoadReport(Load())
        )
        self._publisher.start()

    async def holds(self, hashes: Sequence[int]) -> bool:
        _, workers = await self._reader.workers(self.worker.pool)
        expected = (len(hashes), f"{reduce(xor, hashes, 0):016x}")
        return [(each.num_indexed_blocks, each.digest) for each in workers] == [expected]

    def close(self) -> None:
        self._publisher.stop()


async def test_a_flushed_redis_is_filled_again(redis_url: str):
    event, hashes = prompt(1, 2, 3, 4)
    with closing(Published(redis_url)) as published, redis.Redis.from_url(redis_url) as client:
        published.source.put(event)
        await eventually(lambda: published.holds(hashes))
        client.flushall()
        await eventually(lambda: published.holds(hashes))
        client.script_flush()
        more, more_hashes = prompt(5, 6)
        published.source.put(more)
        await eventually(lambda: published.holds([*hashes, *more_hashes]))


async def test_a_redis_that_dies_and_returns_empty_is_filled_again():
    event, hashes = prompt(1, 2, 3, 4)
    more, more_hashes = prompt(5, 6)
    (port,) = free_ports(1)
    with ExitStack() as first:
        url = first.enter_context(embedded_redis(port))
        with closing(Published(url)) as published:
            published.source.put(event)
            await eventually(lambda: published.holds(hashes))
            first.close()
            published.source.put(more)
            with embedded_redis(port):
                await eventually(lambda: published.holds([*hashes, *more_hashes]))
