"""Whether to compute a prompt on one worker and its answer on another: a pure function of the plan.

Disaggregation is one more kind of plan, with terms of its own in the same milliseconds. It is chosen where
it costs less than the best worker alone, so short prompts, and those that a worker has cached, stay whole.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import msgspec

from gateway.plan import STEP_TOKENS, Choice, Demand
from kvindex.worker import Role


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """How KV moves between two workers."""

    gb_per_s: float
    latency_ms: float
    """What a transfer takes whatever its size."""


ASSUMED = Wire(gb_per_s=1.0, latency_ms=10.0)
"""Until a worker has measured it."""


class SplitTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What splitting a request means, in milliseconds of time to first token."""

    prefill_ms: float
    """Until the prefill worker has computed the prompt: its queue, the prompt, the decodes beside it."""
    transfer_ms: float
    """From there until the last block has arrived: what the wire could not move meanwhile."""
    decode_ms: float
    """Queue and first step at the decode worker."""
    others_ms: float
    """What the prefill costs other requests at the prefill worker."""

    @property
    def ttft_ms(self) -> float:
        """Predicted time to first token."""
        return self.prefill_ms + self.transfer_ms + self.decode_ms

    @property
    def cost_ms(self) -> float:
        """What is compared with the cost of a worker alone."""
        return self.ttft_ms + self.others_ms


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """Two workers for one request."""

    prefill: Choice
    decode: Choice
    terms: SplitTerms
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
    # The two halves cost what they cost whoever has the other, all but one term; and they are never one.
    splits = [
        Split(prefill=first, decode=second, terms=_terms(demand, first, second, wire))
        for first in heapq.nsmallest(2, prefilling, key=lambda each: each.terms.cost_ms)
        for second in heapq.nsmallest(
            2, decoding, key=lambda each: _decode_ms(each) + _wire_ms(demand, each, wire)
        )
        if first is not second
    ]
    splits.sort(key=lambda split: split.terms.cost_ms)
    alone_ms = min(each.terms.cost_ms for each in whole(choices))
    if not splits or splits[0].terms.cost_ms >= alone_ms:
        return None
    best, *others = splits
    instead_ms = min([alone_ms, *(each.terms.cost_ms for each in others[:1])])
    return msgspec.structs.replace(best, spare_ms=instead_ms - best.terms.cost_ms)


def _terms(demand: Demand, first: Choice, second: Choice, wire: Wire | None) -> SplitTerms:
    """Blocks leave with the step that computed them, so the wire works while the next steps compute."""
    wire_ms = _wire_ms(demand, second, wire)
    num_steps = max(
        1, -(-first.uncached_tokens // (first.candidate.worker.max_num_batched_tokens or STEP_TOKENS))
    )
    computing_ms = first.terms.prefill_ms * (1 - 1 / num_steps)
    return SplitTerms(
        prefill_ms=first.terms.ttft_ms,
        transfer_ms=_wire(second, wire).latency_ms + max(wire_ms - computing_ms, wire_ms / num_steps),
        decode_ms=_decode_ms(second),
        others_ms=first.terms.cost_ms - first.terms.ttft_ms,
    )


def _wire(second: Choice, given: Wire | None) -> Wire:
    load = second.candidate.state.load
    if given is not None or not load.transfer_gb_per_s:
        return given or ASSUMED
    return Wire(gb_per_s=load.transfer_gb_per_s, latency_ms=load.transfer_latency_ms)


def _wire_ms(demand: Demand, second: Choice, wire: Wire | None) -> float:
    """Return the time on the wire of all blocks that the decode worker does not have."""
    num_bytes = (demand.num_tokens - second.cached_tokens) * second.candidate.worker.bytes_per_token
    return num_bytes / (_wire(second, wire).gb_per_s * 1e6)


def _decode_ms(second: Choice) -> float:
    load = second.candidate.state.load
    step_ms = second.candidate.profile.shared_step_ms(load.running_requests, load.running_tokens)
    return second.terms.queue_ms + step_ms
