"""Charging a plan's best worker in the index, and taking the charge back exactly once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from gateway import metrics
from gateway.calls import Calls
from gateway.config import GatewayConfig
from gateway.plan import Candidate, Choice, Demand, plan
from gateway.service import prefer
from gateway.split import whole
from kvindex.blocks import BlockHash, Pool
from kvindex.errors import IndexUnavailable
from kvindex.index import IndexReader
from kvindex.pending import Pending, Sample, pending_blocks, take_sample
from kvindex.worker import Reservation

PENDING_MS = 500
"""How much longer than twice its prediction a prefix counts as on its way: the engine may be late, and its
blocks take a moment into the index."""

Prompts = Mapping[Pool, Sequence[BlockHash]]


@dataclass(frozen=True, slots=True)
class Charge:
    """The one reservation of a decision, from the moment it is asked for."""

    decision_id: str
    pool: Pool
    reply: asyncio.Task[Reservation]


@dataclass(frozen=True, slots=True)
class Charged:
    """A plan whose best worker was charged, or was asked to be."""

    choices: tuple[Choice, ...]
    charge: Charge
    replans: int


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A reservation that the index has not answered yet."""

    num_tokens: int
    sample: Sample


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
    ) -> Charged:
        """Charge the best of `choices`; where loads have grown since, plan again with the new ones.

        The last try charges in any case. An answer that is late or fails costs no affinity: the plan
        stands, charged or not.

        Args:
            candidates: as the index told them.
            prompts: the prompt that was looked up, in each pool.
            choices: the plan for `foreseen(candidates, prompts)`; not empty. The result's may be, if every
                worker has gone.
            ttft_target_ms: what the plan was ordered for.
        """
        replans = 0
        while True:
            is_last = replans + 1 >= self._config.reserve_tries
            best = choices[0]
            seen_tokens = best.candidate.state.backlog_tokens + _spare_tokens(choices)
            charge = self._reserve(
                decision_id,
                best,
                prompts,
                prefill_tokens=best.charge_tokens,
                seen_backlog_tokens=None if is_last else seen_tokens,
            )
            try:
                reservation = await self._calls.within(self._config.index_deadline_ms, charge.reply)
            except (TimeoutError, IndexUnavailable):
                return Charged(choices, charge, replans)
            except asyncio.CancelledError:
                self.take_back(charge)
                raise
            if reservation.charged:
                return Charged(choices, charge, replans)
            replans += 1
            metrics.REPLANS.inc()
            candidates = tuple(_refreshed(candidates, charge.pool, reservation, prompts))
            choices = plan(demand, self.foreseen(candidates, prompts), seed=int(decision_id, 16))
            choices = whole(prefer(choices, ttft_target_ms))
            if not choices or is_last:
                return Charged(choices, charge, replans)

    def charge_in_any_case(
        self, decision_id: str, choice: Choice, prompts: Prompts, prefill_tokens: int
    ) -> Charge:
        """Charge a worker, whatever its load has become, and do not wait for the answer.

        Args:
            prompts: what it is to compute, in each pool; empty if nothing.
        """
        return self._reserve(
            decision_id, choice, prompts, prefill_tokens=prefill_tokens, seen_backlog_tokens=None
        )

    def take_back(self, charge: Charge) -> None:
        """Settle in the background, once the reservation's own answer is there."""
        self._calls.start(self._settle(charge))

    def _reserve(
        self,
        decision_id: str,
        choice: Choice,
        prompts: Prompts,
        *,
        prefill_tokens: int,
        seen_backlog_tokens: int | None,
    ) -> Charge:
        pool, state = choice.candidate.worker.pool, choice.candidate.state
        candidate = choice.candidate
        num_held = max(candidate.overlap_blocks, candidate.pending_blocks)
        sample = take_sample(prompts.get(pool, ()), num_held)
        call = self._index.reserve(
            pool,
            decision_id,
            state.slot,
            prefill_tokens=prefill_tokens,
            seen_backlog_tokens=seen_backlog_tokens,
            ttl_ms=self._config.reservation_ttl_ms,
            sample=sample,
            pending_ms=min(self._config.reservation_ttl_ms, int(2 * choice.terms.ttft_ms) + PENDING_MS),
        )
        reply = self._calls.start(call)
        asked = _Asked(prefill_tokens, sample)
        place = (pool, state.slot)
        self._asked.setdefault(place, []).append(asked)
        reply.add_done_callback(lambda _: self._told(place, asked))
        return Charge(decision_id, pool, reply)

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


def _spare_tokens(choices: tuple[Choice, ...]) -> int:
    """Return by how much the best worker's backlog may grow and the plan still stands.

    That is until it would be behind the next best with this request. Where both are alike nothing is spare,
    so that gateways take turns.
    """
    if len(choices) < 2:
        return 0
    best, following = choices[:2]
    spare_ms = following.terms.cost_ms - best.terms.cost_ms
    spare_tokens = int(spare_ms * best.candidate.profile.prefill_tokens_per_s / 1000)
    return max(0, spare_tokens - best.charge_tokens)


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
