"""What transfers took tells what the next one will take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.pace import Moved, Pace


def after(*observed: tuple[int, float]) -> Pace:
    pace = Pace()
    for num_bytes, seconds in observed:
        pace.observe(Moved(num_bytes, seconds))
    return pace


@given(
    gb_per_s=st.floats(0.1, 100),
    latency_s=st.floats(0.0001, 0.1),
    megabytes=st.lists(st.integers(1, 1_000), min_size=2, max_size=100),
)
def test_latency_and_bandwidth_are_told_apart(gb_per_s: float, latency_s: float, megabytes: list[int]):
    sizes = [each * 1_000_000 for each in (*megabytes, 1, 1_000)]
    pace = after(*((size, latency_s + size / gb_per_s / 1e9) for size in sizes))
    assert pace.gb_per_s == pytest.approx(gb_per_s, rel=1e-3)
    assert pace.latency_ms == pytest.approx(latency_s * 1e3, rel=1e-3, abs=1e-3)


def test_the_last_transfers_count():
    pace = after(*[(size, size / 1e9) for size in (10**6, 10**8)] * 100)
    assert pace.gb_per_s == pytest.approx(1)
    for _ in range(100):
        for size in (10**6, 10**8):
            pace.observe(Moved(size, size / 4e9))
    assert pace.gb_per_s == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    "observed",
    [
        [(10**8, 0.1)],
        [(10**8, 0.1)] * 5,
        # Chance: the larger one was faster.
        [(10**8, 0.15), (2 * 10**8, 0.15)],
    ],
)
def test_without_a_line_all_of_the_time_is_the_bytes(observed: list[tuple[int, float]]):
    pace = after(*observed)
    total_bytes, total_s = (sum(each) for each in zip(*observed, strict=True))
    assert pace.gb_per_s == pytest.approx(total_bytes / total_s / 1e9, rel=0.02)
    assert pace.latency_ms == 0


def test_nothing_observed_is_nothing_known():
    assert after().gb_per_s == after((0, 0.1)).gb_per_s == 0
