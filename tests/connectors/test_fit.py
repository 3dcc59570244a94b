"""What made the durations is found again; see also `tests/vllm_plugin/test_step_times.py`."""

import numpy as np
import pytest

from connectors.fit import explain

WORK = np.array([(1.0, size) for size in (1, 2, 3, 5, 8, 13, 21, 34)])


def test_costs_are_found_whatever_their_units():
    for unit in (1e-9, 1.0, 1e9):
        work = WORK * (1, unit)
        assert explain(work, work @ (0.5, 3.0 / unit)) == pytest.approx((0.5, 3.0 / unit))


def test_of_two_explanations_that_are_as_good_the_simpler_is_taken():
    same = np.array([(1.0, 4.0)] * 5)
    assert explain(same, np.full(5, 8.0)) == pytest.approx((8, 0))
    assert explain(same, np.full(5, 8.0), needed=(1,)) == pytest.approx((0, 2))


def test_no_cost_is_below_nothing():
    assert explain(WORK, 10 - 0.1 * WORK[:, 1])[1] == 0


def test_samples_count_by_their_weight():
    work = np.concatenate([WORK, WORK])
    durations = np.concatenate([WORK @ (0.0, 1.0), WORK @ (0.0, 4.0)])
    weights = np.array([0.01] * 8 + [1.0] * 8)
    assert explain(work, durations, weights=weights)[1] == pytest.approx(4, rel=0.05)
