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


def judged(**fields):
    node = msgspec.structs.replace(WELL, **fields)
    health = ServerHealth(where=node.where, topology=Topology.SINGLE, nodes=(node,))
    return [*redis_findings(health, deadline_ms=50)]


def test_a_healthy_server_is_ok_with_its_figures():
    (finding,) = judged()
    assert (finding.level, finding.subject) == (Level.OK, "Redis 10.0.0.1:6379")
    assert finding.what.startswith("redis 7.2.4, noeviction, answers in 0.3 ms, clock -3 ms from ours")


@pytest.mark.parametrize(
    ("fields", "level", "said"),
    [
        ({"role": "replica"}, Level.PROBLEM, "it is a replica and refuses writes"),
        ({"used_memory_bytes": 900}, Level.WARNING, "it uses 90% of its maxmemory"),
    ],
)
def test_what_is_wrong_has_a_cost_and_a_cure(fields, level, said):
    finding = judged(**fields)[-1]
    assert (finding.level, finding.what) == (level, said)
    assert finding.cost.endswith(".")
    assert finding.cure.endswith(".")


def test_answers_that_come_too_late_for_the_gateway_are_a_problem():
    assert [each.level for each in judged(latency_p50_ms=80.0)] == [Level.OK, Level.PROBLEM, Level.WARNING]


async def test_a_real_server_that_evicts_is_found(redis_url):
    config = IndexConfig(redis_url=redis_url)
    assert [each.level for each in redis_findings(await examine(config), deadline_ms=1_000)] == [Level.OK]
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory", "1gb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            (_, finding) = redis_findings(await examine(config), deadline_ms=1_000)
        finally:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "0")
    assert finding.level is Level.WARNING
    assert "allkeys-lru" in finding.what
    assert "CONFIG SET maxmemory-policy noeviction" in finding.cure
