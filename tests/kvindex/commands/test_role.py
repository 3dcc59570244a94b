"""`kvlane role` on a real Redis."""

import asyncio

import pytest
from typer.testing import CliRunner

from kvindex.commands.role import app
from kvindex.config import IndexConfig
from kvindex.errors import ConfigError
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Role
from tests.support.workers import make_worker


def give(redis_url: str, *arguments: str):
    return CliRunner().invoke(app, [*arguments, "--redis-url", redis_url], standalone_mode=False)


def role_of(redis_url: str, worker) -> Role:
    async def read() -> Role:
        reader = RedisIndexReader(IndexConfig(redis_url=redis_url))
        _, (registered,) = await reader.workers(worker.pool)
        await reader.close()
        return registered.role

    return asyncio.run(read())


def test_a_role_is_given_kept_through_a_restart_and_taken_back(redis_url: str):
    writer = RedisIndexWriter(IndexConfig(redis_url=redis_url))
    first = make_worker("10.0.0.1:8000", role=Role.DECODE)
    writer.open_slot(first, lease_ms=60_000)
    assert role_of(redis_url, first) is Role.DECODE
    shown = give(redis_url, first.worker_id, "prefill")
    assert shown.output == "10.0.0.1:8000: prefill\n"
    writer.open_slot(make_worker("10.0.0.1:8000", role=Role.DECODE), lease_ms=60_000, takeover=True)
    assert role_of(redis_url, first) is Role.PREFILL
    give(redis_url, first.worker_id, "own")
    assert role_of(redis_url, first) is Role.DECODE
    writer.close()


def test_a_worker_that_is_not_there_is_named_with_those_that_are(redis_url: str):
    writer = RedisIndexWriter(IndexConfig(redis_url=redis_url))
    writer.open_slot(make_worker("10.0.0.1:8000"), lease_ms=60_000)
    shown = give(redis_url, "10.0.0.2:8000", "prefill")
    assert isinstance(shown.exception, ConfigError)
    assert str(shown.exception) == "no live worker is called 10.0.0.2:8000; live are: 10.0.0.1:8000"
    writer.close()


@pytest.mark.parametrize("wrong", ["prefil", ""])
def test_a_role_that_is_none_is_refused(redis_url: str, wrong: str):
    assert give(redis_url, "10.0.0.1:8000", wrong).exception is not None
