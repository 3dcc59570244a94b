"""A tier that fails is left alone for a while."""

import pytest
from prometheus_client import REGISTRY

from connectors.tiers.switch import Switch


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_failure_switches_off_for_the_pause_and_then_it_is_tried_again(clock: Clock):
    switch = Switch("disk", "/kv", 10, clock)
    assert not switch.is_off
    switch.failed("full")
    assert switch.is_off
    clock.now_s += 10
    assert not switch.is_off
    switch.failed("still full")
    assert switch.is_off


def test_metrics_say_so(clock: Clock):
    def value(name: str) -> float:
        return REGISTRY.get_sample_value(f"kvlane_store_{name}", {"tier": "disk"}) or 0.0

    switch, before = Switch("disk", "/kv", 10, clock), value("failures_total")
    switch.failed("full")
    assert (value("failures_total"), value("off")) == (before + 1, 1)
    switch.worked()
    assert value("off") == 0


def test_a_success_switches_on(clock: Clock):
    switch = Switch("disk", "/kv", 10, clock)
    switch.failed("full")
    switch.worked()
    assert not switch.is_off


def test_an_outage_is_said_once_and_its_end_once(clock: Clock, capsys: pytest.CaptureFixture[str]):
    switch = Switch("disk", "/kv", 10, clock)
    for _ in range(3):
        switch.failed("full")
        clock.now_s += 10
    switch.worked()
    switch.worked()
    said = capsys.readouterr().out
    assert (said.count("tier_off"), said.count("tier_on")) == (1, 1)
