"""Prometheus metrics of the publishing side, by worker id, and of stores."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from kvindex.errors import ConfigError
from kvindex.tls import ServerTls

BLOCKS_STORED = Counter(
    "kvlane_publisher_blocks_stored", "Blocks that appeared in the engine's cache.", ["worker"]
)
BLOCKS_REMOVED = Counter(
    "kvlane_publisher_blocks_removed", "Blocks whose last copy left the engine's cache.", ["worker"]
)
BLOCKS_SKIPPED = Counter(
    "kvlane_publisher_blocks_skipped", "Blocks in events that are not indexed.", ["worker", "reason"]
)
RESYNCS = Counter(
    "kvlane_publisher_resyncs",
    "Fresh slots after the first: cleared (by the engine), events_lost, slot_lost, drift.",
    ["worker", "reason"],
)
INDEX_FAILURES = Counter(
    "kvlane_publisher_index_failures", "Calls that the index did not answer.", ["worker"]
)
INDEXED_BLOCKS = Gauge("kvlane_publisher_indexed_blocks", "Blocks the index was told of.", ["worker"])
UNWRITTEN_CHANGES = Gauge(
    "kvlane_publisher_unwritten_changes", "Changes the index was not told of yet.", ["worker"]
)
WRITE_LAG = Gauge(
    "kvlane_publisher_write_lag_seconds", "Age of the oldest change in the last batch written.", ["worker"]
)

STORE_CHUNKS = Gauge(
    "kvlane_store_chunks",
    "Chunks in a store, as events of its LMCache server or a listing tell.",
    ["store", "tier"],
)
STORE_BYTES = Gauge("kvlane_store_bytes", "Size of these chunks.", ["store", "tier"])
STORE_CAPACITY_BYTES = Gauge(
    "kvlane_store_capacity_bytes", "What a store may hold; 0: no limit is known.", ["store"]
)
STORE_EVENTS = Counter("kvlane_store_events", "Batches of events of an LMCache server.", ["server", "type"])
STORE_GAPS = Counter(
    "kvlane_store_gaps", "Breaks in the events of an LMCache server; its stores are read anew.", ["server"]
)
STORE_LISTING_SECONDS = Histogram(
    "kvlane_store_listing_seconds",
    "Time to list what a store holds.",
    ["store"],
    buckets=(0.1, 1, 10, 60, 600),
)
STORE_LISTING_FAILURES = Counter(
    "kvlane_store_listing_failures", "Listings of a store that failed.", ["store"]
)
STORE_LOAD_COST = Gauge(
    "kvlane_store_load_cost_seconds",
    "What KV takes from a store into the memory of its LMCache server, as measured, by part: load (whatever "
    "its size), byte.",
    ["store", "part"],
)
STEP_COST = Gauge(
    "kvlane_publisher_step_cost_seconds",
    "What an engine's steps cost, as measured, by part: step (whatever is in it), prompt_token, prompt_pair "
    "(with a token before it), decoding_request, context_token (of these).",
    ["worker", "part"],
)


def serve(host: str, port: int, tls: ServerTls | None = None) -> None:
    """Serve this process's metrics on `host:port` from a daemon thread; port 0 serves none.

    Raises:
        ConfigError: the port is taken, or a certificate cannot be used.
    """
    if port:
        try:
            start_http_server(port, host, **_files(tls))
        except OSError as error:
            raise ConfigError(f"metrics at {host}:{port} cannot be served: {error}") from error


def _files(tls: ServerTls | None) -> dict[str, Any]:
    if tls is None:
        return {}
    tls.context()  # says what is wrong, if anything
    files = {"certfile": str(tls.cert), "keyfile": str(tls.key)}
    if tls.client_ca is None:
        return files
    return {**files, "client_cafile": str(tls.client_ca), "client_auth_required": True}
