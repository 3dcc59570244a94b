import itertools

import msgspec
import pytest

from gateway.plan import Candidate, Demand, plan
from gateway.profile import Profile
from gateway.split import KEPT_TWICE, Wire, best_split, whole
from gateway.tiers import TierPart, TierSpeed
from kvindex.worker import Load, Role, Tier, WorkerState
from tests.support.workers import make_worker

WIRE = Wire(gb_per_s=1.0, latency_ms=1.0)
FREE = Wire(gb_per_s=1e9, latency_ms=0.0)
LONG = 8_000


def candidate(
    name: str,
    role: Role = Role.BOTH,
    *,
    overlap: int = 0,
    backlog: int = 0,
    running: int = 0,
    address: str = "10.0.0.1:7000",
    budget: int = 2_000,
    measured: Wire | None = None,
    waiting: int = 0,
    prompts: float = 0.0,
    step_ms: float = 0.0,
    tiers: tuple[TierPart, ...] = (),
) -> Candidate:
    load = Load(
        waiting_prefill_tokens=backlog,
        running_requests=running,
        waiting_requests=waiting,
        prefill_share=prompts,
    )
    if measured:
        load = msgspec.structs.replace(
            load, transfer_gb_per_s=measured.gb_per_s, transfer_latency_ms=measured.latency_ms
        )
    worker = make_worker(
        name, transfer_address=address, max_num_batched_tokens=budget, bytes_per_token=100_000
    )
    return Candidate(
        worker=worker,
        state=WorkerState(slot=0, load=load, charged_tokens=0, charged_requests=0),
        role=role,
        overlap_blocks=overlap,
        tiers=tiers,
        profile=Profile(prefill_tokens_per_s=10_000, step_ms=step_ms),
    )


def split(
    *candidates: Candidate, num_tokens: int = LONG, wire: Wire | None = WIRE, answer: int | None = None
):
    demand = Demand(
        num_tokens=num_tokens, num_lookup_tokens=num_tokens, model="tiny", max_output_tokens=answer
    )
    return best_split(demand, plan(demand, candidates, seed=0), wire)


def names(found) -> tuple[str, str]:
    return found.prefill.candidate.worker.worker_id, found.decode.candidate.worker.worker_id


def test_an_idle_decode_worker_computes_the_prompt_itself():
    assert split(candidate("p:1", Role.PREFILL), candidate("d:1", Role.DECODE)) is None


def test_where_answers_run_the_prompt_is_computed_elsewhere():
    found = split(candidate("p:1", Role.PREFILL), candidate("d:1", Role.DECODE, running=60))
    assert names(found) == ("p:1", "d:1")


def test_an_idle_worker_for_both_does_it_all():
    assert split(candidate("busy:1", running=60), candidate("idle:1"), candidate("p:1", Role.PREFILL)) is None


def test_a_short_prompt_stays_whole():
    workers = candidate("p:1", Role.PREFILL), candidate("d:1", Role.DECODE, running=60)
    assert split(*workers, num_tokens=LONG) is not None
    assert split(*workers, num_tokens=10) is None


def test_a_prompt_that_the_decode_worker_has_stays_whole():
    blocks = (LONG - 1) // 16
    workers = candidate("p:1", Role.PREFILL), candidate("d:1", Role.DECODE, running=60, overlap=blocks)
    assert split(*workers) is None


def test_blocks_that_the_decode_worker_has_are_not_on_the_wire():
    prefill = candidate("p:1", Role.PREFILL, overlap=400)
    without = split(prefill, candidate("d:1", Role.DECODE, running=600))
    with_half = split(prefill, candidate("d:1", Role.DECODE, running=600, overlap=250))
    assert with_half.terms.transfer_ms == pytest.approx(without.terms.transfer_ms / 2, rel=0.01)


def held(*ends: int, gb_per_s: float, latency_ms: float = 0.0) -> tuple[TierPart, ...]:
    """Return parts of a prompt, one behind the other, up to these tokens, each in a store of its own."""
    speed = TierSpeed(gb_per_s=gb_per_s, latency_ms=latency_ms)
    return tuple(
        TierPart(
            store=f"disk-{end}", tier=Tier.DISK, first_token=first, end_token=end, speed=speed, known=speed
        )
        for first, end in itertools.pairwise((0, *ends))
    )


def test_what_the_decode_workers_tiers_bring_in_time_is_not_sent():
    """200 MB of 800 are read while the prompt is computed: 100 ms at 2 GB/s."""
    prefill = candidate("p:1", Role.PREFILL, overlap=400)
    tiers = held(2_048, gb_per_s=2.0)
    found = split(prefill, candidate("d:1", Role.DECODE, running=600, tiers=tiers))
    assert (found.sent_from_token, found.decode_limit_tokens) == (2_048, None)
    assert found.terms.transfer_ms == pytest.approx(1 + (800 - 204.8))


def test_tiers_that_would_be_late_are_not_read():
    prefill = candidate("p:1", Role.PREFILL)
    slow = split(prefill, candidate("d:1", Role.DECODE, running=600, tiers=held(2_048, gb_per_s=0.1)))
    assert (slow.sent_from_token, slow.decode_limit_tokens) == (0, 0)
    assert slow.terms == split(prefill, candidate("d:1", Role.DECODE, running=600)).terms
    # The first part comes within 205 ms, both of them come too late.
    both = held(2_048, 4_096, gb_per_s=1.0, latency_ms=600.0)
    partly = split(prefill, candidate("d:1", Role.DECODE, running=600, tiers=both))
    assert (partly.sent_from_token, partly.decode_limit_tokens) == (2_048, 2_048)
    none = split(prefill, candidate("d:1", Role.DECODE, running=600))
    assert (none.sent_from_token, none.decode_limit_tokens) == (0, None)


def test_the_wire_works_while_the_prompt_is_computed():
    """800 MB at 1 GB/s take as long as 8,000 tokens at 10,000/s, in four steps: one is left at the end."""
    found = split(candidate("p:1", Role.PREFILL), candidate("d:1", Role.DECODE, running=600))
    assert found.terms.prefill_ms == pytest.approx(800)
    assert found.terms.transfer_ms == pytest.approx(1 + 200)
    slow = split(
        candidate("p:1", Role.PREFILL),
        candidate("d:1", Role.DECODE, running=600),
        wire=Wire(gb_per_s=0.5, latency_ms=1.0),
    )
    assert slow.terms.transfer_ms == pytest.approx(1 + 1600 - 600)


def test_a_slow_wire_keeps_requests_whole():
    workers = candidate("p:1", Role.PREFILL), candidate("d:1", Role.DECODE, running=60)
    assert split(*workers, wire=Wire(gb_per_s=0.1, latency_ms=1.0)) is None


def test_the_wire_is_as_the_decode_worker_measured_it_unless_it_is_given():
    slow, fast = Wire(gb_per_s=0.5, latency_ms=7.0), Wire(gb_per_s=2.0, latency_ms=0.0)
    prefill = candidate("p:1", Role.PREFILL)
    measured = candidate("d:0", Role.DECODE, running=600, measured=slow)
    assert split(prefill, measured, wire=None).terms.transfer_ms == pytest.approx(7 + 1600 - 600)
    assert split(prefill, measured, wire=WIRE).terms.transfer_ms == pytest.approx(1 + 200)
    quick = candidate("d:2", Role.DECODE, running=600, measured=fast)
    assert names(split(prefill, measured, quick, wire=None)) == ("p:1", "d:2")


def test_who_has_measured_nothing_has_a_wire_like_others():
    prefill, unmeasured = candidate("p:1", Role.PREFILL), candidate("d:0", Role.DECODE, running=600)
    others = [
        candidate(
            f"d:{gb_per_s}",
            Role.DECODE,
            running=600,
            backlog=90_000,
            measured=Wire(gb_per_s=gb_per_s, latency_ms=3.0),
        )
        for gb_per_s in (0.5, 1.0, 8.0)
    ]
    found = split(prefill, unmeasured, *others, wire=None)
    assert names(found) == ("p:1", "d:0")
    assert found.terms.transfer_ms == pytest.approx(3 + 200)


def test_where_nobody_has_measured_one_transfer_is_tried_and_then_waited_for():
    prefill = candidate("p:1", Role.PREFILL)
    trial = split(prefill, candidate("d:1", Role.DECODE, running=600), wire=None)
    assert trial.terms.transfer_ms == pytest.approx(10 + 20)
    waiting = split(prefill, candidate("d:1", Role.DECODE, running=600, waiting=1), wire=None)
    assert waiting.terms.transfer_ms == pytest.approx(10 + 200)


def test_among_workers_for_both_answers_go_where_few_prompts_are():
    """The one with few answers is the place for a prompt, and so no place for one more answer."""
    prompts = candidate("many prompts:1", running=1, prompts=0.8, step_ms=20)
    answers = candidate("many answers:1", running=60, step_ms=20)
    found = split(prompts, answers, num_tokens=2_000, wire=FREE)
    assert names(found) == ("many prompts:1", "many answers:1")
    assert found.terms.stalls_ms == 0
    assert split(prompts, answers, num_tokens=2_000, wire=FREE, answer=1) is None
    even = candidate("many prompts:1", running=1, prompts=0.1, step_ms=20)
    assert split(even, answers, num_tokens=2_000, wire=FREE) is None


def test_blocks_that_two_workers_keep_push_others_out_unless_one_only_computes_prompts():
    decode = candidate("d:1", running=600)
    both = split(candidate("p:1"), decode)
    alone = split(candidate("p:1", Role.PREFILL), decode)
    assert both is None
    assert alone.terms.others_ms == pytest.approx(800)
    busy = candidate("p:1", running=1, prompts=0.89, step_ms=20)
    kept = split(busy, candidate("d:1", running=30, step_ms=20), num_tokens=2_000, wire=FREE)
    assert kept.terms.others_ms == pytest.approx(200 + 0.02 * 200 + KEPT_TWICE * 200)


def test_the_queue_at_either_end_counts():
    workers = candidate("p:1", Role.PREFILL, backlog=50_000), candidate("d:1", Role.DECODE, running=60)
    assert split(*workers) is None
    decoders = (
        candidate("d:1", Role.DECODE, running=60, backlog=50_000),
        candidate("d:2", Role.DECODE, running=61),
    )
    assert names(split(candidate("p:1", Role.PREFILL), *decoders)) == ("p:1", "d:2")


def test_nobody_is_both_ends():
    for roles in itertools.product(Role, repeat=3):
        workers = [candidate(f"w{i}:1", role, running=60 * i) for i, role in enumerate(roles)]
        found = split(*workers, wire=FREE)
        if found is not None:
            first, second = names(found)
            assert first != second
            assert found.prefill.candidate.role is not Role.DECODE
            assert found.decode.candidate.role is not Role.PREFILL
            assert found.terms.cost_ms == pytest.approx(
                found.terms.prefill_ms
                + found.terms.transfer_ms
                + found.terms.decode_ms
                + found.terms.others_ms
                + found.terms.stalls_ms
            )


def test_who_moves_no_kv_takes_no_part():
    workers = candidate("p:1", Role.PREFILL, address=""), candidate("d:1", Role.DECODE, running=600)
    assert split(*workers, wire=FREE) is None


def test_whole_requests_go_to_those_who_decode_or_to_whoever_is_left():
    demand = Demand(num_tokens=100, num_lookup_tokens=100, model="tiny")
    choices = plan(
        demand, [candidate("p:1", Role.PREFILL), candidate("d:1", Role.DECODE, backlog=9_000)], seed=0
    )
    assert [each.candidate.worker.worker_id for each in whole(choices)] == ["d:1"]
    only = plan(demand, [candidate("p:1", Role.PREFILL)], seed=0)
    assert whole(only) == only
