"""The publisher on a real Redis that loses what it was told."""

from contextlib import ExitStack, closing

import redis

from kvindex.embedded import embedded_redis
from tests.support.ports import free_ports
from tests.support.published import Published
from tests.support.scripted_engine import prompt
from tests.support.waiting import eventually


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
