from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.fill import ASSUMED_GB_PER_S, CHUNK_COST_S, WireRate, least_fill, whole_buffers


def lost_s(fill_bytes: float, total_bytes: int, gb_per_s: float) -> float:
    """What pieces of a size cost: the prefill's time, and the last one's way."""
    return total_bytes / fill_bytes * CHUNK_COST_S + fill_bytes / (gb_per_s * 1e9)


@given(
    total_bytes=st.integers(1, 10**12),
    gb_per_s=st.floats(1e-3, 1e3),
    factor=st.floats(1e-3, 1e3),
)
def test_no_other_size_loses_less(total_bytes: int, gb_per_s: float, factor: float) -> None:
    best = least_fill(total_bytes, gb_per_s)
    other = lost_s(best * factor, total_bytes, gb_per_s)
    assert lost_s(best, total_bytes, gb_per_s) <= other * (1 + 1e-9)


def test_pieces_are_smaller_where_the_wire_is_slower() -> None:
    prompt = 470 << 20
    assert least_fill(prompt, 0.0125) < 4 << 20 < 64 << 20 < least_fill(prompt, 40)
    assert least_fill(prompt, 0) == least_fill(prompt, ASSUMED_GB_PER_S)


def test_a_wires_rate_follows_the_latest_chunks() -> None:
    rate = WireRate()
    assert rate.gb_per_s == 0
    for _ in range(100):
        rate.observe(10**9, 0.1)
    assert rate.gb_per_s == pytest.approx(10)
    for _ in range(50):
        rate.observe(10**6, 0.1)
    assert rate.gb_per_s < 0.1


def test_what_does_not_fill_a_buffer_waits_unless_nothing_does() -> None:
    assert [whole_buffers(num_tokens, 512) for num_tokens in (224, 512, 672, 1024, 1500)] == [
        224,
        512,
        512,
        1024,
        1024,
    ]
