"""How far tiers are read, and what LMCache stores. Real engines: `test_tiers`."""

from types import SimpleNamespace
from typing import Any

import pytest
from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestMetadata, LMCacheMPRequestTracker
from structlog.testing import capture_logs

from kvindex.stores import LOAD_KEY
from vllm_plugin.tier_scheduler import Ahead, load_limit, tell_computed


def test_a_request_says_how_far_tiers_are_read_for_it():
    assert load_limit("a", None) is load_limit("a", {"kvlane": {}}) is None
    assert (load_limit("a", {LOAD_KEY: 0}), load_limit("a", {LOAD_KEY: 512})) == (0, 512)


@pytest.mark.parametrize("limit", [-1, True, 2.5, "512", [512]])
def test_what_is_no_number_of_tokens_limits_nothing_and_is_logged(limit: object):
    with capture_logs() as logs:
        assert load_limit("a", {LOAD_KEY: limit}) is None
    assert [each["event"] for each in logs] == ["load_limit_refused"]


def test_no_more_is_asked_for_ahead_than_an_engine_can_hold():
    ahead = Ahead(1_000)
    assert [ahead.begin(name, 400) for name in "abc"] == [True, True, False]
    assert ahead.begin("d", 200)
    ahead.end("c")
    assert not ahead.begin("c", 1)
    ahead.end("a")
    ahead.end("a")
    assert ahead.begin("c", 400)


def stores(hit_tokens: int, steps: list[tuple[int, int]]) -> list[range]:
    """Return what LMCache would store of a prompt of 1,000 tokens, in chunks of 256.

    Args:
        hit_tokens: what tiers have promised.
        steps: tokens that are in the blocks before a step, and that it computes.
    """
    request: Any = SimpleNamespace(
        request_id="a",
        cache_salt="",
        sampling_params=None,
        kv_transfer_params=None,
        all_token_ids=list(range(1_000)),
        num_prompt_tokens=1_000,
        mm_features=[],
    )
    tracker = LMCacheMPRequestTracker(request)
    tracker.append_block_ids((list(range(32)),))
    tracker.num_lmcache_hit_tokens = tracker.num_stored_tokens = hit_tokens
    found = []
    for num_computed_tokens, num_scheduled_tokens in steps:
        tell_computed(tracker, num_computed_tokens)
        tracker.increase_num_scheduled_tokens(num_scheduled_tokens)
        order = LMCacheMPRequestMetadata.GetStoreMetadata(tracker, 256, [32])
        if order is not None:
            found.append(range(order.op.start, order.op.end))
    return found


def test_what_a_step_computes_is_stored():
    assert stores(0, [(0, 300), (300, 300), (600, 400)]) == [range(256), range(256, 512), range(512, 768)]


def test_what_was_loaded_is_not_stored_again():
    assert stores(512, [(512, 488)]) == [range(512, 768)]


def test_what_was_promised_and_did_not_come_is_not_stored_before_it_is_computed():
    assert stores(512, [(32, 400), (432, 330), (762, 238)]) == [range(512, 768)]


def test_what_another_engine_has_sent_is_stored():
    assert stores(256, [(999, 1)]) == [range(256, 768)]
