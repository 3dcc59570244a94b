"""Many simulated engines in one process that leave and join all the time.

python -m tests.support.engine_crowd --redis-url redis://127.0.0.1:6379/0 --ports 8001,8002 --tokenizer DIR
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress

from kvindex.blocks import Pool
from kvindex.commands.inspect.options import index_reader
from kvindex.commands.one_worker import change
from kvindex.errors import ConfigError
from kvindex.redis_index import RedisIndexReader
from tests.support import engine_sim

NOTICED_S = 1.0
"""In which gateways learn that a worker drains, and what they have sent it arrives."""


class Drain:
    """Has an engine drained, as `kvlane drain` does it, and takes that back."""

    def __init__(self, redis_url: str, port: str) -> None:
        self._redis_url = redis_url
        self._worker = f"127.0.0.1:{port}"
        self._pools: set[Pool] = set()

    async def begin(self) -> None:
        with suppress(ConfigError):  # it has not joined yet
            await change(self._redis_url, self._worker, self._drain)
        await asyncio.sleep(NOTICED_S)

    async def undo(self) -> None:
        """Take it back once the engine has joined again."""
        async with index_reader(self._redis_url) as reader:
            for pool in self._pools:
                while not await reader.drain(pool, self._worker, is_draining=False):
                    await asyncio.sleep(0.2)

    async def _drain(self, reader: RedisIndexReader, pool: Pool) -> None:
        self._pools.add(pool)
        await reader.drain(pool, self._worker, is_draining=True)


async def come_and_go(engine: Sequence[str], drain: Drain, draw: random.Random, mean_life_s: float) -> None:
    """Run an engine for a while, let it end its requests, stay away for a moment, and again."""
    while True:
        server = engine_sim.server(engine_sim.parse(engine), grace_s=30)
        serving = asyncio.create_task(server.serve())
        await drain.undo()
        await asyncio.sleep(draw.uniform(0.5, 1.5) * mean_life_s)
        await drain.begin()
        server.should_exit = True
        await serving
        await asyncio.sleep(draw.uniform(0.1, 0.3) * mean_life_s)


async def run(options: argparse.Namespace) -> None:
    draw = random.Random(4)
    engines = []
    for port in options.ports.split(","):
        engine = ["--port", port, "--redis-url", options.redis_url, "--tokenizer", options.tokenizer]
        engine += ["--events", f"inproc://{port}", "--lease-ms", "10000"]
        engines.append(come_and_go(engine, Drain(options.redis_url, port), draw, options.mean_life_s))
    await asyncio.gather(*engines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--ports", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--mean-life-s", type=float, default=20)
    asyncio.run(run(parser.parse_args()))
