"""Charging a plan's best worker in the index, and taking the charge back exactly once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from gateway import metrics
from gateway.calls import Calls
from gateway.config import GatewayConfig
from gateway.plan import Candidate, Choice, Demand, plan
from gateway.service import prefer
from kvindex.blocks import Pool
from kvindex.errors import IndexUnavailable
from kvindex.index import IndexReader
from kvindex.worker import Reservation, WorkerState


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


class Reserver:
    """Makes and settles reservations on one event loop.

    Whoever gives up waiting for a reservation has it settled after its answer, so that it cannot
    outlive its request.
    """

    def __init__(self, config: GatewayConfig, index: IndexReader, calls: Calls) -> None:
        self._config = config
        self._index = index
        self._calls = calls
        self._asked_tokens: dict[tuple[Pool, int], list[int]] = {}

    def foreseen(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Yield the candidates with the charges added that this gateway has asked for and not been told of.

        Without them, requests that arrive together would all see the same idle worker.
        """
        for candidate in candidates:
            state = candidate.state
            if asked := self._asked_tokens.get((candidate.worker.pool, state.slot)):
                state = msgspec.structs.replace(
                    state,
                    charged_tokens=state.charged_tokens + sum(asked),
                    charged_requests=state.charged_requests + len(asked),
                )
                yield msgspec.structs.replace(candidate, state=state)
            else:
                yield candidate

    async def charge(
        self,
        decision_id: str,
        demand: Demand,
        candidates: tuple[Candidate, ...],
        choices: tuple[Choice, ...],
        *,
        ttft_target_ms: float | None = None,
    ) -> Charged:
        """Charge the best of `choices`; where loads have grown since, plan again with the new ones.

        The last try charges in any case. An answer that is late or fails costs no affinity: the plan
        stands, charged or not.

        Args:
            candidates: as the index told them.
            choices: the plan for `foreseen(candidates)`; not empty. The result's may be, if every worker
                has gone.
            ttft_target_ms: what the plan was ordered for.
        """
        replans = 0
        while True:
            is_last = replans + 1 >= self._config.reserve_tries
            charge = self._reserve(decision_id, choices[0], in_any_case=is_last)
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
            candidates = tuple(_refreshed(candidates, charge.pool, reservation.states))
            choices = plan(demand, self.foreseen(candidates), seed=int(decision_id, 16))
            choices = prefer(choices, ttft_target_ms)
            if not choices or is_last:
                return Charged(choices, charge, replans)

    def take_back(self, charge: Charge) -> None:
        """Settle in the background, once the reservation's own answer is there."""
        self._calls.start(self._settle(charge))

    def _reserve(self, decision_id: str, choice: Choice, *, in_any_case: bool) -> Charge:
        pool, state = choice.candidate.worker.pool, choice.candidate.state
        call = self._index.reserve(
            pool,
            decision_id,
            state.slot,
            prefill_tokens=choice.charge_tokens,
            seen_backlog_tokens=None if in_any_case else state.backlog_tokens,
            ttl_ms=self._config.reservation_ttl_ms,
        )
        reply = self._calls.start(call)
        asked = self._asked_tokens.setdefault((pool, state.slot), [])
        asked.append(choice.charge_tokens)
        reply.add_done_callback(lambda _: self._told((pool, state.slot), choice.charge_tokens))
        return Charge(decision_id, pool, reply)

    def _told(self, place: tuple[Pool, int], num_tokens: int) -> None:
        asked = self._asked_tokens[place]
        asked.remove(num_tokens)
        if not asked:
            del self._asked_tokens[place]

    async def _settle(self, charge: Charge) -> None:
        # After a failure, too: then it is unknown whether the charge was made.
        with contextlib.suppress(IndexUnavailable):
            await charge.reply
        try:
            await self._index.settle(charge.pool, charge.decision_id)
        except IndexUnavailable:
            metrics.SETTLE_FAILURES.inc()


def _refreshed(
    candidates: Iterable[Candidate], pool: Pool, states: Iterable[WorkerState]
) -> Iterator[Candidate]:
    """Yield the candidates with the new states of `pool`; those that are not in them have died."""
    fresh = {state.slot: state for state in states}
    for candidate in candidates:
        if candidate.worker.pool != pool:
            yield candidate
        elif state := fresh.get(candidate.state.slot):
            yield msgspec.structs.replace(candidate, state=state)
