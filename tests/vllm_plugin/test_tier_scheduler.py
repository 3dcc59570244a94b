"""What LMCache's orders are held back."""

from types import SimpleNamespace
from typing import Any

from vllm_plugin.tier_scheduler import split_early_stores


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
