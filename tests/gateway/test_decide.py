from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from gateway.config import GatewayConfig
from gateway.decision import Caller, End, HttpRequest, Served
from gateway.demand import named_model
from gateway.errors import RequestError, TokenizerError
from gateway.labels import parse_selector
from gateway.parity import Reason, degraded, unverified
from gateway.probe import ModelCard, worker_client
from kvindex.blocks import hash_blocks, root_hash
from kvindex.errors import IndexUnavailable
from kvindex.memory_index import MemoryIndexReader
from kvindex.worker import Batch, Load, StepCosts
from tests.support.router_bench import LEASE_MS, PROMPT, Bench, blocks_of, completion
from tests.support.waiting import eventually
from tests.support.workers import make_worker


@pytest.fixture
async def make():
    async with worker_client(GatewayConfig()) as client:
        yield lambda **options: Bench(client, **options)


@pytest.fixture
def bench(make):
    return make()


async def test_a_request_goes_where_its_blocks_are(bench):
    await bench.join("cold:1", "cold:2")
    await bench.join("warm:1", blocks=blocks_of())
    decision = await bench.decide()
    assert decision.destinations[0] == "warm:1"
    assert set(decision.destinations) == {"warm:1", "cold:1", "cold:2"}
    assert decision.response_headers == {
        "x-kvlane-worker": "warm:1",
        "x-kvlane-matched-tokens": "384",
        "x-kvlane-decision": decision.decision_id,
    }
    receipt = bench.receipt(decision)
    assert receipt.mode == "overlap"
    assert len(receipt.choices) == 3
    assert set(receipt.steps_ms) == {"read", "match", "plan", "reserve"}
    assert bench.charges() == {"warm:1": 1}


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ({}, {}, 384),
        ({"cache_salt": "a"}, {"cache_salt": "a"}, 384),
        ({"cache_salt": "a"}, {"cache_salt": "b"}, 0),
        ({}, {"cache_salt": "a"}, 0),
        ({"lora_name": "french"}, {"model": "french"}, 384),
        ({"lora_name": "french"}, {}, 0),
        ({}, {"model": "french"}, 0),
        ({}, {"comparable": 40}, 32),
    ],
)
async def test_salts_adapters_and_media_part_the_prefixes(bench, stored, asked, expected):
    cards = (ModelCard("tiny"), ModelCard("french", parent="tiny"))
    await bench.join("a:1", blocks=blocks_of(**stored), cards=cards)
    decision = await bench.decide(**asked)
    assert decision.response_headers["x-kvlane-matched-tokens"] == str(expected)


async def test_the_prompt_of_a_list_with_most_to_save_decides(bench):
    await bench.join("cold:1")
    await bench.join("warm:1", blocks=blocks_of())
    decision = await bench.router.decide(completion([1, 2, 3], PROMPT, [4] * 50))
    assert decision.destinations[0] == "warm:1"
    receipt = bench.receipt(decision)
    assert receipt.prompt_tokens == 453
    assert receipt.choice.uncached_tokens == 453 - 384


async def test_pools_of_one_model_are_weighed_together(bench):
    await bench.join("small:1", block_size=16)
    await bench.join("large:1", block_size=32, blocks=hash_blocks(root_hash("tiny"), PROMPT, 32))
    decision = await bench.decide()
    assert decision.destinations == ("large:1", "small:1")
    assert bench.charges() == {"large:1": 1}


@pytest.mark.parametrize("end", list(End))
async def test_the_end_settles_once(bench, end):
    await bench.join("a:1")
    decision = await bench.decide()
    assert bench.charges() == {"a:1": 1}
    assert bench.router.requests_in_flight == {"a:1": 1}
    for _ in range(2):
        await bench.router.finish(decision.decision_id, end)
    await bench.router.finish("unknown", end)
    await bench.router.stop()
    assert bench.charges() == {}
    assert bench.router.requests_in_flight == {}
    assert bench.receipt(decision).end is end


async def test_a_burst_spreads_evenly(bench):
    await bench.join("a:1", "b:1", "c:1", "d:1")
    prompts = [tuple(range(n * 1000, n * 1000 + 400)) for n in range(64)]
    decisions = await asyncio.gather(*map(bench.decide, prompts))
    chosen = Counter(decision.destinations[0] for decision in decisions)
    assert max(chosen.values()) - min(chosen.values()) <= 4
    assert sum(bench.charges().values()) == 64
    await asyncio.gather(*(bench.router.finish(d.decision_id, End.COMPLETE) for d in decisions))
    await bench.router.stop()
    assert bench.charges() == {}


async def test_gateways_that_share_an_index_do_not_herd(make):
    benches = [make() for _ in range(4)]
    first = benches[0]
    await first.join("a:1", "b:1", "c:1", "d:1")
    for other in benches[1:]:
        other.index._index = first.memory
        await other.fleet.poll()
    prompts = [tuple(range(n * 1000, n * 1000 + 400)) for n in range(64)]
    decisions = await asyncio.gather(*(benches[n % 4].decide(p) for n, p in enumerate(prompts)))
    chosen = Counter(decision.destinations[0] for decision in decisions)
    assert max(chosen.values()) - min(chosen.values()) <= 6


async def test_a_conflict_makes_a_new_plan(bench):
    await bench.join("a:1", "b:1")
    bench.index.release.clear()
    deciding = asyncio.create_task(bench.decide())
    await bench.index.charging.wait()
    # Whichever it wants, another gateway is faster.
    pool = bench.slots["a:1"][0].pool
    other = MemoryIndexReader(bench.memory)
    for name, tokens in (("a:1", 5000), ("b:1", 100)):
        slot = bench.slots[name][1]
        await other.reserve(
            pool, f"other-{name}", slot, prefill_tokens=tokens, seen_backlog_tokens=None, ttl_ms=60_000
        )
    bench.index.release.set()
    decision = await deciding
    assert decision.destinations[0] == "b:1"
    receipt = bench.receipt(decision)
    assert receipt.replans == 1
    assert receipt.choice.terms.queue_ms == 100


async def test_endless_conflicts_end_in_a_charge(bench):
    await bench.join("a:1")
    pool, slot = bench.slots["a:1"][0].pool, bench.slots["a:1"][1]
    other, reserve = MemoryIndexReader(bench.memory), bench.index.reserve

    async def overtaken(*args, **kwargs):
        name = f"other-{bench.index.num_reserves}"
        await other.reserve(pool, name, slot, prefill_tokens=100, seen_backlog_tokens=None, ttl_ms=60_000)
        return await reserve(*args, **kwargs)

    bench.index.reserve = overtaken
    decision = await bench.decide()
    assert bench.index.num_reserves == bench.config.reserve_tries
    assert bench.charges() == {"a:1": 1 + bench.config.reserve_tries}
    assert decision.destinations == ("a:1",)


async def test_a_worker_that_dies_before_the_charge_is_left_out(bench):
    await bench.join("a:1")
    await bench.join("warm:1", blocks=blocks_of())
    bench.index.release.clear()
    deciding = asyncio.create_task(bench.decide())
    await bench.index.charging.wait()
    bench.leave("warm:1")
    bench.index.release.set()
    decision = await deciding
    assert decision.destinations == ("a:1",)
    assert bench.charges() == {"a:1": 1}


async def test_cancellation_while_charging_settles(bench):
    await bench.join("a:1")
    bench.index.release.clear()
    deciding = asyncio.create_task(bench.decide())
    await bench.index.charging.wait()
    deciding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await deciding
    bench.index.release.set()
    await bench.router.stop()
    assert bench.index.num_reserves == 1
    assert bench.charges() == {}
    assert bench.router.requests_in_flight == {}


async def test_cancellation_at_any_moment_leaves_nothing(bench):
    await bench.join("a:1", "b:1")
    for num_turns in range(40):
        deciding = asyncio.create_task(bench.decide())
        for _ in range(num_turns):
            await asyncio.sleep(0)
        deciding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            decision = await deciding
            await bench.router.finish(decision.decision_id, End.ABORTED)
        await bench.router.stop()
        assert bench.charges() == {}, num_turns
        assert bench.router.requests_in_flight == {}, num_turns


async def test_a_late_charge_costs_no_affinity_and_is_settled(make):
    bench = make(index_deadline_ms=20)
    await bench.join("cold:1")
    await bench.join("warm:1", blocks=blocks_of())
    bench.index.release.clear()
    decision = await bench.decide()
    assert decision.destinations[0] == "warm:1"
    assert "x-kvlane-fallback" not in decision.response_headers
    await bench.router.finish(decision.decision_id, End.COMPLETE)
    bench.index.release.set()
    await bench.router.stop()
    assert bench.charges() == {}


async def test_without_the_index_the_least_loaded_of_the_last_snapshot_serves(bench):
    await bench.join("busy:1", load=Load(running_requests=5))
    await bench.join("idle:1")
    bench.index.away = True
    decision = await bench.decide()
    assert decision.destinations == ("idle:1", "busy:1")
    assert decision.response_headers["x-kvlane-fallback"] == "index_unavailable"
    assert bench.receipt(decision).mode == "load"
    await bench.router.finish(decision.decision_id, End.COMPLETE)
    await bench.router.stop()


async def test_an_outage_spreads_by_our_own_requests(bench):
    await bench.join("a:1", "b:1", "c:1", load=Load(running_requests=1))
    bench.index.away = True
    with pytest.raises(IndexUnavailable):
        await bench.fleet.poll()
    chosen = Counter([(await bench.decide()).destinations[0] for _ in range(30)])
    assert chosen == {"a:1": 10, "b:1": 10, "c:1": 10}


async def test_an_outage_between_charge_and_end_is_no_error(bench):
    await bench.join("a:1")
    decision = await bench.decide()
    bench.index.away = True
    await bench.router.finish(decision.decision_id, End.COMPLETE)
    await bench.router.stop()
    assert bench.router.requests_in_flight == {}


async def test_a_late_index_falls_back_in_time(make):
    bench = make(index_deadline_ms=20)
    await bench.join("a:1")
    bench.index.match_delay_s = 60
    decision = await asyncio.wait_for(bench.decide(), 5)
    assert decision.response_headers["x-kvlane-fallback"] == "index_deadline"
    assert bench.charges() == {}


async def test_a_late_answer_of_the_index_is_not_cut_off(make):
    bench = make(index_deadline_ms=10)
    await bench.join("a:1")
    bench.index.match_delay_s = 0.1
    await bench.decide()
    assert bench.index.num_matches == 0
    await bench.router.stop()
    assert bench.index.num_matches == 1


@pytest.mark.parametrize("is_flushed", [True, False])
async def test_after_an_outage_workers_whose_leases_ran_out_meanwhile_still_serve(make, is_flushed):
    bench = make(recovery_grace_s=0.3)
    await bench.join("a:1", "b:1")
    bench.index.away = True
    with pytest.raises(IndexUnavailable):
        await bench.fleet.poll()
    bench.leave("a:1")
    if is_flushed:
        bench.leave("b:1")
    bench.index.away = False
    await bench.fleet.poll()
    assert bench.fleet.addresses == ("a:1", "b:1")
    decision = await bench.decide()
    assert decision.response_headers.get("x-kvlane-fallback") == ("index_recovering" if is_flushed else None)
    assert set(decision.destinations) == ({"a:1", "b:1"} if is_flushed else {"b:1"})
    await bench.join("a:1")
    assert (await bench.decide()).response_headers.get("x-kvlane-fallback") is None
    await eventually(lambda: not bench.fleet.is_recovering)
    await bench.fleet.poll()
    assert bench.fleet.addresses == (("a:1",) if is_flushed else ("a:1", "b:1"))


async def test_a_worker_that_answers_no_request_is_the_last_choice(bench):
    await bench.join("holder:1", blocks=blocks_of())
    await bench.join("idle:1")
    for name in ("holder:1", "idle:1"):
        worker, _ = bench.slots[name]
        bench.fleet.note_parity(worker, unverified(worker, Reason.NO_ANSWER, "hangs"))
        decision = await bench.decide()
        assert decision.destinations[0] == ("idle:1" if name == "holder:1" else "holder:1")
    bench.leave("idle:1")
    await bench.fleet.poll()
    assert (await bench.decide()).destinations == ("holder:1",)


async def test_a_worker_is_silent_while_requests_wait_and_none_is_answered(make):
    bench = make(silent_after_s=0.05)
    await bench.join("a:1")
    first, second = await bench.decide(), await bench.decide()
    await eventually(lambda: bench.router.silent_workers() == {"a:1"})
    await bench.router.finish(first.decision_id, End.ABORTED)
    await eventually(lambda: bench.router.silent_workers() == {"a:1"})
    await bench.router.finish(second.decision_id, End.COMPLETE)
    assert bench.router.silent_workers() == set()


async def test_a_worker_that_ceases_to_answer_is_silent_whenever_its_last_answer_was(make):
    bench = make(silent_after_s=0.05)
    await bench.join("a:1")
    answered, _ = await bench.decide(), await bench.decide()
    await bench.router.finish(answered.decision_id, End.COMPLETE)
    assert bench.router.silent_workers() == set()
    await eventually(lambda: bench.router.silent_workers() == {"a:1"})


async def test_a_known_outage_is_not_waited_for(bench):
    await bench.join("a:1")
    bench.index.away = True
    with pytest.raises(IndexUnavailable):
        await bench.fleet.poll()
    bench.index.away = False
    decision = await bench.decide()
    assert decision.response_headers["x-kvlane-fallback"] == "index_unavailable"
    assert bench.index.num_matches == 0


@pytest.mark.parametrize(
    ("failure", "delay_s", "reason"),
    [(TokenizerError("no tokenizer"), 0, "tokenizer"), (None, 60, "tokenize_deadline")],
)
async def test_without_tokens_the_load_decides_and_is_charged(make, failure, delay_s, reason):
    bench = make(tokenize_deadline_ms=20)
    await bench.join("busy:1", load=Load(waiting_prefill_tokens=5000), blocks=blocks_of())
    await bench.join("idle:1")
    bench.reader.failure, bench.reader.delay_s = failure, delay_s
    decision = await bench.decide()
    assert decision.destinations[0] == "idle:1"
    assert decision.response_headers["x-kvlane-fallback"] == reason
    assert decision.response_headers["x-kvlane-matched-tokens"] == "0"
    assert bench.charges() == {"idle:1": 1}


async def test_a_long_body_has_more_time(make):
    bench = make(tokenize_deadline_ms=1, tokenize_deadline_ms_per_mb=100_000_000)
    await bench.join("a:1")
    bench.reader.delay_s = 0.05
    decision = await bench.decide()
    assert "x-kvlane-fallback" not in decision.response_headers


async def test_no_live_worker_is_503_with_retry_after(bench):
    await bench.fleet.poll()
    with pytest.raises(RequestError) as refused:
        await bench.decide(model="never seen")
    assert (refused.value.status, refused.value.retry_after_s) == (503, 1)


async def test_an_unknown_model_is_404(bench):
    await bench.join("a:1")
    with pytest.raises(RequestError) as refused:
        await bench.decide(model="other")
    assert refused.value.status == 404
    assert bench.charges() == {}


async def test_a_model_whose_workers_have_gone_is_503(bench):
    await bench.join("a:1")
    await bench.join("b:1", model="big")
    bench.leave("b:1")
    await bench.fleet.poll()
    with pytest.raises(RequestError) as refused:
        await bench.decide(model="big")
    assert refused.value.status == 503


async def test_the_subset_is_kept_and_an_empty_one_is_503(bench):
    await bench.join("a:1", "b:1")
    await bench.join("warm:1", blocks=blocks_of())
    decision = await bench.decide(candidates=frozenset({"a:1", "gone:1"}))
    assert decision.destinations == ("a:1",)
    assert bench.receipt(decision).excluded == dict.fromkeys(("b:1", "warm:1"), "not in the requested subset")
    with pytest.raises(RequestError, match="3 not in the requested subset") as refused:
        await bench.decide(candidates=frozenset({"gone:1"}))
    assert refused.value.status == 503


async def test_an_adapter_goes_to_a_worker_that_has_it(bench):
    await bench.join("plain:1", blocks=blocks_of(lora_name="french"))
    await bench.join("french:1", cards=(ModelCard("tiny"), ModelCard("french", parent="tiny")))
    decision = await bench.decide(model="french")
    assert decision.destinations == ("french:1",)


async def test_a_worker_that_refuses_connections_is_a_last_resort(bench):
    await bench.join("cold:1")
    await bench.join("warm:1", blocks=blocks_of())
    bench.fleet._replace(unreachable=frozenset({"warm:1"}))
    assert (await bench.decide()).destinations == ("cold:1",)
    bench.fleet._replace(unreachable=frozenset({"warm:1", "cold:1"}))
    assert (await bench.decide()).destinations[0] == "warm:1"


async def test_a_rank_is_named_to_its_engine_and_to_those_that_have_it(bench):
    await bench.join("single:1")
    for rank in range(2):
        blocks = blocks_of() if rank else ()
        await bench.join("ranks:1", dp_rank=rank, dp_size=2, incarnation=f"rank{rank}", blocks=blocks)
    decision = await bench.decide()
    assert decision.destinations == ("ranks:1",)
    assert decision.request_headers["x-data-parallel-rank"] == "1"
    assert decision.response_headers["x-kvlane-worker"] == "ranks:1/dp1"
    decision = await bench.decide(headers={"x-data-parallel-rank": "0"}, candidates=frozenset({"ranks:1"}))
    assert decision.request_headers["x-data-parallel-rank"] == "0"


async def test_the_engine_learns_the_decision_from_the_request_id(bench):
    await bench.join("a:1")
    decision = await bench.decide(headers={"x-request-id": "client-7"})
    assert decision.request_headers == {"x-request-id": f"client-7-kv{decision.decision_id}"}
    assert bench.receipts.get("client-7") is bench.receipt(decision)
    other = await bench.decide()
    assert other.request_headers["x-request-id"].endswith(f"-kv{other.decision_id}")
    assert len(other.decision_id) == 16


@pytest.mark.parametrize(
    "request_",
    [
        HttpRequest("GET", "/v1/models", {}, b""),
        HttpRequest("POST", "/v1/other", {}, b"\xff not json"),
        HttpRequest("POST", "/v1/other", {}, b'{"model": "unknown here"}'),
    ],
)
async def test_other_paths_pass_to_the_least_loaded_without_a_charge(bench, request_):
    await bench.join("busy:1", load=Load(running_requests=2))
    await bench.join("a:1", "b:1")
    decisions = [await bench.router.decide(request_) for _ in range(4)]
    assert Counter(d.destinations[0] for d in decisions) == {"a:1": 2, "b:1": 2}
    assert bench.receipt(decisions[0]).mode == "passed"
    assert bench.charges() == {}
    assert bench.index.num_reserves == 0


async def test_other_paths_follow_the_model_that_they_name(bench):
    await bench.join("a:1", "b:1")
    await bench.join("big:1", model="big", load=Load(running_requests=50))
    decision = await bench.router.decide(HttpRequest("POST", "/v1/other", {}, b'{"model": "big"}'))
    assert decision.destinations == ("big:1",)


async def test_fallbacks_are_bounded(make):
    bench = make(fallbacks=1)
    await bench.join("a:1", "b:1", "c:1")
    assert len((await bench.decide()).destinations) == 2


def served(decision, worker="a:1", ttft_ms=2000.0, status=200) -> Served:
    return Served(decision.decision_id, status, worker, ttft_ms, 3000.0, 1, 1)


async def test_measured_ttft_corrects_the_rate_and_completes_the_receipt(bench):
    await bench.join("a:1")
    worker = bench.slots["a:1"][0]
    decision = await bench.decide(stream=True)
    bench.router.record(served(decision))
    assert bench.receipt(decision).served.ttft_ms == 2000
    slower = bench.rates.profile(worker).prefill_tokens_per_s
    assert slower < 1000
    # An answer that is not streamed ends with its first byte; it tells nothing of prefill.
    bench.router.record(served(await bench.decide(stream=False)))
    bench.router.record(served(await bench.decide(stream=True), status=500))
    bench.router.record(served(await bench.decide(stream=True), worker="b:1"))
    assert bench.rates.profile(worker).prefill_tokens_per_s == pytest.approx(slower, rel=1e-3)


async def test_a_plan_goes_by_what_the_worker_measured_once_it_has(bench):
    await bench.join("a:1", "b:1")
    (a, slot), (b, _) = bench.slots["a:1"], bench.slots["b:1"]

    async def planned_with() -> dict[str, float]:
        """Return the prefill tokens/s that a plan went by."""
        candidates = [each.candidate for each in bench.receipt(await bench.decide()).choices]
        return {each.worker.worker_id: each.profile.prefill_tokens_per_s for each in candidates}

    assert await planned_with() == {"a:1": 1_000, "b:1": 1_000}
    costs = StepCosts(num_steps=50, prefill_tokens_per_s=500.0)
    bench.writer.report_costs(a.pool, slot, a.incarnation, costs)
    await bench.fleet.poll()
    # Nobody has measured the other one, which is of the same pool.
    assert await planned_with() == {"a:1": 500, "b:1": 500}
    assert [bench.fleet.snapshot.basis_of(each).source for each in (a, b)] == ["worker", "pool"]
    decision = await bench.decide(stream=True)
    chosen = decision.destinations[0]
    bench.router.record(served(decision, worker=chosen, ttft_ms=60_000))
    slower = (await planned_with())[chosen]
    assert slower < 500
    # It says now that it is twice as fast: so it is, and as far from what it says as before.
    costs = StepCosts(num_steps=90, prefill_tokens_per_s=1_000.0)
    bench.writer.report_costs(a.pool, slot, a.incarnation, costs)
    await bench.fleet.poll()
    assert (await planned_with())[chosen] == pytest.approx(2 * slower, rel=1e-3)


async def test_a_record_of_an_unknown_decision_is_ignored(bench):
    await bench.join("a:1")
    bench.router.record(Served("unknown", 200, "a:1", 1.0, 1.0, 1, 1))
    assert bench.fleet._probe_now.is_set() is False


async def test_a_draining_worker_gets_no_more_requests_and_keeps_those_that_it_has(bench):
    await bench.join("a:1", "b:1", blocks=blocks_of())
    pool = bench.slots["a:1"][0].pool
    first = await bench.decide()
    (chosen, other) = (first.destinations[0], *({"a:1", "b:1"} - {first.destinations[0]}))
    await bench.index.drain(pool, chosen, is_draining=True)
    decision = await bench.decide()
    assert decision.destinations == (other,)
    assert bench.receipt(decision).excluded == {chosen: "draining"}
    assert bench.charges()[chosen] == 1
    await bench.index.drain(pool, other, is_draining=True)
    with pytest.raises(RequestError, match=r"No live worker can serve `tiny` now.*2 draining") as caught:
        await bench.decide()
    assert caught.value.status == 503
    await bench.index.drain(pool, chosen, is_draining=False)
    assert (await bench.decide()).destinations == (chosen,)
    # Where nothing is looked up, and where the index is away, it is as it was last known.
    await bench.fleet.poll()
    request = HttpRequest("GET", "/v1/models", {}, b"")
    assert (await bench.router.decide(request)).destinations == (chosen,)
    bench.index.away = True
    assert (await bench.decide()).destinations == (chosen,)


@pytest.mark.parametrize(
    ("headers", "caller", "chosen"),
    [
        ({"x-kvlane-labels": "gpu=h200"}, None, {"new:1"}),
        ({"x-kvlane-labels": "gpu!=h200,zone"}, None, {"old:1"}),
        ({"x-kvlane-labels": "zone=a"}, None, {"new:1", "old:1"}),
        ({}, Caller("acme", labels=parse_selector("!gpu")), {"old:1"}),
        ({"x-kvlane-labels": "gpu"}, Caller("acme", labels=parse_selector("!gpu")), {"new:1"}),
    ],
)
async def test_a_request_goes_where_its_labels_say(bench, headers, caller, chosen):
    await bench.join("new:1", labels={"gpu": "h200", "zone": "a"})
    await bench.join("old:1", labels={"zone": "a"})
    request = replace(completion(list(PROMPT)), headers=headers, caller=caller)
    decision = await bench.router.decide(request)
    assert set(decision.destinations) == chosen
    # By load alone as well.
    bench.index.away = True
    assert set((await bench.router.decide(request)).destinations) == chosen


async def test_labels_that_no_worker_has_or_nobody_can_read_are_said(bench):
    await bench.join("a:1")

    async def refused(labels: str) -> RequestError:
        request = replace(completion(list(PROMPT)), headers={"x-kvlane-labels": labels})
        with pytest.raises(RequestError) as caught:
            await bench.router.decide(request)
        return caught.value

    missing = await refused("gpu=h300")
    assert missing.status == 503
    assert "1 without the labels gpu=h300" in missing.message
    wrong = await refused("gpu>h300")
    assert wrong.status == 400
    assert wrong.message.startswith("x-kvlane-labels: 'gpu>h300' is no condition on a label: write key=value")


async def test_receipts_hold_no_prompt(bench):
    await bench.join("a:1")
    decision = await bench.decide()
    # As a number of its own: the digits of a time may hold it by chance.
    assert not re.search(r"(?<![\w.])1399(?![\w.])", json.dumps(bench.receipt(decision).view()))


async def test_a_new_worker_is_known_at_its_first_match(bench):
    await bench.join("a:1")
    worker = make_worker("new:1")
    slot = bench.writer.open_slot(worker, lease_ms=LEASE_MS)
    bench.writer.apply(worker.pool, slot, worker.incarnation, Batch(sequence=1, stored=tuple(blocks_of())))
    assert (await bench.decide()).destinations[0] == "new:1"


@pytest.mark.parametrize("body", [b"", b"[]", b'{"model": 3}', b"\xff\xfe", b'{"model": "\xff"}', b"{"])
def test_a_body_without_a_readable_model_names_none(body):
    assert named_model(body) is None


@pytest.mark.parametrize(
    ("reason", "matched_tokens", "fallback"),
    [(Reason.HASHES, "0", "parity_hashes"), (Reason.TOKENIZER, "384", None)],
)
async def test_a_degraded_worker_is_chosen_by_load_and_the_answer_says_so(
    bench, reason, matched_tokens, fallback
):
    await bench.join("a:1", blocks=hash_blocks(root_hash("tiny"), PROMPT, 16))
    worker, _ = bench.slots["a:1"]
    bench.fleet.note_parity(worker, degraded(worker, reason, "they differ"))
    decision = await bench.decide()
    assert decision.response_headers["x-kvlane-matched-tokens"] == matched_tokens
    assert decision.response_headers.get("x-kvlane-fallback") == fallback
    receipt = bench.receipts.get(decision.decision_id)
    assert receipt.mode == ("load" if fallback else "overlap")
    (candidate,) = receipt.view()["candidates"]
    assert (candidate["overlap_blocks"], candidate["degraded"]) == (25, reason if fallback else None)


async def test_an_exact_worker_is_chosen_by_overlap_beside_a_degraded_one(bench):
    blocks = hash_blocks(root_hash("tiny"), PROMPT, 16)
    await bench.join("right:1", "wrong:1", blocks=blocks)
    worker, _ = bench.slots["wrong:1"]
    bench.fleet.note_parity(worker, degraded(worker, Reason.TOKENS, "they differ"))
    decision = await bench.decide()
    assert decision.response_headers["x-kvlane-worker"] == "right:1"
    assert "x-kvlane-fallback" not in decision.response_headers


async def test_nothing_is_learned_from_a_worker_whose_cache_is_not_known(bench):
    await bench.join("a:1")
    worker, _ = bench.slots["a:1"]
    bench.fleet.note_parity(worker, degraded(worker, Reason.TOKENS, "they differ"))
    before = bench.rates.profile(worker).prefill_tokens_per_s
    decision = await bench.decide(stream=True)
    bench.router.record(served(decision, worker="a:1", ttft_ms=1.0))
    assert bench.rates.profile(worker).prefill_tokens_per_s == before


async def test_a_target_sends_to_a_worker_that_meets_it_where_the_plans_first_does_not(make):
    bench = make(admission="shadow")
    await bench.join("idle:1")
    await bench.join("holder:1", blocks=blocks_of(), load=Load(waiting_prefill_tokens=700))
    for target_ms, chosen, verdict in [
        (2_000, "holder:1", "in_time"),
        (450, "idle:1", "in_time"),
        (100, "holder:1", "late"),
    ]:
        decision = await bench.decide(headers={"x-kvlane-ttft-target-ms": str(target_ms)})
        assert decision.destinations[0] == chosen
        receipt = bench.receipt(decision)
        assert (receipt.ttft_target_ms, receipt.verdict) == (target_ms, verdict)
        assert receipt.view()["verdict"] == verdict
        await bench.router.finish(decision.decision_id, End.COMPLETE)
        await bench.router.stop()


async def test_a_target_holds_when_the_plan_is_made_again(make):
    bench, other = make(), make()
    await bench.join("idle:1")
    await bench.join("holder:1", blocks=blocks_of(), load=Load(waiting_prefill_tokens=700))
    other.index._index = bench.memory
    await other.fleet.poll()
    bench.index.release.clear()
    deciding = asyncio.create_task(bench.decide(headers={"x-kvlane-ttft-target-ms": "480"}))
    await bench.index.charging.wait()
    # Another gateway charges the idle one meanwhile; without a target the holder is still first.
    assert (await other.decide(tuple(range(20)))).destinations[0] == "idle:1"
    bench.index.release.set()
    decision = await deciding
    assert bench.receipt(decision).replans == 1
    assert decision.destinations[0] == "idle:1"


@pytest.mark.parametrize("given", ["soon", "0", "-5", "nan", "inf", ""])
async def test_a_target_that_is_no_time_is_refused(bench, given):
    await bench.join("a:1")
    with pytest.raises(RequestError) as caught:
        await bench.decide(headers={"x-kvlane-ttft-target-ms": given})
    assert caught.value.status == 400


async def test_what_no_worker_can_begin_in_time_is_refused_and_leaves_nothing(make):
    bench = make(admission="enforce")
    await bench.join("a:1", load=Load(waiting_prefill_tokens=3_000))
    with pytest.raises(RequestError) as caught:
        await bench.decide(headers={"x-kvlane-ttft-target-ms": "500"})
    assert (caught.value.status, caught.value.retry_after_s) == (429, 3)
    assert "3400 ms" in caught.value.message
    assert bench.charges() == {}
    assert (await bench.decide()).destinations == ("a:1",)


async def test_a_tenant_over_its_share_of_a_busy_fleet_is_refused_until_it_has_less(make):
    bench = make(admission="enforce", fair_share_queue_ms=1_000)
    await bench.join("a:1")

    async def ask(tenant, number):
        request = completion(tuple(range(number * 1000, number * 1000 + 400)))
        return await bench.router.decide(replace(request, caller=Caller(tenant)))

    # Alone, it may have all; then another comes, whose share is as large.
    greedy = [await ask("greedy", number) for number in range(6)]
    modest = await ask("modest", 10)
    with pytest.raises(RequestError, match="more than its share") as caught:
        await ask("greedy", 11)
    assert caught.value.status == 429
    await bench.router.finish(modest.decision_id, End.COMPLETE)
    again = await ask("greedy", 12)
    assert bench.receipt(again).tenant == "greedy"
    for decision in (*greedy, again):
        await bench.router.finish(decision.decision_id, End.COMPLETE)
    assert (await ask("greedy", 13)).destinations == ("a:1",)
