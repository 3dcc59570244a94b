"""What the doctor says of a Redis, as it was seen and as it really is."""

import msgspec
import pytest
import redis

from gateway.doctor.finding import Level
from gateway.doctor.redis_checks import redis_findings
from kvindex.config import IndexConfig
from kvindex.redis_health import NodeHealth, ServerHealth, examine
from kvindex.redis_url import Topology

WELL = NodeHealth(
    where="10.0.0.1:6379",
    engine="redis",
    version="7.2.4",
    role="master",
    maxmemory_policy="noeviction",
    used_memory_bytes=100,
    max_memory_bytes=1000,
    num_replicas=0,
    latency_p50_ms=0.3,
    clock_skew_ms=-3.0,
)


def judged(topology=Topology.SINGLE, **fields):
    node = msgspec.structs.replace(WELL, **fields)
    health = ServerHealth(where=node.where, topology=topology, nodes=(node,))
    return [*redis_findings(health, deadline_ms=50)]


def test_a_healthy_server_is_ok_with_its_figures():
    (finding,) = judged()
    assert (finding.level, finding.subject) == (Level.OK, "Redis 10.0.0.1:6379")
    assert finding.what == "redis 7.2.4, noeviction, answers in 0.3 ms, clock -3 ms from ours"


@pytest.mark.parametrize(
    ("fields", "level", "said"),
    [
        ({"version": "6.0.16"}, Level.PROBLEM, "6.0.16"),
        ({"role": "replica"}, Level.PROBLEM, "refuses writes"),
        ({"maxmemory_policy": "allkeys-lru"}, Level.PROBLEM, "allkeys-lru"),
        ({"maxmemory_policy": "allkeys-lru", "max_memory_bytes": 0}, Level.WARNING, "allkeys-lru"),
        ({"used_memory_bytes": 900}, Level.WARNING, "90%"),
        ({"latency_p50_ms": 8.0}, Level.WARNING, "8.0 ms"),
        ({"latency_p50_ms": 80.0}, Level.PROBLEM, "index_deadline_ms (50)"),
        ({"clock_skew_ms": -90_000.0}, Level.WARNING, "-90.0 s"),
        ({"topology": Topology.CLUSTER}, Level.WARNING, "no replica"),
    ],
)
def test_what_is_wrong_has_a_cost_and_a_cure(fields, level, said):
    (finding,) = judged(**fields)
    assert finding.level is level
    assert said in finding.what
    assert finding.cost
    assert finding.cure


@pytest.mark.parametrize("version", ["6.2.14", "7.0", "8.0.1"])
def test_supported_versions(version):
    assert judged(version=version)[0].level is Level.OK


def test_a_valkey_of_any_version_will_do():
    assert judged(engine="valkey", version="1.0")[0].level is Level.OK


async def test_a_real_server_that_evicts_is_found(redis_url):
    config = IndexConfig(redis_url=redis_url)
    assert [each.level for each in redis_findings(await examine(config), deadline_ms=1_000)] == [Level.OK]
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory", "1gb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            (finding,) = redis_findings(await examine(config), deadline_ms=1_000)
        finally:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "0")
    assert finding.level is Level.PROBLEM
    assert "allkeys-lru" in finding.what
    assert "CONFIG SET maxmemory-policy noeviction" in finding.cure
