from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from connectors.gaps import Gaps

BLOCK_SIZE = 16


def test_all_blocks_of_what_is_wanted_are_missing_first() -> None:
    assert Gaps(range(32, 81), BLOCK_SIZE, 4).blocks() == [2, 3, 4, 5]
    assert Gaps(range(32, 32), BLOCK_SIZE, 4).blocks() == []


def test_a_block_is_filled_when_every_part_of_every_token_has_come() -> None:
    gaps = Gaps(range(40), BLOCK_SIZE, num_parts=3)
    gaps.fill(range(40), 2)
    assert gaps.blocks() == [0, 1, 2]
    gaps.fill(range(31), 1)
    assert gaps.blocks() == [1, 2]
    gaps.fill(range(31, 40), 1)
    assert gaps.blocks() == []


@given(
    first=st.integers(0, 5).map(lambda block: block * BLOCK_SIZE),
    num_tokens=st.integers(1, 200),
    cuts=st.lists(st.integers(1, 199), unique=True),
    lost=st.integers(0, 20),
)
def test_the_blocks_of_lost_chunks_and_no_others_stay_missing(
    first: int, num_tokens: int, cuts: list[int], lost: int
) -> None:
    stop = first + num_tokens
    gaps = Gaps(range(first, stop), BLOCK_SIZE, 2)
    edges = sorted({first, stop, *(first + cut for cut in cuts if cut < num_tokens)})
    chunks = [range(start, end) for start, end in pairwise(edges)]
    for index, chunk in enumerate(chunks):
        if index != lost:
            gaps.fill(chunk, 2)
    missing = {token // BLOCK_SIZE for token in chunks[lost]} if lost < len(chunks) else set()
    assert gaps.blocks() == sorted(missing)
