"""Checks of the Redis that holds the index."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.doctor.finding import Finding, ok, problem, warning
from kvindex.redis_health import OLDEST_REDIS, NodeHealth, ServerHealth
from kvindex.redis_url import Topology

SLOW_MS = 5.0
FULL = 0.8
SKEWED_MS = 1_000.0


def redis_findings(health: ServerHealth, *, deadline_ms: float) -> Iterator[Finding]:
    """Yield what is wrong with each server, or that it is well.

    Args:
        health: what was seen.
        deadline_ms: longest that the gateway waits for an answer of the index.
    """
    for node in health.nodes:
        found = [
            *_version(node),
            *_role(node),
            *_eviction(node),
            *_memory(node),
            *_latency(node, deadline_ms),
            *_clock(node),
            *_replicas(node, health.topology),
        ]
        yield from found or [
            ok(
                _subject(node),
                f"{node.engine} {node.version}, {node.maxmemory_policy}, answers in "
                f"{node.latency_p50_ms:.1f} ms, clock {node.clock_skew_ms:+.0f} ms from ours",
            )
        ]


def _subject(node: NodeHealth) -> str:
    return f"Redis {node.where}"


def _version(node: NodeHealth) -> Iterator[Finding]:
    numbers = tuple(int(part) for part in node.version.split(".")[:2] if part.isdecimal())
    if node.engine == "redis" and numbers < OLDEST_REDIS:
        yield problem(
            _subject(node),
            f"it is version {node.version}",
            cost="The index's scripts may fail; then nothing is published or matched.",
            cure="Run Redis 6.2 or newer, or any Valkey.",
        )


def _role(node: NodeHealth) -> Iterator[Finding]:
    if node.role == "replica":
        yield problem(
            _subject(node),
            "it is a replica and refuses writes",
            cost="No worker can register: the fleet is empty, or fades as leases end.",
            cure="Let KVLANE_REDIS_URL lead to the master, or to Sentinels (redis+sentinel://).",
        )


def _eviction(node: NodeHealth) -> Iterator[Finding]:
    if node.maxmemory_policy == "noeviction":
        return
    what = f"its maxmemory-policy is {node.maxmemory_policy}"
    cure = "CONFIG SET maxmemory-policy noeviction, and the same in redis.conf."
    if node.max_memory_bytes:
        yield problem(
            _subject(node),
            what,
            cost="It may drop keys of the index when memory is short: hits are lost until workers send anew.",
            cure=cure,
        )
    else:
        yield warning(
            _subject(node),
            f"{what}; only the missing maxmemory keeps it from acting",
            cost="None yet. With a maxmemory it drops keys of the index.",
            cure=cure,
        )


def _memory(node: NodeHealth) -> Iterator[Finding]:
    if node.max_memory_bytes and node.used_memory_bytes > FULL * node.max_memory_bytes:
        share = node.used_memory_bytes / node.max_memory_bytes
        yield warning(
            _subject(node),
            f"it uses {share:.0%} of its maxmemory",
            cost="When it is full it refuses writes: no block is indexed and no worker registers.",
            cure=f"CONFIG SET maxmemory {2 * node.max_memory_bytes}, or more.",
        )


def _latency(node: NodeHealth, deadline_ms: float) -> Iterator[Finding]:
    what = f"it answers in {node.latency_p50_ms:.1f} ms (median)"
    cure = "Move it nearer to the gateways, or find what keeps it busy: SLOWLOG GET, INFO commandstats."
    if node.latency_p50_ms > deadline_ms:
        yield problem(
            _subject(node),
            f"{what}, later than index_deadline_ms ({deadline_ms:.0f})",
            cost="Every decision gives up on the index and goes by load (x-kvlane-fallback: index_deadline).",
            cure=cure,
        )
    elif node.latency_p50_ms > SLOW_MS:
        yield warning(
            _subject(node),
            what,
            cost="Every request waits for two such answers before it is sent.",
            cure=cure,
        )


def _clock(node: NodeHealth) -> Iterator[Finding]:
    if abs(node.clock_skew_ms) > SKEWED_MS:
        yield warning(
            _subject(node),
            f"its clock is {node.clock_skew_ms / 1000:+.1f} s from this machine's",
            cost="None for routing, as leases go by its clock alone. Times in logs cannot be compared.",
            cure="Run NTP on both machines.",
        )


def _replicas(node: NodeHealth, topology: Topology) -> Iterator[Finding]:
    if topology is not Topology.SINGLE and not node.num_replicas:
        yield warning(
            _subject(node),
            "it has no replica",
            cost="If it dies, its part of the index is away until it is back.",
            cure="Attach a replica: REPLICAOF.",
        )
