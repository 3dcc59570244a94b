"""Prometheus metrics of the publishing side, by worker id."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge, start_http_server

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
