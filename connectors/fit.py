"""What something costs, explained by what was in it: least squares that a few outliers do not move. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

_SIMPLER_BY = 1.02
"""A cost counts only where it explains this much: what no sample tells apart is told apart by no figure."""

_ROUNDS = 4
_OUTLIER_AT = 2.5
_NEGLIGIBLE = 1e-12

Matrix = npt.NDArray[np.float64]


def explain(
    work: Matrix, durations: Matrix, *, needed: Collection[int] = (), weights: Matrix | None = None
) -> tuple[float, ...]:
    """Return a cost for each column of `work`, none below 0, which explain the durations best.

    Least squares of the relative error, in which samples far from all others count for little. Of several
    explanations that are about as good the one of the fewest columns is taken.

    Args:
        work: a row for each sample, at least one; few columns.
        durations: of the samples, each above 0.
        needed: columns that are in any explanation.
        weights: how much each sample counts; None: all alike.
    """
    # The scale of a column is that of its unit; without this a matrix of such columns is singular.
    scale = np.abs(work).max(axis=0)
    scale[scale == 0] = 1.0
    scaled = work / scale
    given = np.ones_like(durations) if weights is None else weights
    expected, trust = durations, given
    costs = np.zeros(work.shape[1])
    for _ in range(_ROUNDS):
        costs = _simplest(scaled, durations, trust / expected**2, needed)
        expected = np.maximum(scaled @ costs, _NEGLIGIBLE)
        error = np.abs(durations / expected - 1)
        usual = max(float(np.median(error)), 1e-3)
        outlying = np.minimum(1.0, _OUTLIER_AT * usual / np.maximum(error, _NEGLIGIBLE))
        trust = given * outlying**2
    return tuple(float(each) for each in costs / scale)


def _simplest(work: Matrix, durations: Matrix, weights: Matrix, needed: Collection[int]) -> Matrix:
    """Return the least squares solution of the fewest columns that is about as good as any, none below 0.

    With five columns all 31 choices are tried: the best among those without a cost below 0 is the exact
    non-negative solution.
    """
    weighted = work * weights[:, None]
    squares, products = weighted.T @ work, weighted.T @ durations
    total = float(weights @ durations**2)
    num_columns = work.shape[1]
    found: list[tuple[float, Matrix]] = []
    for size in range(1, num_columns + 1):
        for columns in map(list, itertools.combinations(range(num_columns), size)):
            if not set(needed) <= set(columns):
                continue
            block = squares[np.ix_(columns, columns)]
            solution = np.linalg.lstsq(block, products[columns], rcond=_NEGLIGIBLE)[0]
            if np.all(solution >= 0):
                costs = np.zeros(num_columns)
                costs[columns] = solution
                left = total - 2 * float(products @ costs) + float(costs @ squares @ costs)
                found.append((max(left, total * _NEGLIGIBLE), costs))
    best = min((left for left, _ in found), default=0.0)
    return next((costs for left, costs in found if left <= best * _SIMPLER_BY), np.zeros(num_columns))
