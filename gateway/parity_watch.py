"""Checks each worker that joins, off the request path, and again those that did not pass."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import msgspec
import structlog

from gateway.config import GatewayConfig
from gateway.fleet import Fleet
from gateway.parity import Parity, State
from gateway.parity_probe import ParityProber
from kvindex.worker import RegisteredWorker, Worker

log = structlog.get_logger(__name__)

FIRST_AGAIN_S = 1.0
"""A check that came to no end is made again after this time, then after twice as long, and so on."""


class ParityWatch:
    """Keeps the fleet's verdicts, on its event loop.

    A worker is checked once it accepts connections, under each new incarnation, and later again until
    it is exact. A check that comes to no end, because the worker is busy or refuses, changes no verdict.

    Args:
        config: how often, how many at a time.
        fleet: followed, and told the verdicts.
        prober: makes the checks.
    """

    def __init__(self, config: GatewayConfig, fleet: Fleet, prober: ParityProber) -> None:
        self._config = config
        self._fleet = fleet
        self._prober = prober
        self._turn = asyncio.Semaphore(config.parity_concurrency)
        self._due_at_s: dict[str, float] = {}
        self._again_s: dict[str, float] = {}
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to check, until `stop`."""
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Give up the checks under way. The verdicts stay."""
        tasks = [*self._checks.values(), *([self._loop] if self._loop else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._start_due()
            await asyncio.sleep(self._config.poll_interval_ms / 1000)

    def _start_due(self) -> None:
        snapshot = self._fleet.snapshot
        live = {each.worker.incarnation: each for each in snapshot.workers()}
        for name in self._due_at_s.keys() - live.keys():
            del self._due_at_s[name]
            self._again_s.pop(name, None)
        for name, registered in live.items():
            # A lease that lapsed and was renewed in between has cost the verdict.
            is_due = name not in snapshot.parity or self._due_at_s[name] <= time.monotonic()
            if is_due and name not in self._checks and snapshot.accepts_connections(registered.worker):
                task = asyncio.create_task(self._check(registered))
                self._checks[name] = task
                task.add_done_callback(partial(self._checked, name))

    def _checked(self, name: str, _: asyncio.Task[None]) -> None:
        del self._checks[name]

    async def _check(self, registered: RegisteredWorker) -> None:
        worker = registered.worker
        async with self._turn:
            if not self._fleet.snapshot.is_live(worker):
                return
            adapters = self._fleet.snapshot.adapters(worker)
            parity = await self._prober.check(registered, adapters[0] if adapters else None)
        self._due_at_s[worker.incarnation] = time.monotonic() + self._pause_s(worker, parity)
        former = self._fleet.snapshot.parity_of(worker)
        if parity.state is State.CHECKING and former.state is not State.CHECKING:
            parity = msgspec.structs.replace(former, checked_at=parity.checked_at)
        self._fleet.note_parity(worker, parity)
        _tell(worker, former, parity)

    def _pause_s(self, worker: Worker, parity: Parity) -> float:
        """Return how long `worker` is left alone after a check that ended with `parity`."""
        match parity.state:
            case State.EXACT:
                return float("inf")
            case State.DEGRADED:
                return self._config.parity_again_s
            case State.CHECKING:
                again_s = self._again_s.get(worker.incarnation, FIRST_AGAIN_S)
                self._again_s[worker.incarnation] = 2 * again_s
                return min(again_s, self._config.parity_again_s)


def _tell(worker: Worker, former: Parity, parity: Parity) -> None:
    if (former.state, former.reason) == (parity.state, parity.reason):
        return
    seen = {"worker": worker.worker_id, "reason": parity.reason, "detail": parity.detail, "cure": parity.cure}
    if parity.state is State.EXACT:
        log.info(
            "worker is exact: its tokens and hashes are ours", worker=worker.worker_id, lag_ms=parity.lag_ms
        )
    elif parity.state is State.DEGRADED:
        log.error("worker is degraded: it is routed to by load alone", **seen)
    else:
        log.warning("worker could not be checked yet", **seen)
