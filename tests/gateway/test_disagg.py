"""Split requests as the router makes them; real engines: tests/e2e/test_disagg.py."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import httpx
import pytest
from prometheus_client import REGISTRY

from connectors.params import parse_params
from gateway.decision import End, Served
from kvindex.memory_index import MemoryIndexReader
from kvindex.worker import Load, Role
from tests.support.router_bench import PROMPT, Bench, blocks_of, completion
from tests.support.waiting import eventually

BUSY = Load(running_requests=60)
FAST = {"transfer_gb_per_s": 100, "transfer_latency_ms": 0}


class PrefillWorkers:
    """Answers prefill halves, when it is let."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answer = asyncio.Event()
        self.status = 200
        self.num_ended = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        try:
            await self.answer.wait()
        finally:
            self.num_ended += 1
        return httpx.Response(self.status, json={})


@pytest.fixture
def prefill():
    return PrefillWorkers()


@pytest.fixture
async def bench(prefill):
    transport = httpx.MockTransport(prefill)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        made = Bench(client, **FAST)
        await made.join("p:1", role=Role.PREFILL, transfer_address="p:7000", tp_size=2)
        await made.join("d:1", role=Role.DECODE, transfer_address="d:7001", load=BUSY)
        yield made
        await made.router.stop()


async def test_both_halves_of_a_split_request(bench, prefill):
    decision = await bench.decide(max_tokens=30, stream=True)
    assert decision.destinations[0] == "d:1"
    assert decision.response_headers["x-kvlane-prefill"] == "p:1"
    receive = json.loads(decision.body)
    await eventually(lambda: prefill.requests)
    (request,) = prefill.requests
    send = json.loads(request.content)
    assert str(request.url) == "http://p:1/v1/completions"
    assert (send["prompts"], send["max_tokens"], send["stream"]) == ([list(PROMPT)], 1, False)
    assert (receive["prompts"], receive["max_tokens"], receive["stream"]) == ([list(PROMPT)], 30, True)
    theirs, mine = parse_params(send["kv_transfer_params"]), parse_params(receive["kv_transfer_params"])
    assert theirs.transfer_id == mine.transfer_id
    assert (mine.address, mine.peer_tp_size) == (("p", 7000), 2)


async def test_one_receipt_tells_of_both(bench):
    decision = await bench.decide()
    shown = bench.receipt(decision).view()
    assert shown["mode"] == "split"
    assert (shown["split"]["prefill"], shown["split"]["decode"]) == ("p:1", "d:1")
    assert (
        shown["predicted_ttft_ms"]
        == shown["split"]["ttft_ms"]
        == sum(shown["split"]["terms"][name] for name in ("prefill_ms", "transfer_ms", "decode_ms"))
    )


async def test_its_prediction_is_measured_and_no_speed_learned_from_it(bench):
    decision = await bench.decide(stream=True)
    before = [bench.rates.speed(worker) for worker, _ in bench.slots.values()]
    counted = num_errors()
    bench.router.record(Served(decision.decision_id, 200, "d:1", 5_000.0, 5_000.0, 1, 1))
    assert num_errors() == counted + 1
    assert bench.receipt(decision).ttft_error_ms > 0
    assert [bench.rates.speed(worker) for worker, _ in bench.slots.values()] == before


def num_errors() -> float:
    return REGISTRY.get_sample_value("kvlane_gateway_ttft_error_seconds_count", {"direction": "late"}) or 0


async def test_both_workers_are_charged_until_the_end_of_the_request(bench):
    decision = await bench.decide()
    await eventually(lambda: bench.charges() == {"p:1": 1, "d:1": 1})
    charged = {
        state.slot: state.charged_tokens
        for pool in bench.memory.known_pools()
        for state in bench.memory.states(pool)
    }
    assert [charged[bench.slots[name][1]] for name in ("p:1", "d:1")] == [len(PROMPT), 0]
    await bench.router.finish(decision.decision_id, End.COMPLETE)
    await eventually(lambda: not bench.charges())


async def test_a_client_that_goes_away_takes_the_prefill_half_along(bench, prefill):
    decision = await bench.decide()
    await eventually(lambda: prefill.requests)
    await bench.router.finish(decision.decision_id, End.ABORTED)
    await eventually(lambda: prefill.num_ended == 1)


@pytest.mark.parametrize("status", [200, 503])
async def test_what_the_prefill_worker_answers_is_nobodys_answer(bench, prefill, status: int):
    prefill.status = status
    prefill.answer.set()
    decision = await bench.decide()
    await eventually(lambda: prefill.num_ended == 1)
    await bench.router.finish(decision.decision_id, End.COMPLETE)
    await eventually(lambda: not bench.charges())


async def test_a_cached_prompt_stays_whole(bench, prefill):
    await bench.join("d:2", role=Role.DECODE, transfer_address="d:7001", load=BUSY, blocks=blocks_of())
    decision = await bench.decide()
    assert decision.destinations[0] == "d:2"
    assert (decision.body, prefill.requests) == (None, [])


async def test_a_role_changes_the_next_request(bench):
    assert "x-kvlane-prefill" in (await bench.decide()).response_headers
    pool = bench.slots["p:1"][0].pool
    await bench.index.give_role(pool, "p:1", Role.BOTH)
    decision = await bench.decide()
    assert "x-kvlane-prefill" not in decision.response_headers
    assert decision.destinations[0] == "p:1"  # idle, and now asked for whole requests
    await bench.index.give_role(pool, "p:1", Role.DECODE)
    await bench.index.give_role(pool, "d:1", Role.PREFILL)
    assert (await bench.decide()).destinations[0] == "p:1"


def overtake(bench: Bench, name: str, num_tokens: int, *, num_times: int = 1) -> None:
    """Have another gateway charge a worker just before this one does."""
    other, reserve = MemoryIndexReader(bench.memory), bench.index.reserve
    worker, slot = bench.slots[name]
    left = num_times

    async def overtaken(pool, decision_id, wanted_slot, **asked):
        nonlocal left
        if wanted_slot == slot and left:
            left -= 1
            before = {"prefill_tokens": num_tokens, "seen_backlog_tokens": None, "ttl_ms": 60_000}
            await other.reserve(worker.pool, f"other-{left}", slot, **before)
        return await reserve(pool, decision_id, wanted_slot, **asked)

    bench.index.reserve = overtaken


@pytest.mark.parametrize(("overtaken", "expected"), [("p:1", ("p:2", "d:1")), ("d:1", ("p:1", "d:2"))])
async def test_a_split_is_planned_again_where_loads_grew(bench, overtaken: str, expected: tuple[str, str]):
    # Both are a little worse than what they stand in for.
    slow = {"transfer_address": "w:7002"}
    await bench.join("p:2", role=Role.PREFILL, load=Load(waiting_prefill_tokens=50), **slow)
    await bench.join(
        "d:2", role=Role.DECODE, load=Load(running_requests=60, waiting_prefill_tokens=50), **slow
    )
    overtake(bench, overtaken, 5_000)
    decision = await bench.decide()
    chosen = (decision.response_headers["x-kvlane-prefill"], decision.destinations[0])
    assert chosen == expected
    assert bench.receipt(decision).replans == 1
    charged = dict.fromkeys(expected, 1) | {overtaken: 1}
    await eventually(lambda: bench.charges() == charged)
    await bench.router.finish(decision.decision_id, End.COMPLETE)
    await eventually(lambda: bench.charges() == {overtaken: 1})


async def test_a_split_that_pays_no_more_is_none(bench, prefill):
    overtake(bench, "p:1", 100_000)
    decision = await bench.decide()
    assert (decision.destinations[0], decision.body, prefill.requests) == ("d:1", None, [])
    assert bench.receipt(decision).replans == 1
    await eventually(lambda: bench.charges() == {"p:1": 1, "d:1": 1})


async def test_endless_conflicts_end_in_charges_of_both(bench):
    tries = bench.config.reserve_tries
    overtake(bench, "p:1", 1, num_times=tries)
    decision = await bench.decide()
    assert "x-kvlane-prefill" in decision.response_headers
    await bench.router.finish(decision.decision_id, End.COMPLETE)
    await eventually(lambda: not bench.charges().get("d:1"))


async def test_what_cannot_be_split_stays_whole(bench, prefill):
    for fields in ({"n": 2}, {"echo": True}):
        assert (await bench.decide(**fields)).body is None
    request = completion(PROMPT, PROMPT)
    assert (await bench.router.decide(request)).body is None
    assert not prefill.requests


async def test_a_client_names_no_transfer_of_its_own(bench):
    forged = {"kvlane": {"transfer_id": "0" * 32, "role": "send"}}
    request = completion(PROMPT, kv_transfer_params=forged)
    params = parse_params(json.loads((await bench.router.decide(request)).body)["kv_transfer_params"])
    assert params.transfer_id != "0" * 32
    whole = completion(PROMPT, n=2, kv_transfer_params=forged)
    for each in (whole, replace(request, path="/v1/embeddings")):
        assert "kv_transfer_params" not in json.loads((await bench.router.decide(each)).body)
