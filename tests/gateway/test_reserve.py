"""Many gateways, one truth: decisions made with the real plan and reserve on a real Redis."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from gateway.calls import Calls
from gateway.config import GatewayConfig
from gateway.plan import Candidate, Demand, plan
from gateway.profile import Profile
from gateway.reserve import Charged, Reserver
from kvindex.blocks import BlockHash
from kvindex.config import IndexConfig
from kvindex.pending import pending_blocks
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Batch, Load
from tests.support.workers import make_worker

PROFILE = Profile(prefill_tokens_per_s=10_000)
POOL = make_worker().pool
LEASE_MS = 3_600_000


class Gateway:
    """What of a gateway decides where a prompt goes."""

    def __init__(self, url: str) -> None:
        config = GatewayConfig(
            redis_url=url, redis_timeout_s=60, index_deadline_ms=60_000, reservation_ttl_ms=3_600_000
        )
        self.reader = RedisIndexReader(config)
        self.calls = Calls()
        self.reserver = Reserver(config, self.reader, self.calls)

    async def send(self, decision_id: str, num_tokens: int, hashes: Sequence[BlockHash] = ()) -> Charged:
        demand = Demand(num_tokens=num_tokens, num_lookup_tokens=16 * len(hashes) + 1, model=None)
        match = await self.reader.match(POOL, hashes)
        pending = pending_blocks(match.pending, hashes)
        candidates = tuple(
            Candidate(
                worker=make_worker(f"10.0.0.{state.slot}:8000"),
                state=state,
                overlap_blocks=match.overlap_blocks.get(state.slot, 0),
                pending_blocks=pending.get(state.slot, 0),
                profile=PROFILE,
            )
            for state in match.states
        )
        prompts = {POOL: hashes}
        choices = plan(demand, self.reserver.foreseen(candidates, prompts), seed=int(decision_id, 16))
        return await self.reserver.charge(decision_id, demand, candidates, choices, prompts)

    async def close(self) -> None:
        await self.calls.finished()
        await self.reader.close()


@pytest.fixture
async def fleet(redis_url):
    """Eight idle workers; a function that opens gateways."""
    writer = RedisIndexWriter(IndexConfig(redis_url=redis_url, redis_timeout_s=60))
    for number in range(8):
        writer.open_slot(make_worker(f"10.0.0.{number}:8000"), lease_ms=LEASE_MS)
    opened: list[Gateway] = []

    def open_gateways(count: int) -> list[Gateway]:
        opened.extend(Gateway(redis_url) for _ in range(count))
        return opened[-count:]

    open_gateways.writer = writer
    yield open_gateways
    for each in opened:
        await each.close()
    writer.close()


AT_ONCE = 64
"""More than a thousand requests a second have under way at once; a slow machine would have all of them."""


async def burst(gateways: list[Gateway], lengths: list[int]) -> Counter[int]:
    """Send a request of each length, as fast as it goes; return the tokens that each slot was given."""
    given: Counter[int] = Counter()
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, num_tokens: int) -> None:
        async with turns:
            charged = await gateways[number % len(gateways)].send(f"{number + 1:016x}", num_tokens)
        given[charged.choices[0].candidate.state.slot] += num_tokens

    await asyncio.gather(*(one(number, num_tokens) for number, num_tokens in enumerate(lengths)))
    for number in range(len(lengths)):
        await gateways[0].reader.settle(POOL, f"{number + 1:016x}")
    assert all(state.charged_requests == 0 for state in (await gateways[0].reader.match(POOL, [])).states)
    return given


async def test_four_gateways_spread_a_burst_as_one_does(fleet):
    lengths = random.Random(7).choices([200, 800, 3200], k=1000)
    one, four = fleet(1), fleet(4)
    alone = await burst(one, lengths)
    together = await burst(four, lengths)
    assert len(alone) == len(together) == 8
    assert max(together.values()) <= 1.1 * max(alone.values())
    assert min(together.values()) >= 0.9 * min(alone.values())


async def send_siblings(gateways: list[Gateway], count: int, hashes: list[BlockHash]) -> list[Charged]:
    return await asyncio.gather(
        *(
            gateways[number % len(gateways)].send(f"{number + 1:016x}", 16 * len(hashes) + 100, hashes)
            for number in range(count)
        )
    )


@pytest.mark.parametrize("num_gateways", [1, 3])
async def test_siblings_go_together_before_the_first_has_stored_a_block(fleet, num_gateways):
    hashes = [BlockHash(random.Random(1).getrandbits(64) + depth) for depth in range(300)]
    gateways = fleet(num_gateways)
    first = await gateways[0].send("ff", 16 * 300 + 100, hashes)
    sent = await send_siblings(gateways, 12, hashes)
    slots = {each.choices[0].candidate.state.slot for each in (first, *sent)}
    assert len(slots) == 1
    assert all(each.choices[0].pending_tokens == 16 * 300 for each in sent)


async def test_a_hot_prefix_spreads_as_its_load_needs_and_no_further(fleet):
    hashes = [BlockHash(10**9 + depth) for depth in range(300)]
    gateways = fleet(2)
    slots: list[int] = []
    for number in range(160):
        charged = await gateways[number % 2].send(f"{number + 1:016x}", 16 * 300 + 100, hashes)
        slots.append(charged.choices[0].candidate.state.slot)
        used = len(set(slots))
        # 100 tokens a request must have queued up beside the 4,800 of the prefix, less what counts as a tie.
        assert used <= 1 + 100 * len(slots) / (0.85 * 4800), (used, len(slots))
    counts = Counter(slots)
    assert 2 <= len(counts) < 8


async def test_siblings_of_a_prefix_that_is_stored_follow_it_after_its_reservation_has_gone(fleet):
    hashes = [BlockHash(10**6 + depth) for depth in range(64)]
    (gateway,) = fleet(1)
    first = await gateway.send("01", 16 * 64 + 100, hashes)
    slot = first.choices[0].candidate.state.slot
    incarnation = first.choices[0].candidate.worker.incarnation
    fleet.writer.apply(POOL, slot, incarnation, Batch(sequence=1, stored=tuple(hashes)))
    fleet.writer.heartbeat(
        POOL, slot, incarnation, Load(running_requests=1), lease_ms=LEASE_MS, accepted=[f"{1:02x}"]
    )
    await gateway.reader.settle(POOL, "01")
    second = await gateway.send("02", 16 * 64 + 100, hashes)
    assert second.choices[0].candidate.state.slot == slot
    assert (second.choices[0].cached_tokens, second.choices[0].pending_tokens) == (16 * 64, 0)
