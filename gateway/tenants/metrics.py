"""What is counted of tenants. Their names come from the operator's file, so they are few."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

REQUESTS = Counter("kvlane_gateway_tenant_requests", "Requests sent to a worker.", ["tenant"])
PROMPT_TOKENS = Counter("kvlane_gateway_tenant_prompt_tokens", "Their prompt tokens.", ["tenant"])
RUNNING = Gauge("kvlane_gateway_tenant_requests_in_flight", "Requests under way.", ["tenant"])
REFUSED = Counter(
    "kvlane_gateway_tenant_refused",
    "Requests refused: key (no tenant known), path, body, requests, tokens, concurrency, routing.",
    ["tenant", "reason"],
)
FILE_LOADS = Counter(
    "kvlane_gateway_tenants_file_loads",
    "Reads of a changed file of tenants: taken, or refused and the old one kept.",
    ["outcome"],
)
