from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindex.recent import MEMORY_S, RecentShare


def test_what_goes_on_all_the_time_is_all_and_what_has_ended_is_forgotten():
    share = RecentShare()
    assert share.at(5.0) == 0
    share.add(0.0, 10 * MEMORY_S)
    assert share.at(10 * MEMORY_S) == pytest.approx(1, abs=1e-4)
    assert share.at(11 * MEMORY_S) == pytest.approx(1 / math.e, abs=1e-4)


@given(part=st.floats(0.05, 0.95), period_s=st.floats(0.01, 0.2))
def test_what_takes_a_part_of_every_moment_is_that_part(part, period_s):
    share, now_s = RecentShare(), 0.0
    while now_s < 8 * MEMORY_S:
        share.add(now_s, now_s + part * period_s)
        now_s += period_s
    assert share.at(now_s) == pytest.approx(part, abs=0.02)
