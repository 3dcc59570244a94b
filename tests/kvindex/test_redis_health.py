"""What is seen of real servers, and what of it is found wrong."""

from __future__ import annotations

import msgspec
import pytest

from connectors.bench.ports import free_ports
from kvindex.config import IndexConfig
from kvindex.errors import IndexRefused, IndexUnavailable
from kvindex.redis_health import NodeHealth, ServerHealth, examine, findings
from kvindex.redis_url import Topology
from tests.support.redis_topology import server

WELL = NodeHealth(
    where="h:1",
    engine="redis",
    version="7.2.4",
    role="master",
    maxmemory_policy="noeviction",
    used_memory_bytes=50,
    max_memory_bytes=100,
    num_replicas=1,
    latency_p50_ms=0.3,
    clock_skew_ms=0.0,
)


def config(url: str) -> IndexConfig:
    return IndexConfig(redis_url=url, redis_timeout_s=10)


@pytest.mark.parametrize(("engine", "oldest"), [("redis", "6.2"), ("valkey", "8.")])
async def test_a_server(request, engine, oldest):
    health = await examine(config(request.getfixturevalue(f"{engine}_url")))
    (node,) = health.nodes
    assert health.topology is Topology.SINGLE
    assert health.where == node.where
    assert (node.engine, node.role, node.maxmemory_policy, node.num_replicas) == (
        engine,
        "master",
        "noeviction",
        0,
    )
    assert node.version >= oldest
    assert node.used_memory_bytes > 100_000
    assert node.max_memory_bytes == 0
    assert node.latency_p50_ms > 0
    assert abs(node.clock_skew_ms) < 1_000
    assert [each for each in findings(health) if each.severity == "error"] == []


async def test_the_master_behind_sentinels_is_named(sentinel_url, redis_sentinels):
    health = await examine(config(sentinel_url))
    (node,) = health.nodes
    assert health.topology is Topology.SENTINEL
    assert node.where == f"127.0.0.1:{redis_sentinels.master.port}"
    assert (node.role, node.num_replicas) == ("master", 1)


async def test_every_master_of_a_cluster_is_looked_at(cluster_url, valkey_cluster):
    health = await examine(config(cluster_url))
    assert health.topology is Topology.CLUSTER
    assert {node.where for node in health.nodes} == {
        f"127.0.0.1:{node.port}" for node in valkey_cluster.masters
    }
    assert sum("has no replica" in each.text for each in findings(health)) == 3


async def test_what_is_wrong_of_a_real_server():
    options = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with server(*options) as engine, engine.client() as client:
        health = await examine(config(engine.url))
        (finding,) = findings(health)
        assert finding.severity == "warning"
        assert finding.text.startswith(f"Redis at 127.0.0.1:{engine.port} may evict")
        command = finding.text.partition(": ")[2]
        client.execute_command(*command.split())
        assert findings(await examine(config(engine.url))) == []
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        (finding,) = findings(await examine(config(engine.url)))
        assert finding.severity == "error"
        assert "is a replica and refuses writes" in finding.text


@pytest.mark.parametrize(
    ("change", "severity", "text"),
    [
        (
            {"version": "6.0.16"},
            "error",
            "Redis at h:1 is 6.0.16: run 6.2 or newer, or any version of Valkey",
        ),
        ({"used_memory_bytes": 81}, "warning", "uses 81% of its maxmemory: CONFIG SET maxmemory 200"),
        ({"latency_p50_ms": 7.04}, "warning", "answers in 7.0 ms"),
        ({"num_replicas": 0}, "warning", "has no replica"),
        ({"engine": "valkey", "version": "6.0"}, None, None),
        ({"max_memory_bytes": 0, "maxmemory_policy": "allkeys-lru"}, None, None),
        ({"version": "6.2.0"}, None, None),
    ],
)
def test_findings(change, severity, text):
    node = msgspec.structs.replace(WELL, **change)
    found = findings(ServerHealth(where="h:1", topology=Topology.SENTINEL, nodes=(node,)))
    if severity is None:
        assert found == []
    else:
        (finding,) = found
        assert finding.severity == severity
        assert text in finding.text


def test_errors_come_first():
    nodes = (msgspec.structs.replace(WELL, num_replicas=0), msgspec.structs.replace(WELL, role="replica"))
    found = findings(ServerHealth(where="h:1", topology=Topology.CLUSTER, nodes=nodes))
    assert [each.severity for each in found] == ["error", "warning"]


async def test_who_may_not_look_is_told_so():
    options = ("--user", "default", "on", "nopass", "~*", "+@all", "-info")
    with server(*options) as engine, pytest.raises(IndexRefused, match=r"'info' command.*; give the user"):
        await examine(config(engine.url))


async def test_a_server_that_is_not_there():
    with pytest.raises(IndexUnavailable):
        await examine(config(f"redis://127.0.0.1:{free_ports(1)[0]}"))
