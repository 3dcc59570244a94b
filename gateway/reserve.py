"""Charging a plan's best worker in the index, and taking the charge back exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from gateway import metrics
from gateway.calls import Calls
from gateway.config import GatewayConfig
from gateway.plan import Candidate, Choice, Demand, plan
from gateway.service import prefer
from gateway.split import Split, whole
from kvindex.blocks import BlockHash, Pool
from kvindex.errors import IndexUnavailable
from kvindex.index import IndexReader
from kvindex.pending import Pending, Sample, pending_blocks, take_sample
from kvindex.worker import Reservation

PENDING_MS = 500
"""How much longer than twice its prediction a prefix counts as on its way: the engine may be late, and its
blocks take a moment into the index."""

Prompts = Mapping[Pool, Sequence[BlockHash]]

Propose = Callable[[Sequence[Choice]], Split | None]


@dataclass(frozen=True, slots=True)
class Charge:
    """A reservation of a decision, from the moment it is asked for."""

    decision_id: str
    pool: Pool
    reply: asyncio.Task[Reservation]


@dataclass(frozen=True, slots=True)
class Charged:
    """A plan whose workers were charged, or were asked to be."""

    choices: tuple[Choice, ...]
    """Who may answer, best first."""
    charges: tuple[Charge, ...]
    """Of a split the prefill worker's, under an id of its own, then the decode worker's."""
    replans: int
    split: Split | None = None
    """How the request is split; its decode worker is the first of the choices."""


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A reservation that the index has not answered yet."""

    num_tokens: int
    sample: Sample


@dataclass(frozen=True, slots=True)
class _Ask:
    """A reservation that is to be made."""

    decision_id: str
    choice: Choice
    num_tokens: int
    spare_tokens: int
    """By how much the worker's backlog may have grown since it was seen."""
    prompts: Prompts
    """What it is to compute, in each pool; empty if nothing."""


class Reserver:
    """Makes and settles reservations on one event loop.

    Whoever gives up waiting for a reservation has it settled after its answer, so that it cannot
    outlive its request.
    """

    def __init__(self, config: GatewayConfig, index: IndexReader, calls: Calls) -> None:
        self._config = config
        self._index = index
        self._calls = calls
        self._asked: dict[tuple[Pool, int], list[_Asked]] = {}

    def foreseen(self, candidates: Iterable[Candidate], prompts: Prompts) -> Iterator[Candidate]:
        """Yield the candidates with what this gateway has asked to be charged and has not been told of.

        Without it, requests that arrive together would all see the same idle worker, and siblings among them
        would not see where the first of them went.
        """
        for candidate in candidates:
            pool, state = candidate.worker.pool, candidate.state
            if asked := self._asked.get((pool, state.slot)):
                state = msgspec.structs.replace(
                    state,
                    charged_tokens=state.charged_tokens + sum(each.num_tokens for each in asked),
                    charged_requests=state.charged_requests + len(asked),
                )
                pending = (Pending(state.slot, each.sample) for each in asked)
                found = pending_blocks(pending, prompts.get(pool, ())).get(state.slot, 0)
                yield msgspec.structs.replace(
                    candidate, state=state, pending_blocks=max(candidate.pending_blocks, found)
                )
            else:
                yield candidate

    async def charge(
        self,
        decision_id: str,
        demand: Demand,
        candidates: tuple[Candidate, ...],
        choices: tuple[Choice, ...],
        prompts: Prompts,
        *,
        ttft_target_ms: float | None = None,
        propose: Propose | None = None,
    ) -> Charged:
        """Charge the best of `choices`, or the two of a split; where loads have grown since, plan again.

        The last try charges in any case. An answer that is late or fails costs no affinity: the plan
        stands, charged or not.

        Args:
            candidates: as the index told them.
            choices: the plan for `foreseen(candidates, prompts)`, of all roles; not empty. The result's may
                be, if every worker has gone.
            prompts: the prompt that was looked up, in each pool.
            ttft_target_ms: what the plan was ordered for.
            propose: how a plan is split; None for what stays whole.
        """
        replans = 0
        while True:
            is_last = replans + 1 >= self._config.reserve_tries
            split = propose(choices) if propose is not None else None
            choices = whole(choices)
            if split is not None:
                choices = (split.decode, *(each for each in choices if each is not split.decode))
            asks = (
                _of_split(decision_id, split, prompts) if split else _of_best(decision_id, choices, prompts)
            )
            charges: list[Charge] = []
            refusal = None
            for ask in asks:
                charge = self._reserve(ask, in_any_case=is_last)
                charges.append(charge)
                try:
                    reservation = await self._calls.within(self._config.index_deadline_ms, charge.reply)
                except (TimeoutError, IndexUnavailable):
                    continue
                except asyncio.CancelledError:
                    for each in charges:
                        self.take_back(each)
                    raise
                if not reservation.charged:
                    refusal = charge, reservation
                    break
            if refusal is None:
                return Charged(choices, tuple(charges), replans, split)
            replans += 1
            metrics.REPLANS.inc()
            charge, reservation = refusal
            candidates = tuple(_refreshed(candidates, charge.pool, reservation, prompts))
            again = plan(demand, self.foreseen(candidates, prompts), seed=int(decision_id, 16))
            again = prefer(again, ttft_target_ms)
            if not again or is_last:
                return Charged(whole(again), tuple(charges), replans)
            for each in charges[:-1]:
                self.take_back(each)
            choices = again

    def take_back(self, charge: Charge) -> None:
        """Settle in the background, once the reservation's own answer is there."""
        self._calls.start(self._settle(charge))

    def _reserve(self, ask: _Ask, *, in_any_case: bool) -> Charge:
        candidate = ask.choice.candidate
        pool, state = candidate.worker.pool, candidate.state
        num_held = max(candidate.overlap_blocks, candidate.pending_blocks)
        sample = take_sample(ask.prompts.get(pool, ()), num_held)
        call = self._index.reserve(
            pool,
            ask.decision_id,
            state.slot,
            prefill_tokens=ask.num_tokens,
            seen_backlog_tokens=None if in_any_case else state.backlog_tokens + ask.spare_tokens,
            ttl_ms=self._config.reservation_ttl_ms,
            sample=sample,
            pending_ms=min(self._config.reservation_ttl_ms, int(2 * ask.choice.terms.ttft_ms) + PENDING_MS),
        )
        reply = self._calls.start(call)
        asked = _Asked(ask.num_tokens, sample)
        place = (pool, state.slot)
        self._asked.setdefault(place, []).append(asked)
        reply.add_done_callback(lambda _: self._told(place, asked))
        return Charge(ask.decision_id, pool, reply)

    def _told(self, place: tuple[Pool, int], told: _Asked) -> None:
        asked = self._asked[place]
        asked[:] = [each for each in asked if each is not told]
        if not asked:
            del self._asked[place]

    async def _settle(self, charge: Charge) -> None:
        # After a failure, too: then it is unknown whether the charge was made.
        with contextlib.suppress(IndexUnavailable):
            await charge.reply
        try:
            await self._index.settle(charge.pool, charge.decision_id)
        except IndexUnavailable:
            metrics.SETTLE_FAILURES.inc()


def _of_best(decision_id: str, choices: tuple[Choice, ...], prompts: Prompts) -> tuple[_Ask, ...]:
    best = choices[0]
    spare_ms = choices[1].terms.cost_ms - best.terms.cost_ms if len(choices) > 1 else 0.0
    return (_Ask(decision_id, best, best.charge_tokens, _spare_tokens(best, spare_ms), prompts),)


def _of_split(decision_id: str, split: Split, prompts: Prompts) -> tuple[_Ask, ...]:
    """The prefill worker is charged with the prompt, the decode worker with a request.

    Each may have grown by half of what is spare.
    """
    first, second = split.prefill, split.decode
    spare_ms = split.spare_ms / 2
    # A new id for every try: what is taken back from the one before may be on its way.
    prefill_id = secrets.token_hex(8)
    return (
        _Ask(prefill_id, first, first.charge_tokens, _spare_tokens(first, spare_ms), prompts),
        _Ask(decision_id, second, 0, _tokens_in(second, spare_ms), {}),
    )


def _spare_tokens(choice: Choice, spare_ms: float) -> int:
    """Return by how much the worker's backlog may grow and the plan still stands.

    That is until it would be behind the next best with this request. Where both are alike nothing is spare,
    so that gateways take turns.
    """
    return max(0, _tokens_in(choice, spare_ms) - choice.charge_tokens)


def _tokens_in(choice: Choice, ms: float) -> int:
    return int(max(0.0, ms) * choice.candidate.profile.prefill_tokens_per_s / 1000)


def _refreshed(
    candidates: Iterable[Candidate], pool: Pool, reservation: Reservation, prompts: Prompts
) -> Iterator[Candidate]:
    """Yield the candidates with what a refused `reservation` tells of `pool`; those not in it have died."""
    fresh = {state.slot: state for state in reservation.states}
    pending = pending_blocks(reservation.pending, prompts.get(pool, ()))
    for candidate in candidates:
        if candidate.worker.pool != pool:
            yield candidate
        elif state := fresh.get(candidate.state.slot):
            yield msgspec.structs.replace(candidate, state=state, pending_blocks=pending.get(state.slot, 0))
