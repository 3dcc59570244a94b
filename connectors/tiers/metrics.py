"""Prometheus metrics of the tiers, of an LMCache server's process, which serves them beside its own."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

DAMAGED = Counter(
    "kvlane_store_damaged_objects",
    "Files and objects that were not what was stored: removed, and computed again.",
    ["tier"],
)
FAILURES = Counter("kvlane_store_failures", "Reads and writes at which a tier as a whole failed.", ["tier"])
OFF = Gauge("kvlane_store_off", "1 while a tier is left alone because it failed.", ["tier"])
