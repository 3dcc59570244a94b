"""What transfers took tells what the next one will take."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.pace import HALF_LIFE_S, KEPT, Line, Moved, Pace


def after(*observed: tuple[int, float]) -> Line:
    pace = Pace()
    for num_bytes, seconds in observed:
        pace.observe(Moved(num_bytes, seconds))
    return pace.line()


@settings(deadline=None)
@given(
    gb_per_s=st.floats(0.1, 100),
    latency_s=st.floats(0.0001, 0.1),
    megabytes=st.lists(st.integers(1, 1_000), min_size=2, max_size=100),
)
def test_latency_and_bandwidth_are_told_apart(gb_per_s: float, latency_s: float, megabytes: list[int]):
    sizes = [each * 1_000_000 for each in (*megabytes, 1, 1_000)]
    line = after(*((size, latency_s + size / gb_per_s / 1e9) for size in sizes))
    assert line.latency_ms + sizes[-1] / line.gb_per_s / 1e6 == pytest.approx(
        latency_s * 1e3 + sizes[-1] / gb_per_s / 1e6, rel=0.02
    )
    assert line.latency_ms + 1 / line.gb_per_s == pytest.approx(latency_s * 1e3 + 1 / gb_per_s, rel=0.2)


def test_a_few_stalls_move_nothing():
    steady = [(size * 10**6, 0.01 + size / 1e3) for size in (1, 10, 100)] * 10
    stalled = [(10**7, 20.0), (10**6, 9.0), (10**8, 30.0)]
    line = after(*steady[:15], *stalled, *steady[15:])
    assert line.gb_per_s == pytest.approx(1, rel=0.05)
    assert line.latency_ms == pytest.approx(10, rel=0.05)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_what_is_old_may_be_forgotten():
    clock = Clock()
    paces = Pace(clock, forget_after_s=300), Pace(clock)
    for pace in paces * KEPT:
        pace.observe(Moved(10**9, 1.0))
    known = paces[0].line()
    assert known.gb_per_s == pytest.approx(1)
    clock.now_s += 300
    assert [pace.line() for pace in paces] == [Line(), known]
    for pace in paces:
        pace.observe(Moved(10**9, 0.1))
    # What was forgotten does not outweigh what is seen now.
    assert paces[0].line().gb_per_s == pytest.approx(10)
    assert paces[1].line().gb_per_s < 5


@pytest.mark.parametrize(("num_before", "pause_s"), [(KEPT, 0.0), (KEPT - 4, 5 * HALF_LIFE_S)])
def test_the_last_ones_count_and_the_young_ones_more(num_before: int, pause_s: float):
    clock = Clock()
    pace = Pace(clock)
    sizes = (10**6, 10**8)
    for number in range(num_before):
        pace.observe(Moved(sizes[number % 2], sizes[number % 2] / 1e9))
    clock.now_s += 1000 * HALF_LIFE_S
    assert pace.line().gb_per_s == pytest.approx(1)
    for number in range(4 if pause_s else KEPT):
        clock.now_s += pause_s
        pace.observe(Moved(sizes[number % 2], sizes[number % 2] / 4e9))
    assert pace.line().gb_per_s == pytest.approx(4, rel=0.1)


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
    line = after(*observed)
    total_bytes, total_s = (sum(each) for each in zip(*observed, strict=True))
    assert line.gb_per_s == pytest.approx(total_bytes / total_s / 1e9, rel=0.2)
    assert line.latency_ms == 0


def test_nothing_observed_is_nothing_known():
    assert after() == after((0, 0.1)) == Line(0, 0)
