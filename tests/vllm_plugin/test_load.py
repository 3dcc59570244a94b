import enum
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindex.worker import Load
from vllm_plugin.load import LoadTracker
from vllm_plugin.step_times import StepWork


class Status(enum.IntEnum):
    WAITING = 1
    RUNNING = 2
    PREEMPTED = 3


@dataclass
class Request:
    """A request as the scheduler keeps it."""

    request_id: str
    num_prompt_tokens: int = 100
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = field(default=0, kw_only=True)
    status: Status = Status.WAITING

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens


def tracker(usage: float = 0.0) -> LoadTracker:
    return LoadTracker(lambda request: request.num_cached_tokens, lambda: usage)  # type: ignore[attr-defined]


def test_a_request_from_arrival_to_end():
    load, request = tracker(0.25), Request("a", num_cached_tokens=64)
    load.add(request)
    assert load.report().load == Load(
        waiting_requests=1, waiting_prefill_tokens=36, kv_usage=0.25, waiting_prefill_pairs=36 * (64 + 18)
    )
    # The first chunk: the hit and 16 tokens.
    request.status, request.num_computed_tokens = Status.RUNNING, 80
    assert load.report().load == Load(
        running_requests=1, waiting_prefill_tokens=20, kv_usage=0.25, waiting_prefill_pairs=20 * (80 + 10)
    )
    request.num_computed_tokens = 100
    assert load.report().load == Load(running_requests=1, running_tokens=100, kv_usage=0.25)
    request.num_output_tokens, request.num_computed_tokens = 11, 110
    assert load.report().load == Load(running_requests=1, running_tokens=110, kv_usage=0.25)
    load.remove("a")
    assert load.report().load == Load(kv_usage=0.25)


def test_half_of_the_step_under_way_is_still_to_be_computed():
    load, request = tracker(), Request("a", status=Status.RUNNING, num_computed_tokens=80)
    load.add(request)
    load.begin_step({"a": 60, "b": 900})
    assert load.report().load == Load(
        running_requests=1, waiting_prefill_tokens=50, waiting_prefill_pairs=50 * (50 + 25)
    )
    request.num_computed_tokens = 100
    load.begin_step({"a": 20})
    assert load.report().load.waiting_prefill_tokens == 10
    # Its first token is out, and it decodes, with some drafted tokens.
    request.num_output_tokens, request.num_computed_tokens = 1, 104
    load.begin_step({"a": 4})
    assert load.report().load == Load(running_requests=1, running_tokens=104)
    load.begin_step({})
    request.status, request.num_computed_tokens = Status.PREEMPTED, 0
    assert load.report().load.waiting_prefill_tokens == 101


def test_what_is_in_a_step_is_told_by_what_each_request_has_computed():
    load = tracker()
    load.add(Request("new", num_prompt_tokens=1_000))
    load.add(Request("chunk", num_prompt_tokens=1_000, num_computed_tokens=600))
    load.add(Request("decoding", num_computed_tokens=109, num_output_tokens=10))
    # A preempted one that is at its output again: that is computed as a prompt is.
    load.add(Request("resumed", num_computed_tokens=100, num_output_tokens=50))
    scheduled = {"new": 200, "chunk": 400, "decoding": 1, "resumed": 50, "gone": 7}
    assert load.begin_step(scheduled) == StepWork(
        prefill_tokens=650,
        prefill_pairs=200 * 100 + 400 * (600 + 200) + 50 * (100 + 25),
        decode_requests=1,
        decode_tokens=109,
    )
    assert load.begin_step({}) == StepWork(0, 0, 0, 0)


def test_a_preempted_request_computes_its_output_again():
    load, request = (
        tracker(),
        Request("a", status=Status.RUNNING, num_computed_tokens=140, num_output_tokens=41),
    )
    load.add(request)
    request.status, request.num_computed_tokens = Status.PREEMPTED, 0
    assert load.report().load == Load(
        waiting_requests=1, waiting_prefill_tokens=141, waiting_prefill_pairs=141 * 141 / 2
    )


def test_a_prompt_that_is_cached_whole_still_computes_a_token():
    load = tracker()
    load.add(Request("a", num_cached_tokens=100))
    assert load.report().load.waiting_prefill_tokens == 1


def test_the_end_of_an_unknown_request_changes_nothing():
    load = tracker()
    load.remove("never seen")
    assert load.report().load == Load()


@pytest.mark.parametrize(
    ("request_id", "accepted"),
    [
        ("cmpl-abc-kv0123456789abcdef-0-1a2b3c4d", ("0123456789abcdef",)),
        ("chatcmpl-kv-kv0123456789abcdef", ("0123456789abcdef",)),
        ("0_chatcmpl-a-kv1111111111111111-b-kv0123456789abcdef-12345678", ("0123456789abcdef",)),
        ("chatcmpl-8f14e45fceea167a5a36dedd4bea2543", ()),
        ("cmpl-kv0123456789abcde", ()),
        ("cmpl-kv0123456789abcdef0", ()),
        ("cmpl-kv0123456789ABCDEF", ()),
    ],
)
def test_the_decision_id_is_found_in_the_request_id(request_id: str, accepted: tuple[str, ...]):
    load = tracker()
    load.add(Request(request_id))
    assert load.report().accepted == accepted
    assert load.report().accepted == ()


def test_the_samples_of_one_request_name_its_decision_once():
    load = tracker()
    for index in range(4):
        load.add(Request(f"{index}_cmpl-kv0123456789abcdef"))
    assert load.report().accepted == ("0123456789abcdef",)


@given(st.lists(st.tuples(st.sampled_from(["add", "run", "preempt", "remove"]), st.integers(0, 5))))
def test_nothing_is_left_behind(steps: list[tuple[str, int]]):
    load, requests = tracker(), dict[str, Request]()
    for action, number in steps:
        request_id = str(number)
        if action == "add" and request_id not in requests:
            requests[request_id] = Request(request_id)
            load.add(requests[request_id])
        elif request_id in requests and action == "run":
            requests[request_id].status = Status.RUNNING
            requests[request_id].num_computed_tokens += 60
        elif request_id in requests and action == "preempt":
            requests[request_id].status = Status.PREEMPTED
            requests[request_id].num_computed_tokens = 0
        elif request_id in requests and action == "remove":
            del requests[request_id]
            load.remove(request_id)
        report = load.report().load
        running = [each for each in requests.values() if each.status is Status.RUNNING]
        assert report.running_requests == len(running)
        assert report.waiting_requests == len(requests) - len(running)
    for request_id in requests:
        load.remove(request_id)
    assert load.report().load == Load()
