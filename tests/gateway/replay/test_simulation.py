from __future__ import annotations

import asyncio

import pytest

from gateway.profile import Profile
from gateway.replay.engine import EngineSpec, Job
from gateway.replay.knowledge import Told
from gateway.replay.simulation import FleetSpec, Outcome, Simulation
from gateway.replay.trace import TraceRequest, make_trace
from gateway.replay.wire import LEASE_MS, WireSpec

PROFILE = Profile(prefill_tokens_per_s=10_000, step_ms=5)
BUDGET = 1000


class SplitAll:
    """Has worker 0 compute each prompt, and worker 1 answer."""

    async def look(self, job: Job, now_ms: float) -> None:
        """See `Policy`."""

    async def choose(self, job: Job, now_ms: float) -> int:
        """See `Policy`."""
        job.split(0, f"half of {job.number}")
        return 1

    def first_token(self, job: Job, now_ms: float) -> None:
        """See `Policy`."""

    def finished(self, job: Job, now_ms: float) -> None:
        """See `Policy`."""


class Accepted(Told):
    """Remembers which decisions workers have named."""

    def __init__(self, num_workers: int) -> None:
        super().__init__(num_workers)
        self.names: list[tuple[int, str]] = []

    def reported(self, worker, load, accepted, now_ms):
        super().reported(worker, load, accepted, now_ms)
        self.names += [(worker, name) for name in accepted]


def played(
    *requests: tuple[float, int, int, tuple[int, ...]], gb_per_s: float = 1.0, num_blocks: int = 1000
) -> tuple[Outcome, Accepted]:
    """Play requests (time, prompt, answer, blocks); a token is 0.1 MB, so as long on the wire as computed."""
    engine = EngineSpec(
        profile=PROFILE,
        num_blocks=num_blocks,
        block_size=16,
        max_num_batched_tokens=BUDGET,
        bytes_per_token=100_000,
    )
    fleet = FleetSpec(engine=engine, num_workers=2, decision_ms=0.0, wire=WireSpec(gb_per_s, 1.0))
    trace = make_trace("split", 16, ((at, TraceRequest(0.0, *rest)) for at, *rest in requests))
    told = Accepted(2)
    simulation = Simulation(fleet, trace, [SplitAll()], told)
    outcome = asyncio.run(simulation.run())
    assert simulation.num_used_blocks == 0
    return outcome, told


def test_only_the_last_chunk_is_waited_for():
    outcome, told = played((0.0, 4000, 10, ()))
    (job,) = outcome.jobs
    computed_ms = 4 * (5 + 100)
    assert job.prefill.first_token_ms == pytest.approx(computed_ms)
    # The last step's tokens and what was no whole block before it; then one step for one token.
    assert job.first_token_ms == pytest.approx(computed_ms + 100.8 + 1 + 5 + 0.1)
    (transfer,) = outcome.transfers
    assert transfer.num_bytes == 4000 * 100_000
    assert transfer.waited_ms == pytest.approx(101.8)
    assert sorted(told.names) == [(0, "half of 0"), (1, job.decision_id)]
    assert job.finished_ms == pytest.approx(job.first_token_ms + 9 * 5)


def test_blocks_that_the_answering_worker_has_are_not_moved():
    blocks = tuple(range(100))
    outcome, _ = played((0.0, 1600, 5, blocks), (5000.0, 2000, 5, (*blocks, *range(200, 225))))
    first, second = sorted(outcome.transfers, key=lambda each: each.num_tokens)
    assert first.num_bytes == 1600 * 100_000
    assert second.num_bytes == 400 * 100_000
    assert [job.num_hit_tokens for job in outcome.jobs] == [0, 1600]


def test_answers_are_not_held_up_by_prompts_that_others_compute():
    outcome, _ = played((0.0, 100, 400, ()), (500.0, 8000, 5, ()))
    assert max(outcome.num_gaps) * 0.01 == pytest.approx(5 + 0.1)  # the last token of the long prompt


def test_kv_for_which_nobody_has_room_in_time_is_dropped_and_computed_again():
    """The first answer takes all of its worker's cache for longer than a lease."""
    outcome, _ = played((0.0, 160, 2500, ()), (100.0, 800, 5, ()), num_blocks=170)
    first, second = outcome.jobs
    assert first.finished_ms > 100 + LEASE_MS
    assert outcome.num_expired == 1
    assert second.prefill is None
    assert len(outcome.transfers) == 1
    assert second.first_token_ms == pytest.approx(first.finished_ms + 5 + 80)


def test_what_is_asked_for_late_is_held_and_then_sent_at_once():
    outcome, _ = played((0.0, 160, 1500, ()), (100.0, 800, 5, ()), num_blocks=110)
    first, second = outcome.jobs
    assert outcome.num_expired == 0
    assert second.first_token_ms == pytest.approx(first.finished_ms + 80 + 1 + 5 + 0.1)
