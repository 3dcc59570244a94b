from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.replay.block_cache import BlockCache

PROMPTS = [tuple(range(start, start + length)) for start in (0, 100) for length in (1, 3, 5)] + [
    (0, 1, 2, 50, 51),
    (),
]


@given(st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(0, 3), st.booleans())))
def test_no_block_is_lost_and_changes_tell_what_is_held(steps):
    cache, running, told = BlockCache(12), [], set()
    for prompt, num_more, frees in steps:
        num_cached = cache.num_leading(prompt)
        allocation = cache.allocate(prompt[:num_cached], len(prompt) - num_cached + num_more)
        if allocation is not None:
            cache.fill(allocation, prompt[num_cached:])
            running.append((allocation, num_more))
        if running and (frees or allocation is None):
            cache.free(*running.pop(0))
        for block, is_stored in cache.take_changes().items():
            assert (block in told) != is_stored
            (told.add if is_stored else told.discard)(block)
        assert cache.num_leading(prompt) == len(prompt) or allocation is None or frees
        held = {block for block in range(200) if cache.num_leading([block])}
        assert held == told
        assert 0 <= cache.num_used_blocks <= 12
    while running:
        cache.free(*running.pop())
    assert cache.num_used_blocks == 0
    assert cache.num_cached_blocks <= 12


def test_the_least_recently_used_goes_first_and_of_one_request_its_end():
    cache = BlockCache(4)
    for prompt in [(1, 2), (3, 4)]:
        allocation = cache.allocate((), 2)
        cache.fill(allocation, prompt)
        cache.free(allocation, 0)
    revived = cache.allocate((1, 2), 1)
    assert [cache.num_leading([block]) for block in (1, 2, 3, 4)] == [1, 1, 1, 0]
    cache.free(revived, 0)
    assert cache.num_used_blocks == 0


def test_blocks_in_use_are_not_given_away():
    cache = BlockCache(4)
    held = cache.allocate((), 3)
    assert cache.allocate((), 2) is None
    cache.free(held, 0)
    assert cache.allocate((), 4) is not None
