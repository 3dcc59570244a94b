"""`kvlane drain` on a real Redis."""

import asyncio
import threading
import time

import pytest
from typer.testing import CliRunner

from kvindex.commands.drain import app
from kvindex.config import IndexConfig
from kvindex.errors import ConfigError
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Load
from tests.support.workers import make_worker

WORKER = make_worker("10.0.0.1:8000")
NAME = WORKER.worker_id


@pytest.fixture
def writer(redis_url: str):
    made = RedisIndexWriter(IndexConfig(redis_url=redis_url))
    yield made
    made.close()


def drain(redis_url: str, *arguments: str):
    return CliRunner().invoke(app, [*arguments, "--redis-url", redis_url], standalone_mode=False)


def is_draining(redis_url: str) -> bool:
    async def read() -> bool:
        reader = RedisIndexReader(IndexConfig(redis_url=redis_url))
        _, (registered,) = await reader.workers(WORKER.pool)
        await reader.close()
        return registered.is_draining

    return asyncio.run(read())


def test_a_worker_drains_through_a_restart_until_it_is_undone(redis_url: str, writer: RedisIndexWriter):
    slot = writer.open_slot(WORKER, lease_ms=60_000)
    writer.heartbeat(WORKER.pool, slot, WORKER.incarnation, Load(running_requests=3), lease_ms=60_000)
    assert drain(redis_url, NAME).output == f"{NAME}: draining, 3 requests left\n"
    writer.open_slot(make_worker(NAME, incarnation="next"), lease_ms=60_000, takeover=True)
    assert is_draining(redis_url)
    assert drain(redis_url, NAME, "--undo").output == f"{NAME}: gets requests\n"
    assert not is_draining(redis_url)


def test_it_waits_until_the_worker_has_no_requests(redis_url: str, writer: RedisIndexWriter):
    slot = writer.open_slot(WORKER, lease_ms=60_000)
    place = (WORKER.pool, slot, WORKER.incarnation)
    writer.heartbeat(*place, Load(running_requests=1), lease_ms=60_000)
    waiting = threading.Thread(target=lambda: shown.append(drain(redis_url, NAME, "--wait").output))
    shown: list[str] = []
    waiting.start()
    time.sleep(3)
    assert waiting.is_alive()
    writer.heartbeat(*place, Load(), lease_ms=60_000)
    waiting.join(60)
    assert shown == [f"{NAME}: draining, 1 requests left\n{NAME}: idle\n"]


def test_a_worker_that_is_not_there_is_named_with_those_that_are(redis_url: str, writer: RedisIndexWriter):
    writer.open_slot(WORKER, lease_ms=60_000)
    error = drain(redis_url, "10.0.0.2:8000").exception
    assert isinstance(error, ConfigError)
    assert str(error) == f"no live worker is called 10.0.0.2:8000; live are: {NAME}"


def test_waiting_for_a_worker_that_gets_requests_is_refused(redis_url: str):
    assert isinstance(drain(redis_url, NAME, "--undo", "--wait").exception, ConfigError)
