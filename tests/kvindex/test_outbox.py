from functools import reduce
from operator import xor

from hypothesis import given
from hypothesis import strategies as st

from kvindex.index import MAX_BATCH
from kvindex.outbox import Outbox
from kvindex.worker import SlotState


def test_a_change_that_is_taken_back_is_never_sent():
    outbox = Outbox()
    outbox.change(stored=[1, 2])
    outbox.change(removed=[1])
    batch = outbox.next_batch()
    assert batch is not None
    assert (batch.sequence, batch.stored, batch.removed) == (1, (2,), ())


def test_a_batch_is_repeated_until_confirmed():
    outbox = Outbox([1])
    first = outbox.next_batch()
    outbox.change(removed=[1])
    assert outbox.next_batch() is first
    assert (len(outbox), outbox.is_repeating, outbox.is_fresh) == (2, True, False)
    outbox.confirm()
    second = outbox.next_batch()
    assert second is not None
    assert (second.sequence, second.stored, second.removed) == (2, (), (1,))
    outbox.confirm()
    assert outbox.told == SlotState(num_blocks=0, digest=0)
    assert outbox.next_batch() is None
    assert len(outbox) == 0


def test_batches_are_bounded():
    outbox = Outbox(range(MAX_BATCH * 2 + 1))
    sizes = []
    while batch := outbox.next_batch():
        sizes.append(len(batch.stored))
        outbox.confirm()
    assert sizes == [MAX_BATCH, MAX_BATCH, 1]


@given(st.lists(st.tuples(st.sampled_from(["flip", "send", "confirm"]), st.integers(1, 6))))
def test_what_was_told_and_what_is_unsent_make_the_truth(steps: list[tuple[str, int]]):
    outbox, truth, index = Outbox(), set[int](), set[int]()
    sent = None
    for action, block in steps:
        if action == "flip":
            outbox.change(removed=[block]) if block in truth else outbox.change(stored=[block])
            truth ^= {block}
        elif action == "send":
            sent = outbox.next_batch()
        elif sent is not None:
            assert index.isdisjoint(sent.stored)
            assert index.issuperset(sent.removed)
            index = (index | set(sent.stored)) - set(sent.removed)
            outbox.confirm()
            sent = None
        assert outbox.told == SlotState(num_blocks=len(index), digest=reduce(xor, index, 0))
    while batch := outbox.next_batch():
        index = (index | set(batch.stored)) - set(batch.removed)
        outbox.confirm()
    assert index == truth
