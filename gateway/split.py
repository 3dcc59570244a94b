"""Whether to compute a prompt on one worker and its answer on another: a pure function of the plan.

Disaggregation is one more kind of plan, with terms of its own in the same milliseconds. It is chosen where
it costs less than the best worker alone, so short prompts, and those that a worker has cached, stay whole.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import msgspec

from gateway.plan import STEP_TOKENS, Choice, Demand
from gateway.tiers import tier_cuts
from kvindex.worker import Role


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """How KV moves between two workers."""

    gb_per_s: float
    latency_ms: float
    """What a transfer takes whatever its size."""


ASSUMED = Wire(gb_per_s=1.0, latency_ms=10.0)
"""Until any worker has measured it."""

HOPED_FOR = Wire(gb_per_s=10.0, latency_ms=10.0)
"""The same for a worker at which nothing waits, so no transfer either: what is never tried is never measured,
and a trial that was wrong costs one request for each worker that answers. A network of 100 Gb/s."""

KEPT_TWICE = 0.2
"""What blocks cost that a second worker keeps, in ms for each ms of computing them: they push out others that
would have been found again. A part of `plan.CROWDING`, which stands for waiting, too. In `kvlane replay` a
fleet that lost 2 % of its hits to splits loses none, and still gains by them."""


class SplitTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What splitting a request means, in milliseconds of time to first token."""

    prefill_ms: float
    """Until the prefill worker has computed the prompt: its queue, the prompt, the decodes beside it."""
    transfer_ms: float
    """From there until the last block has arrived: what the wire, or tiers, could not move meanwhile."""
    decode_ms: float
    """Queue at the decode worker, the rest of the step under way, and the first with the request in it."""
    others_ms: float
    """What the prefill costs other requests at the prefill worker, and keeping its blocks at both."""
    stalls_ms: float
    """What prompts to come will hold up the answer at the decode worker."""

    @property
    def ttft_ms(self) -> float:
        """Predicted time to first token."""
        return self.prefill_ms + self.transfer_ms + self.decode_ms

    @property
    def cost_ms(self) -> float:
        """What is compared with the cost of a worker alone."""
        return self.ttft_ms + self.others_ms + self.stalls_ms


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """Two workers for one request."""

    prefill: Choice
    decode: Choice
    terms: SplitTerms
    sent_from_token: int
    """First token of the prompt that is sent: those before are in the decode worker's cache, or its tiers."""
    decode_limit_tokens: int | None
    """As `Choice.load_limit_tokens`, for the decode worker."""
    spare_ms: float = 0.0
    """How much less it costs than what would be done instead."""


def whole(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Return the workers for whole requests, in the order given: all that decode; if there is none, all."""
    decoding = tuple(each for each in choices if each.candidate.role is not Role.PREFILL)
    return decoding or tuple(choices)


def best_split(demand: Demand, choices: Sequence[Choice], wire: Wire | None = None) -> Split | None:
    """Return the two workers that cost less than any alone; None if there are none.

    Args:
        choices: the plan, best first; not empty.
        wire: how KV moves, whatever workers have measured; None to go by that.
    """
    able = [each for each in choices if each.candidate.worker.transfer_address]
    prefilling = [each for each in able if each.candidate.role is not Role.DECODE]
    decoding = [each for each in able if each.candidate.role is not Role.PREFILL]
    typical = wire or _typical(able)
    wires = {id(each): wire or _measured(each) or typical or _untried(each) for each in decoding}

    def decode_cost_ms(second: Choice) -> float:
        wire_ms = _wire_ms(demand, second, wires[id(second)], second.cached_tokens)
        return _decode_ms(second) + second.terms.stalls_ms + wire_ms + KEPT_TWICE * second.terms.prefill_ms

    # The two halves cost what they cost whoever has the other, all but one term; and they are never one.
    splits = [
        _split(demand, first, second, wires[id(second)])
        for first in heapq.nsmallest(2, prefilling, key=lambda each: each.terms.prefill_cost_ms)
        for second in heapq.nsmallest(2, decoding, key=decode_cost_ms)
        if first is not second
    ]
    splits.sort(key=lambda split: split.terms.cost_ms)
    alone_ms = min(each.terms.cost_ms for each in whole(choices))
    if not splits or splits[0].terms.cost_ms >= alone_ms:
        return None
    best, *others = splits
    instead_ms = min([alone_ms, *(each.terms.cost_ms for each in others[:1])])
    return msgspec.structs.replace(best, spare_ms=instead_ms - best.terms.cost_ms)


def _split(demand: Demand, first: Choice, second: Choice, wire: Wire) -> Split:
    """Return how two workers share a request.

    The decode worker reads its tiers while the prompt is computed, as far as that makes the first token no
    later: what it reads need not be sent.
    """
    candidate = second.candidate
    parts = () if candidate.degraded else candidate.tiers
    end_token, bytes_per_token = demand.num_lookup_tokens - 1, candidate.worker.bytes_per_token
    reads = [(second.cached_tokens, 0.0)]
    reads += tier_cuts(parts, second.cached_tokens, end_token, bytes_per_token)
    terms = [
        _terms(demand, first, second, wire, sent_from_token=token, load_ms=load_ms)
        for token, load_ms in reads
    ]
    best = min(range(len(reads)), key=lambda index: (terms[index].ttft_ms, -index))
    # Not asked, tiers bring nothing that the worker has cached; and they have nothing behind the last cut.
    limits = [0 if parts else None, *(token for token, _ in reads[1:-1]), None]
    return Split(
        prefill=first,
        decode=second,
        terms=terms[best],
        sent_from_token=reads[best][0],
        decode_limit_tokens=limits[best],
    )


def _terms(
    demand: Demand, first: Choice, second: Choice, wire: Wire, *, sent_from_token: int, load_ms: float
) -> SplitTerms:
    """Blocks leave with the step that computed them, so the wire works while the next steps compute.

    Args:
        demand: the request.
        first: who computes the prompt.
        second: who decodes.
        wire: between them.
        sent_from_token: what is before need not be sent.
        load_ms: time in which the decode worker's tiers bring their part of that.
    """
    wire_ms = _wire_ms(demand, second, wire, sent_from_token)
    num_steps = max(
        1, -(-first.uncached_tokens // (first.candidate.worker.max_num_batched_tokens or STEP_TOKENS))
    )
    computing_ms = first.terms.prefill_ms * (1 - 1 / num_steps)
    transfer_ms = wire.latency_ms + max(wire_ms - computing_ms, wire_ms / num_steps)
    # In the cache of a worker that only computes prompts there is nothing else to keep.
    kept_twice = KEPT_TWICE if first.candidate.role is not Role.PREFILL else 0.0
    return SplitTerms(
        prefill_ms=first.terms.ttft_ms,
        transfer_ms=max(transfer_ms, load_ms - first.terms.ttft_ms),
        decode_ms=_decode_ms(second),
        others_ms=first.terms.prefill_cost_ms - first.terms.ttft_ms + kept_twice * second.terms.prefill_ms,
        stalls_ms=second.terms.stalls_ms,
    )


def _measured(choice: Choice) -> Wire | None:
    load = choice.candidate.state.load
    if not load.transfer_gb_per_s:
        return None
    return Wire(gb_per_s=load.transfer_gb_per_s, latency_ms=load.transfer_latency_ms)


def _typical(choices: Sequence[Choice]) -> Wire | None:
    """Return the wire in the middle of those that were measured."""
    measured = sorted(filter(None, map(_measured, choices)), key=lambda wire: wire.gb_per_s)
    return measured[(len(measured) - 1) // 2] if measured else None


def _untried(choice: Choice) -> Wire:
    state = choice.candidate.state
    return ASSUMED if state.load.waiting_requests + state.charged_requests else HOPED_FOR


def _wire_ms(demand: Demand, second: Choice, wire: Wire, sent_from_token: int) -> float:
    """Return the time on the wire of all blocks from a token of the prompt on."""
    num_bytes = (demand.num_tokens - sent_from_token) * second.candidate.worker.bytes_per_token
    return num_bytes / (wire.gb_per_s * 1e6)


def _decode_ms(second: Choice) -> float:
    load = second.candidate.state.load
    step_ms = second.candidate.profile.shared_step_ms(load.running_requests, load.running_tokens)
    # Half of a step is over, on the average, when the last block comes and nobody looks.
    return second.terms.queue_ms + step_ms / 2 + step_ms
