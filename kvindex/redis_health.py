"""What state the Redis of the index is in, and what of that somebody should change."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from kvindex.config import IndexConfig
from kvindex.redis_connection import AsyncConnection, Master
from kvindex.redis_url import Topology

OLDEST_REDIS = (6, 2)

_PINGS = 11
_SLOW_MS = 5.0
_FULL = 0.8


class NodeHealth(msgspec.Struct, frozen=True):
    """One server that takes writes, or should."""

    where: str
    engine: Literal["redis", "valkey"]
    version: str
    role: Literal["master", "replica"]
    maxmemory_policy: str
    used_memory_bytes: int
    max_memory_bytes: int
    """0 if only the machine limits it."""
    num_replicas: int
    """Connected ones."""
    latency_p50_ms: float
    """Of a round trip."""
    clock_skew_ms: float
    """Its clock minus ours. It harms nothing: leases go by its clock alone."""


class ServerHealth(msgspec.Struct, frozen=True):
    """What the URL leads to: one server, the master behind Sentinels, or every master of a cluster."""

    where: str
    topology: Topology
    nodes: tuple[NodeHealth, ...]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is wrong with a server, what it costs, and what to do."""

    severity: Literal["error", "warning"]
    where: str
    what: str
    """Follows the server's name."""
    cost: str
    cure: str

    @property
    def text(self) -> str:
        """What is wrong and what to do, in one line."""
        return f"Redis at {self.where} {self.what}: {self.cure}"


async def examine(config: IndexConfig) -> ServerHealth:
    """Look at every server that the index may write to; takes about a dozen round trips each.

    Raises:
        ConfigError: the URL is not one of ours.
        IndexRefused: the user may not look (INFO, PING, TIME), or worse.
        IndexUnavailable: Redis does not answer.
    """
    connection = AsyncConnection(config)
    try:
        nodes = [await _examine(master) async for master in connection.masters()]
    finally:
        await connection.close()
    return ServerHealth(where=str(connection.url), topology=connection.url.topology, nodes=tuple(nodes))


async def _examine(master: Master) -> NodeHealth:
    info: dict[str, Any] = await master.call("INFO")
    round_trips_s = []
    for _ in range(_PINGS):
        began_s = time.perf_counter()
        await master.call("PING")
        round_trips_s.append(time.perf_counter() - began_s)
    latency_s = statistics.median(round_trips_s)
    seconds, microseconds = await master.call("TIME")
    its_s, our_s = int(seconds) + int(microseconds) / 1e6, time.time() - latency_s / 2
    valkey = info.get("valkey_version")
    return NodeHealth(
        where=master.where,
        engine="valkey" if valkey else "redis",
        version=str(valkey or info["redis_version"]),
        role="master" if info["role"] == "master" else "replica",
        maxmemory_policy=str(info["maxmemory_policy"]),
        used_memory_bytes=int(info["used_memory"]),
        max_memory_bytes=int(info["maxmemory"]),
        num_replicas=int(info.get("connected_slaves", 0)),
        latency_p50_ms=1000 * latency_s,
        clock_skew_ms=1000 * (its_s - our_s),
    )


def findings(health: ServerHealth) -> list[Finding]:
    """Return what should be changed, errors first."""
    found = [finding for node in health.nodes for finding in _findings(node, health.topology)]
    return sorted(found, key=lambda finding: finding.severity)


def _findings(node: NodeHealth, topology: Topology) -> Iterator[Finding]:
    def finding(severity: Literal["error", "warning"], what: str, *, cost: str, cure: str) -> Finding:
        return Finding(severity=severity, where=node.where, what=what, cost=cost, cure=cure)

    if node.engine == "redis" and _numbers(node.version) < OLDEST_REDIS:
        yield finding(
            "error",
            f"is {node.version}",
            cost="the index's scripts may fail, and then nothing is published or matched",
            cure="run 6.2 or newer, or any version of Valkey",
        )
    if node.role == "replica":
        yield finding(
            "error",
            "is a replica and refuses writes",
            cost="no worker can register, and those that have fade as their leases end",
            cure="let the URL lead to the master, or to Sentinels (redis+sentinel://)",
        )
    if node.max_memory_bytes and node.maxmemory_policy != "noeviction":
        yield finding(
            "warning",
            f"may evict keys of the index ({node.maxmemory_policy})",
            cost="blocks are missed until their workers notice and send all anew",
            cure="CONFIG SET maxmemory-policy noeviction",
        )
    if node.max_memory_bytes and node.used_memory_bytes > _FULL * node.max_memory_bytes:
        share = node.used_memory_bytes / node.max_memory_bytes
        yield finding(
            "warning",
            f"uses {share:.0%} of its maxmemory",
            cost="when it is full, new blocks are not indexed and new workers cannot register",
            cure=f"CONFIG SET maxmemory {2 * node.max_memory_bytes} or more",
        )
    if node.latency_p50_ms > _SLOW_MS:
        yield finding(
            "warning",
            f"answers in {node.latency_p50_ms:.1f} ms",
            cost="every request waits for two such answers",
            cure="move it nearer to the gateways, or find what keeps it busy (SLOWLOG GET)",
        )
    if topology is not Topology.SINGLE and not node.num_replicas:
        yield finding(
            "warning",
            "has no replica",
            cost="if it dies, its part of the index waits for it",
            cure="attach one (REPLICAOF)",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
