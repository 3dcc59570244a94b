"""Prometheus metrics of the tiers, of an LMCache server's process, which serves them beside its own."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

DAMAGED = Counter(
    "kvlane_store_damaged_objects",
    "Files and objects that were not what was stored: removed, and computed again.",
    ["tier"],
)
MISSING = Counter(
    "kvlane_store_missing_objects",
    "Objects that were there by all that was known, and are not: forgotten, and computed again.",
    ["tier"],
)
FAILURES = Counter("kvlane_store_failures", "Reads and writes at which a tier as a whole failed.", ["tier"])
LOADED_BYTES = Counter(
    "kvlane_store_loaded_bytes",
    "Bytes that came from a tier into the server's memory, probes included.",
    ["tier"],
)
LOAD_SECONDS = Counter(
    "kvlane_store_load_seconds", "Time of these loads, from the first request to the last answer.", ["tier"]
)
PROBES = Counter(
    "kvlane_store_probes",
    "Reads of a tier from which nobody has loaded for a while, to know its speed.",
    ["tier"],
)
OFF = Gauge("kvlane_store_off", "1 while a tier is left alone because it failed.", ["tier"])
