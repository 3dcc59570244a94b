"""What the scheduler's part tells the workers, step by step, without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from connectors.params import TransferParams, new_transfer_id
from vllm_plugin.metadata import Computed, KvlaneMetadata, Receive, Send
from vllm_plugin.transfer_scheduler import TransferScheduler

ID = new_transfer_id()
SEND = {"kvlane": {"transfer_id": ID, "role": "send"}, "theirs": 1}
RECEIVE = {"kvlane": {"transfer_id": ID, "role": "receive", "peer": "10.0.0.1:5600"}}


def request(params: Any, num_prompt_tokens: int = 100, name: str = "r") -> Any:
    return SimpleNamespace(
        request_id=name,
        kv_transfer_params=params,
        num_prompt_tokens=num_prompt_tokens,
        num_computed_tokens=0,
    )


def step(
    new: tuple[list[int], int] | None = None,
    cached: tuple[list[int], int] | None = None,
    num_tokens: int = 0,
    *,
    is_resumed: bool = False,
    preempted: bool = False,
) -> SchedulerOutput:
    """A step of one request: blocks and tokens computed before, and how many it computes."""
    output = SchedulerOutput.make_empty()
    if new:
        data = NewRequestData("r", [], [], None, None, (new[0],), new[1], None)
        output.scheduled_new_reqs = [data]
    if cached:
        output.scheduled_cached_reqs = CachedRequestData(
            req_ids=["r"],
            resumed_req_ids={"r"} if is_resumed else set(),
            new_token_ids=[[]],
            all_token_ids={},
            new_block_ids=[(cached[0],) if cached[0] else None],
            num_computed_tokens=[cached[1]],
            num_output_tokens=[0],
        )
    output.num_scheduled_tokens = {"r": num_tokens}
    output.preempted_req_ids = {"r"} if preempted else None
    return output


class TestSending:
    def test_blocks_are_named_as_they_are_filled_and_kept_to_the_end(self):
        scheduler, sent = TransferScheduler(), request(SEND)
        scheduler.on_new_request(sent)
        assert scheduler.num_external_tokens(sent, 32) == 0
        first = scheduler.build_metadata(step(new=([4, 5, 6], 32), num_tokens=50))
        assert first.sends == [Send("r", ID, 100)]
        assert first.computed == [Computed(ID, [4, 5, 6], 32, 82)]
        # The last step computes a token of the output too, or would, and is cut at the prompt.
        second = scheduler.build_metadata(step(cached=([9], 82), num_tokens=20))
        assert second == KvlaneMetadata(computed=[Computed(ID, [4, 5, 6, 9], 0, 100)])
        sent.num_computed_tokens = 100
        assert scheduler.request_finished(sent)
        assert scheduler.build_metadata(step()) == KvlaneMetadata()

    def test_preempted_blocks_are_not_read_until_they_are_computed_again(self):
        scheduler, sent = TransferScheduler(), request(SEND)
        scheduler.on_new_request(sent)
        scheduler.build_metadata(step(new=([4, 5], 0), num_tokens=64))
        assert scheduler.build_metadata(step(preempted=True)) == KvlaneMetadata(suspended=[ID])
        again = scheduler.build_metadata(step(cached=([7, 8], 0), num_tokens=64, is_resumed=True))
        assert again == KvlaneMetadata(computed=[Computed(ID, [7, 8], 0, 64)])

    def test_an_aborted_request_ends_its_transfer(self):
        scheduler, sent = TransferScheduler(), request(SEND)
        scheduler.on_new_request(sent)
        scheduler.build_metadata(step(new=([4], 0), num_tokens=32))
        sent.num_computed_tokens = 32
        assert scheduler.request_finished(sent)
        assert scheduler.build_metadata(step()).aborted == [ID]

    def test_one_that_waits_is_named_so_that_its_receiver_may_wait_as_well(self):
        scheduler, sent = TransferScheduler(), request(SEND)
        scheduler.on_new_request(sent)
        assert scheduler.build_metadata(step()) == KvlaneMetadata(sends=[Send("r", ID, 100)])
        assert scheduler.request_finished(sent)
        assert scheduler.build_metadata(step()) == KvlaneMetadata(aborted=[ID])

    def test_one_that_was_never_named_is_forgotten_but_its_receiver_is_told(self):
        scheduler, sent = TransferScheduler(), request(SEND)
        scheduler.on_new_request(sent)
        assert not scheduler.request_finished(sent)
        assert scheduler.build_metadata(step()) == KvlaneMetadata(aborted=[ID])


class TestReceiving:
    def test_what_is_missing_is_received_once(self):
        scheduler, received = TransferScheduler(), request(RECEIVE)
        scheduler.on_new_request(received)
        assert (
            scheduler.num_external_tokens(received, 32) == scheduler.num_external_tokens(received, 32) == 68
        )
        scheduler.on_alloc(received, [1, 2, 3, 4], 68)
        scheduler.on_alloc(received, [1, 2, 3, 4], 0)
        (receive,) = scheduler.build_metadata(step()).receives
        assert receive == Receive("r", TransferParams(ID, "receive", "10.0.0.1:5600"), [1, 2, 3, 4], 32, 100)
        assert scheduler.build_metadata(step()).receives == []
        # Preempted later, or failed: it is computed here.
        assert scheduler.num_external_tokens(received, 0) == 0

    def test_its_end_ends_the_transfer(self):
        scheduler, received = TransferScheduler(), request(RECEIVE)
        scheduler.on_alloc(received, [1, 2, 3, 4], 100)
        scheduler.build_metadata(step())
        assert not scheduler.request_finished(received)
        assert scheduler.build_metadata(step()).cancelled == [ID]


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": True}, {"kvlane": {"role": "send"}}])
def test_others_and_malformed_ones_run_as_if_there_were_no_transfer(params: Any):
    scheduler, plain = TransferScheduler(), request(params)
    scheduler.on_new_request(plain)
    assert scheduler.num_external_tokens(plain, 0) == 0
    scheduler.on_alloc(plain, [1], 0)
    assert scheduler.build_metadata(step(new=([1], 0), num_tokens=10)) == KvlaneMetadata()
    assert not scheduler.request_finished(plain)
