"""Prometheus metrics of routing, on the default registry. Label values come from small fixed sets."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

DECISIONS = Counter(
    "kvlane_gateway_decisions",
    "Decisions by how they were made and, where overlap was not used, why.",
    ["mode", "fallback"],
)
REJECTED = Counter("kvlane_gateway_rejected", "Requests answered with an error by the router.", ["status"])
PROMPT_TOKENS = Counter("kvlane_gateway_prompt_tokens", "Prompt tokens of planned requests.")
MATCHED_TOKENS = Counter("kvlane_gateway_matched_tokens", "Prompt tokens cached at the chosen worker.")
TOKEN_CACHE_HITS = Counter(
    "kvlane_gateway_token_cache_hit_tokens", "Prompt tokens whose text had been tokenised before."
)
TOKEN_CACHE_MISSES = Counter(
    "kvlane_gateway_token_cache_miss_tokens", "Prompt tokens whose text was tokenised for the request."
)
TOKEN_CACHE_BYTES = Gauge(
    "kvlane_gateway_token_cache_bytes", "What the token cache takes: tokens of texts, hashes of prompts."
)
REPLANS = Counter("kvlane_gateway_replans", "Plans made again because the chosen worker's load had grown.")
SETTLE_FAILURES = Counter(
    "kvlane_gateway_settle_failures", "Reservations left to expire because the index was away."
)
RECEIPT_BYTES = Gauge("kvlane_gateway_receipts_bytes", "Memory that receipts take, about.")
EXPIRED_RESERVATIONS = Gauge(
    "kvlane_gateway_expired_reservations",
    "Reservations that nobody settled in time, by all gateways since the pool began: their gateway died, or "
    "has a defect.",
    ["model", "block_size"],
)
IN_FLIGHT = Gauge("kvlane_gateway_requests_in_flight", "Requests decided and not yet finished.")
STEP_SECONDS = Histogram(
    "kvlane_gateway_step_seconds",
    "Duration of a decision's steps: read (tokens), match, plan, reserve.",
    ["step"],
    buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
)
TTFT_SECONDS = Histogram(
    "kvlane_gateway_ttft_seconds",
    "Measured time to first token of streamed requests that were answered 200.",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)
TTFT_ERROR_SECONDS = Histogram(
    "kvlane_gateway_ttft_error_seconds",
    "Distance of measured from predicted time to first token of streamed requests, split ones included.",
    ["direction"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
)
CERTIFICATE_LOADS = Counter(
    "kvlane_gateway_certificate_loads",
    "New certificates: taken, or refused and the old one kept.",
    ["outcome"],
)
PREFILL_HALVES = Counter(
    "kvlane_gateway_prefill_halves",
    "Prefill halves of split requests: done, refused by the worker, failed on the way, or cancelled at the "
    "request's end.",
    ["outcome"],
)
LOADED_TOKENS = Counter(
    "kvlane_gateway_loaded_tokens", "Prompt tokens that the chosen worker loads from tiers.", ["tier"]
)
UNLOADED_TOKENS = Counter(
    "kvlane_gateway_unloaded_tokens",
    "Prompt tokens in tiers that the chosen worker computes, since that is predicted to be faster.",
    ["tier"],
)
TIER_LOOKUP_FAILURES = Counter(
    "kvlane_gateway_tier_lookup_failures", "Decisions made without what tiers hold: the index did not answer."
)
STORES = Gauge("kvlane_gateway_stores", "Live stores outside the engines, by the kind of place.", ["tier"])
LIVE_WORKERS = Gauge("kvlane_gateway_live_workers", "Workers with a live lease.")
WORKERS = Gauge(
    "kvlane_gateway_workers",
    "Live workers by whether their tokens and hashes are ours: exact, degraded, checking.",
    ["state"],
)
RATES = Gauge(
    "kvlane_gateway_worker_rates",
    "Live workers by where their rates come from: measured by the worker, by another of its pool, or the "
    "settings' profile.",
    ["source"],
)
POOL_EXACT = Gauge(
    "kvlane_gateway_pool_exact",
    "1 while every live worker of the pool is exact, 0 otherwise.",
    ["model", "block_size"],
)
UNREACHABLE_ENDPOINTS = Gauge("kvlane_gateway_unreachable_endpoints", "Live endpoints that refuse us.")
INDEX_AVAILABLE = Gauge("kvlane_gateway_index_available", "1 while the index answers, 0 otherwise.")
ADMISSIONS = Counter(
    "kvlane_gateway_admissions",
    "Judged requests, by what the plan meant for them: in_time, late, over_share.",
    ["tenant", "verdict"],
)
TTFT_TARGETS = Counter(
    "kvlane_gateway_ttft_targets",
    "Streamed requests with a target, by whether their first token was measured within it: met, missed.",
    ["tenant", "outcome"],
)
