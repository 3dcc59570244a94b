"""Fixtures that tests of more than one package use."""

from tests.support.redis_server import (
    cluster_url,
    redis_sentinels,
    redis_server,
    redis_url,
    sentinel_url,
    valkey_cluster,
    valkey_server,
    valkey_url,
)

__all__ = [
    "cluster_url",
    "redis_sentinels",
    "redis_server",
    "redis_url",
    "sentinel_url",
    "valkey_cluster",
    "valkey_server",
    "valkey_url",
]
