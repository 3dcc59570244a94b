"""Fixtures that tests of more than one package use, and how long properties are searched for.

`pytest --hypothesis-profile long` searches for minutes.
"""

from hypothesis import HealthCheck, settings

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

# How long an example takes, to run or to make, says nothing on a busy machine.
settings.register_profile("short", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("short"), max_examples=2_000)
settings.load_profile("short")
