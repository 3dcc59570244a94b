"""Which worker answers soonest: a pure function of overlaps, loads and rates.

The same function serves the gateway, the tests and simulation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec
import xxhash

from gateway.parity import Reason
from kvindex.worker import Worker, WorkerState

TIE_SHARE = 0.1
"""Predictions within this share of the best are equal: measured rates are no better than that."""

TIE_MS = 1.0
"""Predictions within this time of the best are equal, too."""


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks of a worker."""

    num_tokens: int
    """Prompt tokens over all prompts of the request."""
    num_lookup_tokens: int
    """Tokens of the one prompt whose blocks were looked up; 0 where none could be."""
    model: str | None
    """Name in the request: a base model or a LoRA adapter; None where any worker will do."""
    num_context_tokens: int = 0
    """Tokens of the longest prompt."""
    endpoints: frozenset[str] | None = None
    """Subset to choose from; None allows every worker."""
    dp_rank: int | None = None
    """Data-parallel rank that the client insists on."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that can serve the request, with what is known of it."""

    worker: Worker
    state: WorkerState
    overlap_blocks: int
    prefill_tokens_per_s: float
    degraded: Reason | None = None
    """Why the overlap does not count; None where it does."""
    cache_fill: float = 0.0
    """Share of the KV cache that holds indexed blocks, 0 to 1; new blocks evict old ones at 1."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted time to first token, part by part, in milliseconds: their sum is the prediction."""

    queue_ms: float
    """Prefill work that is ahead at the worker."""
    prefill_ms: float
    """This request's tokens that the worker has not cached."""

    @property
    def ttft_ms(self) -> float:
        """Predicted time to first token."""
        return float(sum(msgspec.structs.astuple(self)))


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate and what sending the request there means."""

    candidate: Candidate
    cached_tokens: int
    uncached_tokens: int
    terms: Terms


def obstacle(worker: Worker, served_models: Collection[str], demand: Demand) -> str | None:
    """Return why `worker` cannot serve `demand`, or None."""
    if demand.endpoints is not None and worker.endpoint not in demand.endpoints:
        return "not in the requested subset"
    if demand.model is not None and demand.model not in served_models:
        return "does not serve the model"
    if demand.num_context_tokens > worker.max_model_len:
        return "context too short"
    if demand.dp_rank is not None and worker.dp_size > 1 and worker.dp_rank != demand.dp_rank:
        return "other data-parallel rank"
    return None


def plan(demand: Demand, candidates: Iterable[Candidate], *, seed: int) -> tuple[Choice, ...]:
    """Return every candidate with its terms, best first; equal input gives equal output.

    The lowest predicted TTFT wins. Ties go to the worker with fewer requests in hand, then to the one
    whose cache has more room (in tenths), then to the one with less of it in live use, then to the draw
    of `seed`.
    """
    choices = [weigh(demand, candidate) for candidate in candidates]
    best_ms = min((choice.terms.ttft_ms for choice in choices), default=0.0)
    tied_ms = best_ms * (1 + TIE_SHARE) + TIE_MS

    def rank(choice: Choice) -> tuple[float, int, float, float, int]:
        worker, state = choice.candidate.worker, choice.candidate.state
        ttft_ms = max(choice.terms.ttft_ms, tied_ms)
        fill = round(choice.candidate.cache_fill, 1)
        return ttft_ms, num_requests(state), fill, state.load.kv_usage, lot(worker, seed)

    return tuple(sorted(choices, key=rank))


def weigh(demand: Demand, candidate: Candidate) -> Choice:
    """Return the candidate with its terms.

    The engine computes at least the last token of a prompt, so a hit ends before the block that
    contains it.

    Source: vLLM 0.32 `vllm/v1/core/kv_cache_manager.py`, get_computed_blocks.
    """
    block_size = candidate.worker.block_size
    usable_blocks = max(demand.num_lookup_tokens - 1, 0) // block_size
    overlap_blocks = 0 if candidate.degraded else candidate.overlap_blocks
    cached_tokens = min(overlap_blocks, usable_blocks) * block_size
    uncached_tokens = demand.num_tokens - cached_tokens
    tokens_per_ms = candidate.prefill_tokens_per_s / 1000
    return Choice(
        candidate=candidate,
        cached_tokens=cached_tokens,
        uncached_tokens=uncached_tokens,
        terms=Terms(
            queue_ms=candidate.state.backlog_tokens / tokens_per_ms,
            prefill_ms=uncached_tokens / tokens_per_ms,
        ),
    )


def num_requests(state: WorkerState) -> int:
    """Return the requests that a worker has in hand, reserved ones included."""
    return state.load.running_requests + state.load.waiting_requests + state.charged_requests


def least_loaded(workers: Iterable[Worker], requests: Mapping[str, int], *, seed: int) -> tuple[Worker, ...]:
    """Return the workers by requests in hand (`requests`, by worker id), ties by the draw of `seed`."""

    def rank(worker: Worker) -> tuple[int, int]:
        return requests.get(worker.worker_id, 0), lot(worker, seed)

    return tuple(sorted(workers, key=rank))


def lot(worker: Worker, seed: int) -> int:
    """Return the worker's number in the draw of `seed`, whoever else takes part."""
    return int(xxhash.xxh3_64_intdigest(worker.worker_id.encode(), seed=seed))
