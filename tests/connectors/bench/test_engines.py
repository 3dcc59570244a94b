"""What is made of times that two engines took."""

import pytest

from connectors.bench.engines import figures


def test_figures():
    ttft_ms = {
        "alone": [100.0, 90.0, 500.0],
        "split": [112.0, 111.0, 109.0],
        "sequential": [140.0] * 3,
        "nixl_connector": [150.0, 145.0, 130.0],
        "cached": [20.0, 22.0, 21.0],
    }
    gaps_ms = {"undisturbed": [5.0] * 200, "alone": [5.0] * 195 + [50.0] * 5, "split": [6.0] * 200}
    found = {each.name: each for each in figures(ttft_ms, 3.0, gaps_ms)}
    extra = found["transport.streaming_extra_ttft_ms"]
    # 12, 21 and -391 ms more than alone, and 40, 50 and -360; of these the medians, less 3.
    assert (extra.value, extra.reference_value, extra.met) == (9.0, 37.0, True)
    assert found["transport.ttft_ms_alone"].value == 100.0
    assert found["transport.ttft_ms_nixl_connector"].value == 145.0
    assert found["transport.ttft_ms_cached"].value == 21.0
    sequential = found["transport.ttft_ms_sequential"]
    assert (sequential.value, sequential.reference_value) == (140.0, 145.0)
    assert found["transport.itl_p99_ms_alone"].value == pytest.approx(50.0)
    split = found["transport.itl_p99_ms_split"]
    assert (split.value, split.reference_value) == (6.0, 5.0)
