"""Checks each worker that joins, off the request path, and again those that did not pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
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
    it is exact. A check that comes to no end, because the worker is busy or refuses, changes no verdict;
    whether it answered at all is noted.

    Args:
        config: how often, how many at a time.
        fleet: followed, and told the verdicts.
        prober: makes the checks.
        silent_workers: ids of workers to check out of turn, since requests wait there without an answer.
    """

    def __init__(
        self,
        config: GatewayConfig,
        fleet: Fleet,
        prober: ParityProber,
        silent_workers: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._prober = prober
        self._silent_workers = silent_workers
        self._turn = asyncio.Semaphore(config.parity_concurrency)
        self._due_at_s: dict[str, float] = {}
        self._again_s: dict[str, float] = {}
        self._checked_at_s: dict[str, float] = {}
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
            self._checked_at_s.pop(name, None)
        silent = self._silent_workers()
        for name, registered in live.items():
            # A lease that lapsed and was renewed in between has cost the verdict.
            is_due = name not in snapshot.parity or self._due_at_s[name] <= time.monotonic()
            is_due = is_due or (registered.worker.worker_id in silent and self._may_be_suspected(name))
            if is_due and name not in self._checks and snapshot.accepts_connections(registered.worker):
                task = asyncio.create_task(self._check(registered))
                self._checks[name] = task
                task.add_done_callback(partial(self._checked, name))

    def _may_be_suspected(self, name: str) -> bool:
        """Say whether the last check is old enough: a long answer looks like silence, too."""
        return time.monotonic() - self._checked_at_s.get(name, 0.0) >= self._config.parity_again_s

    def _checked(self, name: str, _: asyncio.Task[None]) -> None:
        del self._checks[name]

    async def _check(self, registered: RegisteredWorker) -> None:
        worker = registered.worker
        async with self._turn:
            if not self._fleet.snapshot.is_live(worker):
                return
            adapters = self._fleet.snapshot.adapters(worker)
            parity = await self._prober.check(registered, adapters[0] if adapters else None)
        self._checked_at_s[worker.incarnation] = time.monotonic()
        self._due_at_s[worker.incarnation] = time.monotonic() + self._pause_s(worker, parity)
        former = self._fleet.snapshot.parity_of(worker)
        if parity.state is State.CHECKING and former.state is not State.CHECKING:
            kept = {"answers": parity.answers, "checked_at": parity.checked_at}
            parity = msgspec.structs.replace(former, **kept)
        self._fleet.note_parity(worker, parity)
        _tell(worker, former, parity)

    def _pause_s(self, worker: Worker, parity: Parity) -> float:
        """Return how long `worker` is left alone after a check that ended with `parity`."""
        match parity.state:
            case State.EXACT:
                self._again_s.pop(worker.incarnation, None)
                return float("inf")
            case State.DEGRADED:
                return self._config.parity_again_s
            case State.CHECKING:
                again_s = self._again_s.get(worker.incarnation, FIRST_AGAIN_S)
                self._again_s[worker.incarnation] = 2 * again_s
                return min(again_s, self._config.parity_again_s)


def _tell(worker: Worker, former: Parity, parity: Parity) -> None:
    if former.answers and not parity.answers:
        log.error("worker answers no request: others are preferred", worker=worker.worker_id)
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
