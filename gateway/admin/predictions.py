"""How well times to first token are predicted, and by which rates. Pure."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from gateway.fleet import FleetSnapshot
from gateway.rates import Rates
from gateway.receipts import Receipts
from gateway.tiers import TierSpeeds, store_speed
from kvindex.chunks import chunk_pool
from kvindex.stores import Store
from kvindex.worker import RegisteredWorker, Worker


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


def view_rates(
    snapshot: FleetSnapshot, rates: Rates, tier_speeds: TierSpeeds, receipts: Receipts
) -> dict[str, Any]:
    """Return the rates of live workers and of their stores, and the errors of predictions on record."""
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
    return {
        "errors": errors_of(everything),
        "workers": workers,
        "loads": [
            _view_loads(snapshot, tier_speeds, registered, store)
            for registered in snapshot.workers()
            for store in _reached(snapshot, registered.worker)
        ],
    }


def _reached(snapshot: FleetSnapshot, worker: Worker) -> Iterator[Store]:
    """Yield the live stores that a worker loads from, each once."""
    access = worker.tiers
    if access is None:
        return
    stores = snapshot.stores.get(chunk_pool(access.model, access.chunk_size), {})
    by_name = {store.name: store for store in stores.values()}
    for name in access.stores:
        if (store := by_name.get(name)) is not None:
            yield store


def _view_loads(
    snapshot: FleetSnapshot, tier_speeds: TierSpeeds, registered: RegisteredWorker, store: Store
) -> dict[str, Any]:
    access = registered.worker.tiers
    measured = store_speed(snapshot.store_speeds, store.name, access.server if access else "")
    known, source = tier_speeds.known(store.tier, measured, registered.load)
    return {
        "worker": registered.worker.worker_id,
        "store": store.name,
        "tier": store.tier,
        "source": source,
        "num_loads": measured.num_loads if measured is not None else 0,
        "gb_per_s": known.gb_per_s,
        "latency_ms": known.latency_ms,
        "slower": tier_speeds.factor(store.name, known, source),
    }
