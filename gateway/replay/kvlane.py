"""Ourselves in a simulation: the real plan, rates and reserve, on the index in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from gateway.calls import Calls
from gateway.config import load_config
from gateway.plan import Candidate, Choice, Demand, plan
from gateway.rates import Rates
from gateway.replay.engine import Job
from gateway.replay.simulation import FleetSpec
from gateway.replay.tiers import reached_by, store_specs
from gateway.reserve import Charge, Prompts, Reserver
from gateway.split import Split, best_split
from gateway.tiers import TierPart, TierSpeeds, tier_runs
from kvindex.blocks import BlockHash
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.pending import pending_blocks
from kvindex.stores import Store
from kvindex.worker import Batch, Load, TierAccess, Worker

_MODEL = "replay"

FOREVER_MS = 1 << 62
"""A lease and a deadline that no simulation sees the end of."""


class SimulatedIndex:
    """The index of a fleet, with a publisher for each engine. Implements `Surroundings`."""

    def __init__(self, fleet: FleetSpec) -> None:
        self._now_ms = 0.0
        index = MemoryIndex(clock=lambda: self._now_ms / 1000)
        self.reader = MemoryIndexReader(index)
        self.workers = [_describe(fleet, number) for number in range(fleet.num_workers)]
        self.pool = self.workers[0].pool
        self._writer = MemoryIndexWriter(index)
        self._sequences = [0] * fleet.num_workers
        for number, worker in enumerate(self.workers):
            slot = self._writer.open_slot(worker, lease_ms=FOREVER_MS)
            assert slot == number  # noqa: S101 (slots are given out in order)
        self.stores = [
            Store(
                name=name,
                tier=spec.tier,
                model=_MODEL,
                chunk_size=fleet.engine.block_size,
                incarnation=name,
            )
            for name, spec in store_specs(fleet.tiers, fleet.num_workers)
        ]
        for store in self.stores:
            self._writer.open_slot(store, lease_ms=FOREVER_MS)
        self._kept = [0] * len(self.stores)

    @property
    def now_ms(self) -> float:
        """The time that reservations live by."""
        return self._now_ms

    async def store_holders(self, blocks: Sequence[BlockHash]) -> list[list[Store]]:
        """Return the stores that hold each block."""
        if not self.stores:
            return []
        found = await self.reader.holders_of(self.stores[0].pool, blocks)
        return [[self.stores[slot] for slot in found[block]] for block in blocks]

    def at(self, now_ms: float) -> None:
        """Set the clock that reservations live by."""
        self._now_ms = now_ms

    def changed(self, worker: int, changes: Mapping[int, bool], now_ms: float) -> None:
        """See `Surroundings`."""
        self.at(now_ms)
        self._sequences[worker] += 1
        batch = Batch(
            sequence=self._sequences[worker],
            stored=tuple(block for block, is_stored in changes.items() if is_stored),
            removed=tuple(block for block, is_stored in changes.items() if not is_stored),
        )
        self._writer.apply(self.pool, worker, self.workers[worker].incarnation, batch)

    def kept(self, store: int, changes: Mapping[int, bool], now_ms: float) -> None:
        """See `Surroundings`."""
        self.at(now_ms)
        self._kept[store] += 1
        batch = Batch(
            sequence=self._kept[store],
            stored=tuple(block for block, is_stored in changes.items() if is_stored),
            removed=tuple(block for block, is_stored in changes.items() if not is_stored),
        )
        of = self.stores[store]
        self._writer.apply(of.pool, store, of.incarnation, batch)

    def reported(self, worker: int, load: Load, accepted: Sequence[str], now_ms: float) -> None:
        """See `Surroundings`."""
        self.at(now_ms)
        incarnation = self.workers[worker].incarnation
        self._writer.heartbeat(self.pool, worker, incarnation, load, lease_ms=FOREVER_MS, accepted=accepted)


class Kvlane:
    """One gateway. Implements `Policy`."""

    def __init__(self, fleet: FleetSpec, index: SimulatedIndex, seed: int) -> None:
        self._index = index
        self._seed = seed
        self._fleet = fleet
        config = load_config(index_deadline_ms=FOREVER_MS // 1_000_000)
        self._reserver = Reserver(config, index.reader, Calls())
        self._rates = Rates(fleet.engine.profile)
        self._speeds = TierSpeeds(
            {spec.tier: spec.speed.slower(1 / fleet.tier_belief) for spec in fleet.tiers},
            clock=lambda: self._index.now_ms / 1000,
        )
        self._found: dict[int, tuple[Demand, tuple[Candidate, ...], Prompts]] = {}
        self._sent: dict[int, tuple[Choice, Split | None, tuple[Charge, ...]]] = {}

    async def look(self, job: Job, now_ms: float) -> None:
        """See `Policy`: match."""
        self._index.at(now_ms)
        job.decision_id = f"{(job.number + 1) * 0x9E3779B97F4A7C15 + self._seed & (1 << 64) - 1:016x}"
        request = job.request
        demand = Demand(num_tokens=request.num_tokens, num_lookup_tokens=request.num_tokens, model=None)
        hashes = [BlockHash(each) for each in request.blocks]
        match = await self._index.reader.match(self._index.pool, hashes)
        pending = pending_blocks(match.pending, hashes)
        holders = await self._index.store_holders(hashes)
        workers = ((self._index.workers[state.slot], state) for state in match.states)
        candidates = tuple(
            Candidate(
                worker=worker,
                state=state,
                overlap_blocks=match.overlap_blocks.get(state.slot, 0),
                pending_blocks=pending.get(state.slot, 0),
                profile=self._rates.profile(worker),
                tiers=self._parts(worker, holders),
                role=self._fleet.role(state.slot),
            )
            for worker, state in workers
        )
        self._found[job.number] = demand, candidates, {self._index.pool: hashes}

    def _parts(self, worker: Worker, holders: Sequence[Sequence[Store]]) -> tuple[TierPart, ...]:
        access = worker.tiers
        if access is None:
            return ()
        return self._speeds.parts(tier_runs(holders, frozenset(access.stores), access.chunk_size))

    async def choose(self, job: Job, now_ms: float) -> int:
        """See `Policy`: plan and reserve."""
        self._index.at(now_ms)
        demand, candidates, prompts = self._found.pop(job.number)
        choices = plan(demand, self._reserver.foreseen(candidates, prompts), seed=int(job.decision_id, 16))
        propose = partial(best_split, demand) if self._fleet.wire is not None else None
        charged = await self._reserver.charge(
            job.decision_id, demand, candidates, choices, prompts, propose=propose
        )
        choice = charged.choices[0]
        job.load_limit_tokens = choice.load_limit_tokens
        if charged.split is not None:
            first = charged.split.prefill
            prefill_id = charged.charges[0].decision_id
            job.split(first.candidate.state.slot, prefill_id, first.load_limit_tokens)
        self._sent[job.number] = choice, charged.split, charged.charges
        return choice.candidate.state.slot

    def first_token(self, job: Job, now_ms: float) -> None:
        """See `Policy`: what the access log tells at a request's end is enough."""

    def finished(self, job: Job, now_ms: float) -> None:
        """See `Policy`: settle, and learn from the time to first token."""
        choice, split, charges = self._sent.pop(job.number)
        self._index.at(now_ms)
        for charge in charges:
            self._reserver.take_back(charge)
        if split is not None:
            return
        if choice.loads:
            self._speeds.observe(
                choice.loads,
                predicted_ms=choice.terms.ttft_ms,
                queue_ms=choice.terms.queue_ms,
                ttft_ms=job.ttft_ms,
            )
            return
        worker = choice.candidate.worker
        num_tokens = choice.uncached_tokens + choice.candidate.state.backlog_tokens
        self._rates.observe(
            worker,
            num_tokens=num_tokens,
            predicted_ms=choice.terms.ttft_ms,
            queue_ms=choice.terms.queue_ms,
            by=choice.candidate.profile,
            ttft_ms=job.ttft_ms,
        )


def _describe(fleet: FleetSpec, number: int) -> Worker:
    host = f"10.0.{number // 250}.{number % 250 + 1}"
    return Worker(
        endpoint=f"{host}:8000",
        model=_MODEL,
        block_size=fleet.engine.block_size,
        num_blocks=fleet.engine.num_blocks,
        bytes_per_token=fleet.engine.bytes_per_token,
        max_model_len=1 << 30,
        incarnation=f"{number:016x}",
        max_num_batched_tokens=fleet.engine.max_num_batched_tokens,
        transfer_address=f"{host}:5600" if fleet.wire is not None else "",
        tiers=TierAccess(
            model=_MODEL, chunk_size=fleet.engine.block_size, stores=reached_by(fleet.tiers, number)
        )
        if fleet.tiers
        else None,
    )
