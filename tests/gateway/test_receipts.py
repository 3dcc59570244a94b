from __future__ import annotations

import tracemalloc

import msgspec

from gateway.chains import Chain, make_chain
from gateway.decision import End, Served
from gateway.plan import CROWDING, Candidate, Demand, plan
from gateway.profile import Profile
from gateway.receipts import Receipt, Receipts
from kvindex.blocks import BlockHash
from kvindex.worker import Load, WorkerState
from tests.support.workers import make_worker


def receipt(decision_id: str, request_id: str = "client", **fields) -> Receipt:
    return Receipt(decision_id=decision_id, request_id=request_id, path="/v1/completions", **fields)


def test_a_receipt_is_found_by_decision_and_by_request():
    receipts = Receipts(10)
    first, second = receipt("d1", "same"), receipt("d2", "same")
    receipts.add(first)
    receipts.add(second)
    assert receipts.get("d1") is first
    assert receipts.get("same") is second
    assert receipts.get("unknown") is None


def test_the_oldest_go_first_and_leave_nothing_behind():
    receipts = Receipts(3)
    for number in range(10):
        receipts.add(receipt(f"d{number}", f"r{number}"))
    assert [kept.decision_id for kept in receipts.latest(100)] == ["d9", "d8", "d7"]
    assert [kept.decision_id for kept in receipts.latest(2)] == ["d9", "d8"]
    assert receipts.get("r6") is None
    assert receipts.get("r7").decision_id == "d7"


def test_an_old_receipt_takes_no_newer_one_of_the_same_request_with_it():
    receipts = Receipts(2)
    for decision_id in ("d1", "d2", "d3"):
        receipts.add(receipt(decision_id, "same"))
    assert receipts.get("same").decision_id == "d3"


def test_a_sample_stays_after_it_was_measured_and_so_does_what_load_decided():
    receipts = Receipts(10_000, sample=0.1)
    for number in range(2_000):
        decision_id = f"{number * 2**53:016x}"
        made = receipt(decision_id, f"r{number}", fallback="index_deadline" if number == 1_999 else None)
        receipts.add(made)
        assert receipts.get(decision_id) is made
        receipts.measured(made)
        receipts.measured(made)
    kept = list(receipts.latest())
    assert len(kept) == 206
    assert kept[0].fallback == "index_deadline"
    assert len(receipts._by_request) == 206


def test_the_oldest_go_where_they_take_too_much_memory():
    long = receipt("long", chains=(chain_of(10_000),))
    assert long.num_bytes > 2 * 10_000 * 8
    receipts = Receipts(1_000, max_bytes=3 * long.num_bytes)
    for number in range(9):
        receipts.add(receipt(f"d{number}", chains=(chain_of(10_000),)))
    assert [each.decision_id for each in receipts.latest()] == ["d8", "d7", "d6"]
    # One that is larger than all may be is kept, alone.
    receipts.add(receipt("huge", chains=(chain_of(100_000),)))
    assert [each.decision_id for each in receipts.latest()] == ["huge"]
    receipts.add(receipt("next"))
    assert [each.decision_id for each in receipts.latest()] == ["next"]
    # What has gone takes nothing.
    for number in range(60):
        receipts.add(receipt(f"short{number}"))
    assert len(list(receipts.latest())) == 61


def test_what_a_receipt_is_said_to_take_is_what_it_takes():
    workers = [make_worker(f"10.0.0.{number}:8000") for number in range(64)]

    def made(number: int) -> Receipt:
        candidates = [
            Candidate(
                worker=worker,
                state=WorkerState(
                    slot=slot, load=Load(kv_usage=slot / number), charged_tokens=number, charged_requests=1
                ),
                overlap_blocks=300 + number,
                profile=Profile(prefill_tokens_per_s=1000 + slot + number),
            )
            for slot, worker in enumerate(workers)
        ]
        demand = Demand(num_tokens=5_000, num_lookup_tokens=5_000, model="tiny")
        choices = plan(demand, candidates, seed=number)
        steps_ms = {"read": 1.0 / number}
        return receipt(f"{number:016x}", choices=choices, chains=(chain_of(512),), steps_ms=steps_ms)

    made(1)
    tracemalloc.start()
    kept = [made(number) for number in range(1, 21)]
    taken_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    said_bytes = sum(each.num_bytes for each in kept)
    assert 0.5 * said_bytes < taken_bytes < said_bytes


def chain_of(num_blocks: int) -> Chain:
    hashes = [BlockHash(number) for number in range(num_blocks)]
    return make_chain(make_worker().pool, hashes, hashes, None, max_hashes=num_blocks, overlap_stride=1)


def test_all_stay_by_default():
    receipts = Receipts(10)
    made = receipt("f" * 16)
    receipts.add(made)
    receipts.measured(made)
    assert receipts.get("client") is made


def test_the_view_names_every_candidate_with_its_terms():
    worker = make_worker("a:1")
    state = WorkerState(slot=4, load=Load(waiting_prefill_tokens=100), charged_tokens=20, charged_requests=1)
    candidate = Candidate(
        worker=worker, state=state, overlap_blocks=2, profile=Profile(prefill_tokens_per_s=1000)
    )
    choices = plan(Demand(num_tokens=50, num_lookup_tokens=50, model="tiny"), [candidate], seed=1)
    served = Served("d1", 200, "a:1", 12.5, 80.0, 10, 20)
    full = receipt("d1", choices=choices, chosen="a:1", end=End.COMPLETE, served=served)
    view = msgspec.json.decode(msgspec.json.encode(full.view()))
    (seen,) = view["candidates"]
    assert seen["terms"] == {
        "queue_ms": 120.0,
        "prefill_ms": 18.0,
        "sharing_ms": 0.0,
        "load_ms": 0.0,
        "slowdown_ms": 0.0,
        "crowding_ms": 18.0 * CROWDING,
        "stalls_ms": 0.0,
    }
    assert (seen["worker"], seen["slot"], seen["ttft_ms"]) == ("a:1", 4, 138.0)
    assert (view["matched_tokens"], view["predicted_ttft_ms"]) == (32, 138.0)
    assert (view["served"]["ttft_ms"], view["ttft_error_ms"]) == (12.5, -125.5)
    assert view["end"] == "complete"
