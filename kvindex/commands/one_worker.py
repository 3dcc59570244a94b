"""What commands about one worker share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from kvindex.blocks import Pool
from kvindex.commands.inspect.options import index_reader, live_fleet
from kvindex.errors import ConfigError
from kvindex.redis_index import RedisIndexReader
from kvindex.worker import RegisteredWorker


async def change(
    redis_url: str, worker: str, make: Callable[[RedisIndexReader, Pool], Awaitable[object]]
) -> RegisteredWorker:
    """Change a worker in each pool that has it; return it as it is after that.

    Args:
        worker: its id.
        make: makes the change in one pool.

    Raises:
        ConfigError: no live worker is called that; those that are live are named.
    """
    async with index_reader(redis_url) as reader:
        for pool, workers in await live_fleet(reader):
            if any(each.worker.worker_id == worker for each in workers):
                await make(reader, pool)
        live = {each.worker.worker_id: each for _, workers in await live_fleet(reader) for each in workers}
    if worker not in live:
        known = ", ".join(live) or "none"
        raise ConfigError(f"no live worker is called {worker}; live are: {known}")
    return live[worker]
