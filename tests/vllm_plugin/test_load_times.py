"""Loads are timed from their blocks to their end. Real engines: `test_tiers`."""

import pytest

from connectors.pace import Line
from vllm_plugin.load_times import LoadTimes


class Clock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def test_loads_under_way_at_the_same_time_are_told_apart():
    clock = Clock()
    times = LoadTimes(1000, clock)
    times.begin("a", 1_000)
    clock.now_s += 0.01
    times.begin("b", 100_000)
    clock.now_s += 0.01
    times.end(["b", "of somebody else"])
    assert times.line() == Line(pytest.approx(10), 0)
    times.end(["a"])
    assert times.line().gb_per_s > 0


def test_what_ends_early_or_failed_tells_nothing():
    clock = Clock()
    times = LoadTimes(1000, clock)
    times.begin("aborted", 1_000)
    times.give_up("aborted", "unknown")
    clock.now_s += 1
    times.end(["aborted"])
    assert times.line() == Line()
