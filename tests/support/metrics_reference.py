"""The table of every metric, from the registry itself.

python -m tests.support.metrics_reference
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client import REGISTRY

ROOT = Path(__file__).parents[2]

PAGE = ROOT / "docs" / "metrics.md"

HEAD = """\
# Metrics

Gateways serve them at `/metrics` of the admin port, publishers at `metrics_port`,
agents of tiers at their own port (`tier_agent_port`),
the LMCache servers of `kvlane tier serve` beside LMCache's own at their HTTP API,
engines those of transfers at `transfer_metrics_port`. Durations are in seconds,
sizes in bytes. Labels have few values: what a client sends is never one.
[A dashboard](../deploy/grafana/kvlane.json) of them can be imported into Grafana.

This page is made from the registry by `python -m tests.support.metrics_reference`.
"""


class Metric(NamedTuple):
    """One metric as the registry has it."""

    name: str
    """As it is scraped and queried, `_total` of a counter included."""
    kind: str
    labels: tuple[str, ...]
    help: str


def metrics() -> list[Metric]:
    """Return every metric of ours, after importing each module that defines some."""
    for package in ("gateway", "connectors", "kvindex"):
        for path in sorted((ROOT / package).rglob("metrics.py")):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return sorted(_ours())


def _ours() -> Iterator[Metric]:
    for collector in set(REGISTRY._collector_to_names):
        is_metric = collector.__class__.__module__ == "prometheus_client.metrics"
        # Where a test has imported LMCache or vLLM, theirs are there as well.
        if is_metric and collector._name.startswith("kvlane_"):
            suffix = "_total" if collector._type == "counter" else ""
            yield Metric(
                collector._name + suffix, collector._type, collector._labelnames, collector._documentation
            )


def document() -> str:
    """Return the whole page."""
    rows = [f"| `{each.name}` | {each.kind} | {', '.join(each.labels)} | {each.help} |" for each in metrics()]
    return "\n".join([HEAD, "| metric | kind | labels | |", "|---|---|---|---|", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(document())
