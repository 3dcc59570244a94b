from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvindex.blocks import BlockHash
from kvindex.pending import SIXTEENTHS, Pending, pending_blocks, take_sample


def prompt(shared: int, own: int, name: int = 0) -> list[BlockHash]:
    return [BlockHash(depth) for depth in range(1, shared + 1)] + [
        BlockHash(10_000 * (name + 1) + depth) for depth in range(own)
    ]


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_what_is_found_is_shared_and_not_much_less_than_all_of_it(shared, own, others_own, held):
    first, second = prompt(shared, own, 1), prompt(shared, others_own, 2)
    held = min(held, len(first))
    sample = take_sample(first, held)
    assert len(sample.hashes) <= len(SIXTEENTHS)
    found = pending_blocks([Pending(3, sample)], second).get(3, 0)
    assert found <= shared
    if shared == len(first) > held:
        assert found == shared
    if shared - held > (len(first) - held) / 16 + 1:
        assert (found - held) * 2 >= (shared - held) - 1


def test_the_deepest_of_a_worker_counts():
    samples = [take_sample(prompt(shared, 5, name), 0) for name, shared in enumerate((10, 40, 20))]
    pending = [Pending(1, samples[0]), Pending(1, samples[1]), Pending(2, samples[2])]
    found = pending_blocks(pending, prompt(40, 7, 9))
    assert 20 <= found[1] <= 40
    assert 10 <= found[2] <= 20
    assert pending_blocks(pending, prompt(0, 50, 8)) == {}


def test_nothing_new_is_nothing_pending():
    assert take_sample(prompt(8, 0), 8).hashes == ()
