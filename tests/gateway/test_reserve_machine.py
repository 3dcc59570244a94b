"""Any history of decisions and of what may go wrong with them leaves no charge behind."""

from __future__ import annotations

import asyncio
import contextlib
import enum

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.calls import Calls
from gateway.config import GatewayConfig
from gateway.plan import Candidate, Demand, plan
from gateway.profile import Profile
from gateway.reserve import Charge, Reserver
from kvindex.blocks import BlockHash
from kvindex.errors import IndexUnavailable
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.worker import Load
from tests.support.workers import make_worker

POOL = make_worker().pool
PROMPTS = {POOL: [BlockHash(depth) for depth in range(1, 40)]}
WORKERS = [make_worker(f"{name}:1") for name in "abc"]


class Fault(enum.Enum):
    NONE = enum.auto()
    BEFORE = enum.auto()
    """The index does not answer, and the charge was not made."""
    AFTER = enum.auto()
    """The index does not answer, and the charge was made."""
    LATE = enum.auto()
    """The answer comes when nobody waits any more."""
    CANCELLED = enum.auto()
    """The client goes away while the charge is asked for."""


class End(enum.Enum):
    STREAM = enum.auto()
    ENGINE_FIRST = enum.auto()
    ENGINE_LAST = enum.auto()
    TWICE = enum.auto()


class FaultyReader(MemoryIndexReader):
    fault = Fault.NONE

    def __init__(self, index: MemoryIndex) -> None:
        super().__init__(index)
        self.release = asyncio.Event()

    async def reserve(self, *args, **kwargs):
        fault, self.fault = self.fault, Fault.NONE
        if fault is Fault.BEFORE:
            raise IndexUnavailable("gone before")
        reservation = await super().reserve(*args, **kwargs)
        if fault in (Fault.LATE, Fault.CANCELLED):
            await self.release.wait()
        if fault is Fault.AFTER:
            raise IndexUnavailable("gone after")
        return reservation


class Fleet:
    def __init__(self) -> None:
        self.index = MemoryIndex()
        self.writer = MemoryIndexWriter(self.index)
        self.slots = [self.writer.open_slot(worker, lease_ms=3_600_000) for worker in WORKERS]
        self.reader, self.calls = FaultyReader(self.index), Calls()
        self.reserver = Reserver(GatewayConfig(index_deadline_ms=20), self.reader, self.calls)

    async def charge(self, number: int, num_tokens: int, fault: Fault) -> Charge | None:
        demand = Demand(num_tokens=num_tokens, num_lookup_tokens=num_tokens, model=None)
        match = await self.reader.match(POOL, [])
        profile = Profile(prefill_tokens_per_s=1000)
        candidates = tuple(
            Candidate(worker=WORKERS[state.slot], state=state, overlap_blocks=0, profile=profile)
            for state in match.states
        )
        choices = plan(demand, self.reserver.foreseen(candidates, PROMPTS), seed=number)
        self.reader.fault = fault
        charging = asyncio.create_task(
            self.reserver.charge(f"{number:016x}", demand, candidates, choices, PROMPTS)
        )
        if fault is Fault.CANCELLED:
            await asyncio.sleep(0)
            charging.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await charging
            return None
        return (await charging).charges[0]

    def accept(self, charge: Charge) -> None:
        for slot, worker in zip(self.slots, WORKERS, strict=True):
            self.writer.heartbeat(
                POOL, slot, worker.incarnation, Load(), lease_ms=3_600_000, accepted=[charge.decision_id]
            )

    def end(self, charge: Charge, end: End) -> None:
        if end is End.ENGINE_FIRST:
            self.accept(charge)
        self.reserver.take_back(charge)
        if end is End.TWICE:
            self.reserver.take_back(charge)
        if end is End.ENGINE_LAST:
            self.accept(charge)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 3000), st.sampled_from(Fault), st.sampled_from(End), st.booleans()),
        max_size=12,
    )
)
def test_no_charge_outlives_its_decision(history):
    async def run() -> None:
        fleet = Fleet()
        open_charges: list[tuple[Charge, End]] = []
        for number, (num_tokens, fault, end, ends_now) in enumerate(history):
            charge = await fleet.charge(number, num_tokens, fault)
            if charge is not None:
                open_charges.append((charge, end))
            if ends_now and open_charges:
                fleet.end(*open_charges.pop(0))
        for each in open_charges:
            fleet.end(*each)
        fleet.reader.release.set()
        await fleet.calls.finished()
        match = await fleet.reader.match(POOL, [])
        assert [(state.charged_tokens, state.charged_requests) for state in match.states] == [(0, 0)] * 3
        assert match.pending == ()
        # Nor does the gateway count anything that it asked for.
        state = match.states[0]
        candidate = Candidate(
            worker=WORKERS[0], state=state, overlap_blocks=0, profile=Profile(prefill_tokens_per_s=1)
        )
        assert list(fleet.reserver.foreseen([candidate], PROMPTS)) == [candidate]

    asyncio.run(run())
