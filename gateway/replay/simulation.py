"""A fleet under a trace, event by event: arrivals, decisions, engines' steps, what engines tell."""

from __future__ import annotations

import enum
import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from gateway.replay.engine import Engine, EngineSpec, Job
from gateway.replay.tiers import SimulatedTiers, TierSpec
from gateway.replay.trace import Trace
from gateway.replay.wire import LEASE_MS, Transfer, Wires, WireSpec
from kvindex.worker import Load, Role


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """A fleet and its surroundings."""

    engine: EngineSpec
    num_workers: int = 8
    num_gateways: int = 1
    """Requests go to them in turn."""
    decision_ms: float = 2.0
    """From a request's arrival to its worker's getting it."""
    event_delay_ms: float = 15.0
    """From a change in an engine's cache to its place in the index."""
    report_ms: float = 100.0
    """How often an engine tells of its load, while that changes."""
    tiers: tuple[TierSpec, ...] = ()
    """What every worker has behind its own cache, fastest first; a worker is a node."""
    tier_belief: float = 1.0
    """How many times as fast as they are the plan takes tiers to be, before it measures."""
    wire: WireSpec | None = None
    """How KV moves between workers; None where it does not, and every request stays whole."""
    roles: tuple[Role, ...] = ()
    """Of each worker; without any, all are for both."""

    def role(self, worker: int) -> Role:
        """Return what a worker is asked to do."""
        return self.roles[worker] if self.roles else Role.BOTH


class Policy(Protocol):
    """What sends requests to workers, one instance a gateway. Told of everything that a gateway may know."""

    async def look(self, job: Job, now_ms: float) -> None:
        """See the request arrive; what it is sent by is known at this moment."""

    async def choose(self, job: Job, now_ms: float) -> int:
        """Return the request's worker: who answers, where `Job.split` has another compute the prompt."""

    def first_token(self, job: Job, now_ms: float) -> None:
        """See the answer to one of its own requests begin."""

    def finished(self, job: Job, now_ms: float) -> None:
        """See one of its own requests end."""


class Surroundings(Protocol):
    """What engines tell, whoever listens: the index, or nobody."""

    def changed(self, worker: int, changes: Mapping[int, bool], now_ms: float) -> None:
        """Content was stored (True) or evicted (False)."""

    def kept(self, store: int, changes: Mapping[int, bool], now_ms: float) -> None:
        """Content was stored in a store outside the engines (True) or evicted (False)."""

    def reported(self, worker: int, load: Load, accepted: Sequence[str], now_ms: float) -> None:
        """An engine tells of its load, which contains the decisions `accepted` for the first time."""


class _Kind(enum.IntEnum):
    """Of events at one moment, the lower come first: what engines do is known before what comes new."""

    WAKE = 0
    CHANGED = 1
    KEPT = 2
    REPORT = 3
    ARRIVE = 4
    PLACE = 5
    LOADED = 6
    RECEIVED = 7
    LEASE = 8


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trace."""

    jobs: tuple[Job, ...]
    num_workers: int
    busy_ms: tuple[float, ...]
    """Time in which each engine computed."""
    num_gaps: Counter[int]
    """Tokens of all answers by the time since the one before (`Engine.num_gaps`)."""
    transfers: tuple[Transfer, ...]
    """KV that moved between workers, for requests that were split."""
    num_expired: int
    """Requests that were to be split, and for whose KV there was no room in time."""


class Simulation:
    """One run. Deterministic: events at the same moment are taken in the order they were foreseen in."""

    def __init__(
        self, fleet: FleetSpec, trace: Trace, policies: Sequence[Policy], surroundings: Surroundings
    ) -> None:
        self._fleet = fleet
        self._jobs = [Job(number, each, each.at_ms) for number, each in enumerate(trace.requests)]
        self._policies = policies
        self._surroundings = surroundings
        self._engines = [Engine(fleet.engine) for _ in range(fleet.num_workers)]
        self._tiers = SimulatedTiers(
            fleet.tiers, fleet.num_workers, fleet.engine.block_size * fleet.engine.bytes_per_token
        )
        self._wires = Wires(
            fleet.wire or WireSpec(0.0),
            fleet.num_workers,
            bytes_per_token=fleet.engine.bytes_per_token,
            block_size=fleet.engine.block_size,
        )
        self._transfers: list[Transfer] = []
        self._num_expired = 0
        self._planned_ms = [-1.0] * fleet.num_workers
        self._accepted: list[list[str]] = [[] for _ in range(fleet.num_workers)]
        self._reporting = [False] * fleet.num_workers
        self._events: list[tuple[float, int, int, Any]] = []
        self._num_events = 0

    @property
    def num_used_blocks(self) -> int:
        """Return the blocks that requests and transfers hold, in all engines."""
        return sum(engine.cache.num_used_blocks for engine in self._engines)

    async def run(self, progress: Callable[[], None] = lambda: None) -> Outcome:
        """Play the trace to the last token of its last request.

        Args:
            progress: called for every request that arrives.
        """
        for job in self._jobs:
            self._foresee(job.arrived_ms, _Kind.ARRIVE, job)
        while self._events:
            now_ms, kind, _, subject = heapq.heappop(self._events)
            if kind == _Kind.WAKE:
                self._wake(subject, now_ms)
            elif kind == _Kind.ARRIVE:
                progress()
                await self._policy_of(subject).look(subject, now_ms)
                self._foresee(now_ms + self._fleet.decision_ms, _Kind.PLACE, subject)
            elif kind == _Kind.PLACE:
                await self._place(subject, now_ms)
            elif kind == _Kind.CHANGED:
                worker, changes = subject
                self._surroundings.changed(worker, changes, now_ms)
            elif kind == _Kind.KEPT:
                store, changes = subject
                self._surroundings.kept(store, changes, now_ms)
            elif kind == _Kind.LOADED:
                self._submit(subject, now_ms)
            elif kind == _Kind.RECEIVED:
                self._receive(subject, now_ms)
            elif kind == _Kind.LEASE:
                self._expire(subject, now_ms)
            else:
                self._report(subject, now_ms)
        return Outcome(
            tuple(self._jobs),
            len(self._engines),
            tuple(engine.busy_ms for engine in self._engines),
            sum((engine.num_gaps for engine in self._engines), Counter()),
            tuple(self._transfers),
            self._num_expired,
        )

    def _foresee(self, at_ms: float, kind: _Kind, subject: object) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at_ms, kind, self._num_events, subject))

    def _policy_of(self, job: Job) -> Policy:
        return self._policies[job.number % len(self._policies)]

    async def _place(self, job: Job, now_ms: float) -> None:
        job.worker = await self._policy_of(job).choose(job, now_ms)
        if (half := job.prefill) is not None:
            job.transfer = half.transfer = Transfer(half.worker, job.worker, job.request.num_tokens)
            self._hand_over(half, now_ms)
        self._hand_over(job, now_ms)

    def _hand_over(self, job: Job, now_ms: float) -> None:
        limit_tokens = job.request.num_tokens - 1
        if job.load_limit_tokens is not None:
            limit_tokens = min(limit_tokens, job.load_limit_tokens)
        blocks = job.request.blocks[: limit_tokens // self._fleet.engine.block_size]
        num_cached = self._engines[job.worker].usable_blocks(job)
        job.loaded_blocks, ready_ms = self._tiers.load(job.worker, blocks, num_cached, now_ms)
        if ready_ms > now_ms:
            self._foresee(ready_ms, _Kind.LOADED, job)
            return
        self._submit(job, now_ms)

    def _submit(self, job: Job, now_ms: float) -> None:
        self._accepted[job.worker].append(job.decision_id)
        self._engines[job.worker].submit(job, now_ms)
        self._go_on(job.worker, now_ms)

    def _wake(self, worker: int, now_ms: float) -> None:
        engine = self._engines[worker]
        if engine.wake_ms != now_ms:
            return  # It was foreseen before an arrival changed the plan.
        ended = engine.wake(now_ms)
        for half, num_tokens in ended.computed:
            self._computed(half, num_tokens, now_ms)
        for job in ended.first_tokens:
            if not job.is_prefill:
                self._policy_of(job).first_token(job, now_ms)
        for job in ended.finished:
            if not job.is_prefill:
                self._policy_of(job).finished(job, now_ms)
        self._go_on(worker, now_ms)

    def _computed(self, half: Job, num_tokens: int, now_ms: float) -> None:
        if (transfer := half.transfer) is not None:
            self._arrives(half, self._wires.computed(transfer, num_tokens, now_ms))
            if num_tokens == transfer.num_tokens and not transfer.is_asked_for:
                self._foresee(now_ms + LEASE_MS, _Kind.LEASE, half)

    def _ask(self, job: Job, now_ms: float) -> None:
        if job.transfer is not None:
            self._arrives(job, self._wires.asked(job.transfer, job.cached_tokens, now_ms))

    def _arrives(self, of: Job, arrived_ms: float | None) -> None:
        if arrived_ms is not None:
            self._foresee(arrived_ms, _Kind.RECEIVED, self._jobs[of.number])

    def _receive(self, job: Job, now_ms: float) -> None:
        if job.transfer is not None and job.prefill is not None:
            self._transfers.append(job.transfer)
            self._wires.arrived(job.transfer)
            self._engines[job.worker].received(job, now_ms)
            self._go_on(job.worker, now_ms)
            self._release(job.prefill, now_ms)

    def _expire(self, half: Job, now_ms: float) -> None:
        if half.transfer is not None and not half.transfer.is_asked_for:
            job = self._jobs[half.number]
            job.prefill, job.awaits_kv = None, False
            self._num_expired += 1
            self._release(half, now_ms)

    def _release(self, half: Job, now_ms: float) -> None:
        self._engines[half.worker].release(half, now_ms)
        self._go_on(half.worker, now_ms)

    def _go_on(self, worker: int, now_ms: float) -> None:
        engine = self._engines[worker]
        if engine.asking:
            asking, engine.asking = engine.asking, []
            for job in asking:
                self._ask(job, now_ms)
        if engine.wake_ms != self._planned_ms[worker]:
            self._planned_ms[worker] = engine.wake_ms
            if engine.is_busy:
                self._foresee(engine.wake_ms, _Kind.WAKE, worker)
        if engine.cache.changes:
            told_ms = now_ms + self._fleet.event_delay_ms
            changes = engine.cache.take_changes()
            self._foresee(told_ms, _Kind.CHANGED, (worker, changes))
            stored = [block for block, is_stored in changes.items() if is_stored]
            for kept in self._tiers.keep(worker, stored):
                self._foresee(told_ms, _Kind.KEPT, kept)
        if not self._reporting[worker]:
            self._reporting[worker] = True
            self._foresee(now_ms + self._fleet.report_ms, _Kind.REPORT, worker)

    def _report(self, worker: int, now_ms: float) -> None:
        engine = self._engines[worker]
        self._tell(worker, now_ms)
        self._reporting[worker] = engine.is_busy
        if engine.is_busy:
            self._foresee(now_ms + self._fleet.report_ms, _Kind.REPORT, worker)

    def _tell(self, worker: int, now_ms: float) -> None:
        engine = self._engines[worker]
        accepted, self._accepted[worker] = self._accepted[worker], []
        load = engine.load(now_ms)
        if self._fleet.wire is not None:
            line = self._wires.paces[worker].line()
            load = msgspec.structs.replace(
                load, transfer_gb_per_s=line.gb_per_s, transfer_latency_ms=line.latency_ms
            )
        self._surroundings.reported(worker, load, accepted, now_ms)
