"""Which worker answers soonest: a pure function of overlaps, loads and rates.

The same function serves the gateway, the tests and simulation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec
import xxhash

from gateway.labels import ANY_LABELS, Selector
from gateway.parity import Reason
from gateway.profile import Profile, num_pairs
from gateway.tiers import TierLoad, TierPart, tier_cuts, tier_loads
from kvindex.worker import Role, Tier, Worker, WorkerState

TIE_SHARE = 0.1
"""Costs within this share of the best, and of what the whole prompt costs, are equal: measured rates are no
better than that. The second bound keeps a long queue everywhere from making every overlap a tie."""

TIE_MS = 1.0
"""Costs within this time of the best are equal, too."""

CROWDING = 1.0
"""What a ms of prefill costs requests that are still to come, in ms of their TTFT: whoever comes meanwhile
waits for it, and its blocks push out others that would have been found again. `kvlane replay` shows a flat
optimum between 0.5 and 2; without it conversations leave their worker whenever that saves a little once."""

DECODE_WEIGHT = 0.02
"""What a ms by which a running answer is held up costs, in ms of a first token. An answer that stalls is a
little late at its end, which a first token that comes late is from the start. More (0.1) was worth 2 % of the
time to last tokens on a busy fleet and cost 4 % of the times to first."""

STEP_TOKENS = 2048
"""Prompt tokens in a step of an engine that does not tell its budget."""


ANSWER_TOKENS = 256
"""Length of an answer, unless the request bounds it more tightly."""

MOST_PREFILL_SHARE = 0.9
"""Share of prompts in a worker's time that is taken to last at most."""


class Demand(msgspec.Struct, frozen=True, kw_only=True, gc=False):
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
    max_output_tokens: int | None = None
    """Most tokens of its answer, where it says."""
    labels: Selector = ANY_LABELS
    """What a worker's labels must be."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A worker that can serve the request, with what is known of it."""

    worker: Worker
    state: WorkerState
    overlap_blocks: int
    profile: Profile
    """What its steps cost, as far as is known."""
    pending_blocks: int = 0
    """Leading blocks that it has been asked to compute for others, who are in its queue."""
    tiers: tuple[TierPart, ...] = ()
    """Leading tokens that it would load from the stores that it reaches, one part behind the other."""
    role: Role = Role.BOTH
    degraded: Reason | None = None
    """Why the overlap does not count; None where it does."""
    cache_fill: float = 0.0
    """Share of the KV cache that holds indexed blocks, 0 to 1; new blocks evict old ones at 1."""


class Terms(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What sending a request to a worker means, part by part, in milliseconds of time to first token.

    The first four are the prediction of the first token, the next two what it costs others there, the last
    what others cost the rest of its answer.
    """

    queue_ms: float
    """Prefill that is ahead at the worker, attention included."""
    prefill_ms: float
    """This request's tokens that the worker has not cached, attention to the cached ones included."""
    sharing_ms: float = 0.0
    """The fixed part of the steps until then, and the decodes that run in them."""
    load_ms: float = 0.0
    """Loading from tiers what the worker has not cached."""
    slowdown_ms: float = 0.0
    """The prefill as a delay of every answer that is running, by `DECODE_WEIGHT`."""
    crowding_ms: float = 0.0
    """The prefill as a cost to requests still to come, by `CROWDING`."""
    stalls_ms: float = 0.0
    """What prompts to come will hold up the answer there, by `DECODE_WEIGHT`."""

    @property
    def ttft_ms(self) -> float:
        """Predicted time to first token."""
        return self.queue_ms + self.load_ms + self.prefill_ms + self.sharing_ms

    @property
    def cost_ms(self) -> float:
        """What the plan goes by: the prediction, the cost to others and the cost of others."""
        return self.prefill_cost_ms + self.stalls_ms

    @property
    def prefill_cost_ms(self) -> float:
        """The part of it that is over with the first token."""
        return self.ttft_ms + self.slowdown_ms + self.crowding_ms


class Cut(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A way to come by what tiers have: to read them up to a token of the prompt, and to compute the rest."""

    end_token: int
    ttft_ms: float
    """Predicted time to first token."""


class Choice(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A candidate and what sending the request there means."""

    candidate: Candidate
    cached_tokens: int
    pending_tokens: int
    """Tokens behind these that the worker will have computed for others by then."""
    uncached_tokens: int
    """Tokens that it has to compute."""
    terms: Terms
    loads: tuple[TierLoad, ...] = ()
    """What it loads from tiers behind the cached and pending tokens."""
    passed_over: tuple[TierLoad, ...] = ()
    """What tiers have behind that: computing it is predicted to be faster."""
    cuts: tuple[Cut, ...] = ()
    """What was weighed where tiers have anything, from loading nothing to loading all."""

    @property
    def loaded_tokens(self) -> int:
        """Tokens that it has to load."""
        return sum(load.num_tokens for load in self.loads)

    @property
    def load_limit_tokens(self) -> int | None:
        """Leading tokens of the prompt that tiers may be read for; None: whatever they have.

        Where nothing is to be loaded they are not asked: they would bring what the worker has cached.
        """
        if self.loads:
            end_token = self.cached_tokens + self.pending_tokens + self.loaded_tokens
            return end_token if self.passed_over else None
        is_far = any(part.tier is not Tier.CPU for part in self.candidate.tiers)
        return 0 if self.passed_over or is_far else None

    @property
    def charge_tokens(self) -> int:
        """Return the prefill as short prompts' tokens, which is what a reservation charges."""
        return round(self.terms.prefill_ms * self.candidate.profile.prefill_tokens_per_s / 1000)


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
    if not demand.labels.matches(worker.labels):
        return f"without the labels {demand.labels.text}"
    return None


def plan(demand: Demand, candidates: Iterable[Candidate], *, seed: int) -> tuple[Choice, ...]:
    """Return every candidate with its terms, best first; equal input gives equal output.

    The lowest cost wins. Ties go to the worker with fewer requests in hand, then to the one whose cache has
    more room (in tenths), then to the one with less of it in live use, then to the draw of `seed`.
    """
    choices = [weigh(demand, candidate) for candidate in candidates]
    best_ms = min((choice.terms.cost_ms for choice in choices), default=0.0)
    most_ms = max((choice.terms.prefill_ms for choice in choices), default=0.0)
    tied_ms = best_ms + TIE_SHARE * min(best_ms, most_ms) + TIE_MS

    def rank(choice: Choice) -> tuple[float, int, float, float, int]:
        worker, state = choice.candidate.worker, choice.candidate.state
        cost_ms = max(choice.terms.cost_ms, tied_ms)
        fill = round(choice.candidate.cache_fill, 1)
        return cost_ms, num_requests(state), fill, state.load.kv_usage, lot(worker, seed)

    return tuple(sorted(choices, key=rank))


def weigh(demand: Demand, candidate: Candidate) -> Choice:
    """Return the candidate with its terms.

    Blocks that are pending count as cached, since their computation counts as queue: so siblings go together
    until the queue there costs more than computing their prefix again elsewhere.

    What tiers hold behind them is loaded as far as makes the first token soonest; the rest is computed.

    The engine computes at least the last token of a prompt, so a hit ends before the block that
    contains it.

    Source: vLLM 0.32 `vllm/v1/core/kv_cache_manager.py`, get_computed_blocks.
    """
    block_size = candidate.worker.block_size
    usable_blocks = max(demand.num_lookup_tokens - 1, 0) // block_size
    overlap_blocks = 0 if candidate.degraded else min(candidate.overlap_blocks, usable_blocks)
    known_blocks = 0 if candidate.degraded else min(candidate.pending_blocks, usable_blocks)
    cached_tokens = overlap_blocks * block_size
    pending_tokens = max(known_blocks - overlap_blocks, 0) * block_size
    num_before = cached_tokens + pending_tokens
    parts = () if candidate.degraded else candidate.tiers
    end_token, bytes_per_token = demand.num_lookup_tokens - 1, candidate.worker.bytes_per_token
    best_end, best = num_before, _terms(demand, candidate, num_before, 0.0)
    cuts: list[Cut] = []
    for cut_end, load_ms in tier_cuts(parts, num_before, end_token, bytes_per_token):
        cuts = cuts or [Cut(end_token=num_before, ttft_ms=best.ttft_ms)]
        terms = _terms(demand, candidate, cut_end, load_ms)
        cuts.append(Cut(end_token=cut_end, ttft_ms=terms.ttft_ms))
        if terms.ttft_ms < best.ttft_ms:
            best_end, best = cut_end, terms
    loads = tier_loads(parts, num_before, best_end, bytes_per_token)
    read_from = best_end if loads else 0
    return Choice(
        candidate=candidate,
        cached_tokens=cached_tokens,
        pending_tokens=pending_tokens,
        uncached_tokens=demand.num_tokens - best_end,
        terms=best,
        loads=loads,
        passed_over=tier_loads(parts, best_end, end_token, bytes_per_token, read_from=read_from),
        cuts=tuple(cuts),
    )


def _terms(demand: Demand, candidate: Candidate, first_token: int, load_ms: float) -> Terms:
    """Return the terms of computing the prompt from `first_token` on; what is before takes `load_ms`."""
    profile, state = candidate.profile, candidate.state
    load, num_tokens = state.load, demand.num_tokens - first_token
    prefill_ms = profile.prefill_ms(num_tokens, num_pairs(num_tokens, first_token))
    step_tokens = max(1, (candidate.worker.max_num_batched_tokens or STEP_TOKENS) - load.running_requests)
    num_steps = -(-(state.backlog_tokens + num_tokens) // step_tokens)
    return Terms(
        queue_ms=profile.prefill_ms(state.backlog_tokens, load.waiting_prefill_pairs),
        prefill_ms=prefill_ms,
        sharing_ms=num_steps * profile.shared_step_ms(load.running_requests, load.running_tokens),
        load_ms=load_ms,
        slowdown_ms=DECODE_WEIGHT * load.running_requests * prefill_ms,
        crowding_ms=CROWDING * prefill_ms,
        stalls_ms=_stalls_ms(demand, candidate),
    )


def _stalls_ms(demand: Demand, candidate: Candidate) -> float:
    """Return what an answer loses to prompts, if these take the share of time there that they took lately.

    So where there is enough to do, workers with many prompts and few answers keep being that, and others the
    reverse; nobody has to give them roles.
    """
    load = candidate.state.load
    num_tokens = ANSWER_TOKENS
    if demand.max_output_tokens is not None:
        num_tokens = min(num_tokens, demand.max_output_tokens)
    step_ms = candidate.profile.shared_step_ms(load.running_requests, load.running_tokens)
    share = min(load.prefill_share, MOST_PREFILL_SHARE)
    return DECODE_WEIGHT * num_tokens * step_ms * share / (1 - share)


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
