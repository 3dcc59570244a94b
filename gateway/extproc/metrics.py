"""What the ext_proc server counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter(
    "kvlane_gateway_extproc_requests_total",
    "HTTP requests by outcome: routed, refused, or failed (a defect of ours; Envoy chose the worker).",
    ["outcome"],
)
VIOLATIONS = Counter(
    "kvlane_gateway_extproc_violations_total",
    "Streams refused because the proxy broke the protocol, or is configured so that no pick can be made.",
)
HANDLING_SECONDS = Histogram(
    "kvlane_gateway_extproc_handling_seconds",
    "From the whole request to the answer.",
    buckets=(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 4),
)
OPEN_STREAMS = Gauge("kvlane_gateway_extproc_streams_open", "HTTP requests that are under way.")
