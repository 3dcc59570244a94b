"""Prometheus metrics of the transfer, of this process."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import Counter, Gauge

from connectors.staging import StagingRing

TRANSFERS = Counter(
    "kvlane_transfer_ended",
    "Transfers that ended, by role (send, receive) and outcome (done, or the reason of the failure).",
    ["role", "outcome"],
)
BYTES = Counter("kvlane_transfer_moved_bytes", "Bytes of KV that were moved.", ["role"])
WIRE_BYTES = Counter("kvlane_transfer_wire_bytes", "Bytes of KV that came, by peer.", ["peer"])
WIRE_SECONDS = Counter(
    "kvlane_transfer_wire_seconds",
    "Seconds in which transfers from a peer had chunks on their way, summed over transfers.",
    ["peer"],
)
LIVE = Gauge("kvlane_transfer_live", "Transfers that have not ended.", ["role"])
FREE_BUFFERS = Gauge("kvlane_transfer_free_buffers", "Staging buffers that are free.", ["role"])
QUARANTINED_BUFFERS = Gauge(
    "kvlane_transfer_quarantined_buffers",
    "Staging buffers that a lost peer's unfinished requests hold.",
    ["role"],
)
PEERS = Gauge("kvlane_transfer_peers", "Connections to other engines.")
REFUSED_PEERS = Counter(
    "kvlane_transfer_refused_peers",
    "Connections that were closed for what the peer sent, or did not send.",
    ["reason"],
)


class Half(Protocol):
    """The sending or the receiving half of a mover."""

    ring: StagingRing

    @property
    def num_live(self) -> int:
        """Transfers that have not ended."""


def watch(role: str, half: Half) -> None:
    """Read the gauges of a role from this half from now on."""
    LIVE.labels(role).set_function(lambda: half.num_live)
    FREE_BUFFERS.labels(role).set_function(lambda: half.ring.num_free)
    QUARANTINED_BUFFERS.labels(role).set_function(lambda: half.ring.num_quarantined)
