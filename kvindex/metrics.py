"""Prometheus metrics of the publishing side, by worker id."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, start_http_server

from kvindex.errors import ConfigError

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


def serve(port: int) -> None:
    """Serve this process's metrics on `port` from a daemon thread; 0 serves none.

    Raises:
        ConfigError: the port is taken.
    """
    if port:
        try:
            start_http_server(port)
        except OSError as error:
            raise ConfigError(f"metrics_port {port} cannot be used: {error}; choose another one") from error
