"""How well times to first token are predicted, and by which rates. Pure."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.fleet import FleetSnapshot
from gateway.rates import Rates
from gateway.receipts import Receipts


class Errors(msgspec.Struct, frozen=True, kw_only=True):
    """How much later than predicted first tokens came, in ms; negative: earlier."""

    num_measured: int
    median_ms: float | None
    p90_distance_ms: float | None
    """Nine of ten were no further off, early or late."""


def errors_of(late_ms: Sequence[float]) -> Errors:
    """Sum up what was measured."""
    if not late_ms:
        return Errors(num_measured=0, median_ms=None, p90_distance_ms=None)
    distances = sorted(map(abs, late_ms))
    return Errors(
        num_measured=len(late_ms),
        median_ms=statistics.median(late_ms),
        p90_distance_ms=distances[-(-9 * len(distances) // 10) - 1],
    )


def view_rates(snapshot: FleetSnapshot, rates: Rates, receipts: Receipts) -> dict[str, Any]:
    """Return every live worker's rates, whence they are, and the errors of the predictions on record."""
    late: defaultdict[str, list[float]] = defaultdict(list)
    for receipt in receipts.latest():
        if (
            receipt.chosen is not None
            and receipt.streamed
            and (error_ms := receipt.ttft_error_ms) is not None
        ):
            late[receipt.chosen].append(error_ms)
    workers = []
    for registered in snapshot.workers():
        worker, basis = registered.worker, snapshot.basis_of(registered.worker)
        workers.append(
            {
                "worker": worker.worker_id,
                "model": worker.model,
                "source": basis.source,
                "num_steps": registered.step_costs.num_steps if registered.step_costs else 0,
                "speed": rates.speed(worker, basis),
                "profile": dataclasses.asdict(rates.profile(worker, basis)),
                "errors": errors_of(late[worker.worker_id]),
            }
        )
    everything = [error_ms for each in late.values() for error_ms in each]
    return {"errors": errors_of(everything), "workers": workers}
