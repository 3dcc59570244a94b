from functools import reduce
from operator import xor

from hypothesis import given
from hypothesis import strategies as st

from kvindex.blocks import BlockHash
from kvindex.index import MAX_BATCH
from kvindex.outbox import Outbox
from kvindex.worker import Batch, SlotPart, SlotState


def test_a_change_that_is_taken_back_is_never_sent():
    outbox = Outbox()
    outbox.change(stored=[1, 2])
    outbox.change(removed=[1])
    (batch,) = outbox.next_batches()
    assert (batch.sequence, batch.stored, batch.removed) == (1, (2,), ())


def test_a_batch_is_repeated_until_confirmed():
    outbox = Outbox([1])
    (first,) = outbox.next_batches()
    outbox.change(removed=[1])
    assert outbox.next_batches() == (first,)
    assert (len(outbox), outbox.is_repeating, outbox.is_fresh) == (2, True, False)
    outbox.confirm()
    (second,) = outbox.next_batches()
    assert (second.sequence, second.stored, second.removed) == (2, (), (1,))
    outbox.confirm()
    assert outbox.told == SlotState(num_blocks=0, digest=0)
    assert outbox.next_batches() == ()
    assert len(outbox) == 0


def test_batches_are_bounded():
    outbox = Outbox(range(MAX_BATCH * 10 + 1))
    sizes = []
    while batches := outbox.next_batches():
        sizes.append([len(batch.stored) for batch in batches])
        outbox.confirm()
    assert sizes == [[MAX_BATCH] * 8, [MAX_BATCH, MAX_BATCH, 1]]


@given(st.lists(st.integers(0, 29)), st.integers(0, 40))
def test_however_long_the_index_is_away_each_block_is_kept_once(flips: list[int], num_told: int):
    outbox, truth = Outbox(), set[int]()
    for position, block in enumerate(flips):
        outbox.change(removed=[block]) if block in truth else outbox.change(stored=[block])
        truth ^= {block}
        if outbox.next_batches() and position < num_told:
            outbox.confirm()
        assert len(outbox) <= 30 + 30  # every block may be in flight and changed since
    while outbox.next_batches():
        outbox.confirm()
    assert outbox.told == SlotState(num_blocks=len(truth), digest=reduce(xor, truth, 0))


@given(st.sets(st.integers(0, 2**64 - 1), max_size=60), st.integers(0, 12), st.data())
def test_differences_of_a_part_are_named(told: set[int], parts_exponent: int, data: st.DataObject):
    outbox = Outbox(told)
    while outbox.next_batches():
        outbox.confirm()
    outbox.change(removed=set(list(told)[:5]))
    while outbox.next_batches():
        outbox.confirm()
    told -= set(list(told)[:5])
    num_parts = 1 << parts_exponent
    part = data.draw(st.integers(0, num_parts - 1))
    here = {block for block in told if block % num_parts == part}
    lost = data.draw(st.sets(st.sampled_from(sorted(here)))) if here else set[int]()
    added = {part + num_parts * number for number in (1, 5, 9)} - here
    found = SlotPart(part=part, num_parts=num_parts, blocks=frozenset(map(BlockHash, here - lost | added)))
    assert outbox.differences(found) == (lost, added)


@given(st.lists(st.tuples(st.sampled_from(["flip", "send", "confirm"]), st.integers(1, 6))))
def test_what_was_told_and_what_is_unsent_make_the_truth(steps: list[tuple[str, int]]):
    outbox, truth, index = Outbox(), set[int](), set[int]()
    sent: tuple[Batch, ...] = ()
    for action, block in steps:
        if action == "flip":
            outbox.change(removed=[block]) if block in truth else outbox.change(stored=[block])
            truth ^= {block}
        elif action == "send":
            sent = outbox.next_batches()
        elif sent:
            for batch in sent:
                assert index.isdisjoint(batch.stored)
                assert index.issuperset(batch.removed)
                index = (index | set(batch.stored)) - set(batch.removed)
            outbox.confirm()
            sent = ()
        assert outbox.told == SlotState(num_blocks=len(index), digest=reduce(xor, index, 0))
    while batches := outbox.next_batches():
        for batch in batches:
            index = (index | set(batch.stored)) - set(batch.removed)
        outbox.confirm()
    assert index == truth
