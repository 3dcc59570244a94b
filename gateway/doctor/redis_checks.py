"""Checks of the Redis that holds the index."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.doctor.finding import Finding, Level, ok, problem
from kvindex.redis_health import ServerHealth, findings


def redis_findings(health: ServerHealth, *, deadline_ms: float) -> Iterator[Finding]:
    """Yield the figures of each server, and what is wrong with it.

    Args:
        health: what was seen.
        deadline_ms: longest that the gateway waits for an answer of the index.
    """
    for node in health.nodes:
        subject = f"Redis {node.where}"
        yield ok(
            subject,
            f"{node.engine} {node.version}, {node.maxmemory_policy}, answers in {node.latency_p50_ms:.1f} ms,"
            f" clock {node.clock_skew_ms:+.0f} ms from ours (leases go by its clock alone)",
        )
        if node.latency_p50_ms > deadline_ms:
            yield problem(
                subject,
                f"it answers later than index_deadline_ms ({deadline_ms:.0f})",
                cost="Every decision gives up on it and goes by load (x-kvlane-fallback: index_deadline).",
                cure="Move it nearer to the gateways, or raise KVLANE_INDEX_DEADLINE_MS there.",
            )
    for each in findings(health):
        yield Finding(
            level=Level.PROBLEM if each.severity == "error" else Level.WARNING,
            subject=f"Redis {each.where}",
            what=f"it {each.what}",
            cost=_sentence(each.cost),
            cure=_sentence(each.cure),
        )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
