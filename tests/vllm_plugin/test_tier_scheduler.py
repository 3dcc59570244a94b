"""How far tiers are read, and which of LMCache's orders are held back. Real engines: `test_tiers`."""

from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from kvindex.stores import LOAD_KEY
from vllm_plugin.tier_scheduler import load_limit, split_early_stores


def test_a_request_says_how_far_tiers_are_read_for_it():
    assert load_limit("a", None) is load_limit("a", {"kvlane": {}}) is None
    assert (load_limit("a", {LOAD_KEY: 0}), load_limit("a", {LOAD_KEY: 512})) == (0, 512)


@pytest.mark.parametrize("limit", [-1, True, 2.5, "512", [512]])
def test_what_is_no_number_of_tokens_limits_nothing_and_is_logged(limit: object):
    with capture_logs() as logs:
        assert load_limit("a", {LOAD_KEY: limit}) is None
    assert [each["event"] for each in logs] == ["load_limit_refused"]


def order(direction: str, end: int, request_id: str = "a") -> Any:
    return SimpleNamespace(direction=direction, request_id=request_id, op=SimpleNamespace(start=0, end=end))


def test_stores_of_what_is_computed_pass():
    orders = [order("STORE", 512), order("STORE", 256, "b")]
    assert split_early_stores(orders, {"a": 600, "b": 256}) == (orders, [])


def test_a_store_of_what_is_not_computed_yet_is_held_back():
    early, ready = order("STORE", 1024), order("STORE", 256, "b")
    assert split_early_stores([early, ready], {"a": 1023, "b": 300}) == ([ready], [early])


def test_loads_pass_whatever_is_computed():
    orders = [order("RETRIEVE", 1024)]
    assert split_early_stores(orders, {"a": 0}) == (orders, [])
