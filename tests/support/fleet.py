"""A whole fleet of simulated engines, every other part real: Redis, gateway, Envoy."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from gateway.local_fleet import EngineCommand, FleetOptions, LocalFleet, local_fleet
from kvindex.config import IndexConfig
from kvindex.redis_index import RedisIndexReader
from kvindex.worker import RegisteredWorker
from tests.support.vllm_engine import tiny_model

LEASE_S = 1.0


def simulated(*arguments: str, each: Sequence[Sequence[str]] = ()) -> EngineCommand:
    """Return what starts simulated engines with these arguments.

    Args:
        each: further arguments of the first engine, of the second and so on.
    """
    tokenizer = str(tiny_model())
    own: dict[int, Sequence[str]] = {}

    def command(port: int, redis_url: str) -> Sequence[str]:
        flags = own.setdefault(port, each[len(own)] if len(own) < len(each) else ())
        where = ("--port", str(port), "--redis-url", redis_url, "--tokenizer", tokenizer)
        lease = ("--lease-ms", str(int(1000 * LEASE_S)))
        return [sys.executable, "-m", "tests.support.engine_sim", *where, *lease, *arguments, *flags]

    return command


@contextmanager
def simulated_fleet(
    logs: Path, *arguments: str, num_workers: int = 3, each: Sequence[Sequence[str]] = ()
) -> Iterator[LocalFleet]:
    """Run a fleet of simulated engines; ready when entered. See `simulated` for `each`."""
    options = FleetOptions(simulated(*arguments, each=each), num_workers=num_workers, start_timeout_s=60)
    with local_fleet(options, logs) as fleet:
        fleet.wait_until_ready()
        yield fleet


def eventually(condition: Callable[[], object], *, timeout_s: float = 10) -> None:
    """Return once `condition()` is true, and fail the test if it never is."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


def registered(fleet: LocalFleet) -> dict[str, RegisteredWorker]:
    """Return what the index says of every live worker, by endpoint."""

    async def read() -> dict[str, RegisteredWorker]:
        index = RedisIndexReader(IndexConfig(redis_url=fleet.redis_url, redis_timeout_s=30))
        try:
            found = [each for pool in await index.pools() for each in (await index.workers(pool))[1]]
        finally:
            await index.close()
        return {each.worker.endpoint: each for each in found}

    return asyncio.run(read())


def charges(fleet: LocalFleet) -> int:
    """Return the number of requests that are charged to any worker."""
    return sum(each.charged_requests for each in registered(fleet).values())


def indexed_blocks(fleet: LocalFleet) -> int:
    """Return the blocks in the index, over all workers."""
    return sum(each.num_indexed_blocks for each in registered(fleet).values())


def is_idle(fleet: LocalFleet) -> bool:
    """Say whether no engine has reported a request that it still has, and none is charged."""
    return not any(
        each.load.running_requests + each.load.waiting_requests + each.charged_requests
        for each in registered(fleet).values()
    )


def settled(fleet: LocalFleet) -> None:
    """Wait until the index has heard of every block of the requests so far, and that they are over."""
    seen: list[int | None] = []

    def unchanged() -> bool:
        seen.append(indexed_blocks(fleet) if is_idle(fleet) else None)
        return bool(seen[-1]) and len(seen) > 2 and len(set(seen[-3:])) == 1

    eventually(unchanged)


def parities(fleet: LocalFleet) -> dict[str, dict[str, object]]:
    """Return the gateway's verdict on every live worker, by endpoint."""
    workers = httpx.get(f"{fleet.admin_url}/fleet").json()["workers"]
    return {each["worker"]["endpoint"]: each["parity"] for each in workers}


def seen_by(fleet: LocalFleet, engine: str) -> list[dict[str, object]]:
    """Return the requests that a simulated engine has ended, in order."""
    return httpx.get(f"http://{engine}/sim/requests").json()
