"""Splits requests: proposes a pair of workers, sends the prefill half, and ends it in time."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import structlog

from connectors.params import new_transfer_id
from gateway import metrics
from gateway.config import GatewayConfig
from gateway.decision import HttpRequest
from gateway.halves import PATHS, Fields, Halves, divisible, make_halves
from gateway.plan import Choice, Demand
from gateway.probe import worker_url
from gateway.split import ASSUMED, Split, Wire, best_split
from gateway.tokens.request import ReadRequest
from kvindex.worker import Worker

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """A request that is split: its workers, and what each of them gets."""

    split: Split
    bodies: Halves
    prefill_id: str
    """The prefill half's own decision id, by which its worker settles its charge."""

    @property
    def prefill_worker(self) -> Worker:
        """Who computes the prompt."""
        return self.split.prefill.candidate.worker


class Dividend:
    """A request that may be split. Its body is read once a plan would."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    @functools.cached_property
    def fields(self) -> Fields | None:
        """What can be divided; None if it must stay whole after all."""
        return divisible(self._body)


def _given_wire(config: GatewayConfig) -> Wire | None:
    gb_per_s, latency_ms = config.transfer_gb_per_s, config.transfer_latency_ms
    if gb_per_s is None and latency_ms is None:
        return None
    return Wire(
        gb_per_s=ASSUMED.gb_per_s if gb_per_s is None else gb_per_s,
        latency_ms=ASSUMED.latency_ms if latency_ms is None else latency_ms,
    )


class Disaggregation:
    """Everything about split requests that is not planned, on one event loop.

    Nobody waits for a prefill half: the decode worker hears of it from the prefill worker, and computes
    the prompt itself if it does not. What is said of a failure is for the operator.

    Args:
        client: HTTP client for the workers, not closed.
    """

    def __init__(self, config: GatewayConfig, client: httpx.AsyncClient) -> None:
        self._wire = _given_wire(config)
        self._client = client
        self._running: set[asyncio.Task[None]] = set()

    def dividend(self, request: HttpRequest, read: ReadRequest | None) -> Dividend | None:
        """Return a request as one that may be split; None if it must stay whole."""
        path = request.path.partition("?")[0]
        if path not in PATHS or read is None or len(read.prompts) != 1:
            return None
        return Dividend(request.body)

    def propose(self, demand: Demand, dividend: Dividend, choices: Sequence[Choice]) -> Split | None:
        """Return the two workers for a request that costs less on two; None if it stays whole.

        Args:
            choices: the plan, best first; not empty.
        """
        split = best_split(demand, choices, self._wire)
        return split if split is not None and dividend.fields is not None else None

    def pair(self, split: Split, dividend: Dividend, prefill_id: str) -> Pair | None:
        """Return what both workers get; None if the request must stay whole.

        Args:
            prefill_id: under which the prefill worker was charged.
        """
        if dividend.fields is None:
            return None
        sender = split.prefill.candidate.worker
        bodies = make_halves(
            dividend.fields,
            transfer_id=new_transfer_id(),
            peer=sender.transfer_address,
            peer_tp_size=sender.tp_size,
            load_limits=(split.prefill.load_limit_tokens, split.decode_limit_tokens),
        )
        return Pair(split, bodies, prefill_id)

    def send_prefill(self, path: str, pair: Pair, headers: dict[str, str]) -> asyncio.Task[None]:
        """Send the prefill half; its worker computes no more once the task is cancelled."""
        task = asyncio.create_task(self._send(path, pair, headers))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def stop(self) -> None:
        """Let go of all prefill halves."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _send(self, path: str, pair: Pair, headers: dict[str, str]) -> None:
        worker, outcome = pair.prefill_worker, "cancelled"
        try:
            answer = await self._client.post(
                worker_url(self._client, worker.endpoint, path),
                content=pair.bodies.prefill,
                headers={"content-type": "application/json", **headers},
                # It may queue for as long as the client waits, whose end cancels it.
                timeout=httpx.Timeout(self._client.timeout.connect, read=None),
            )
            outcome = "done" if answer.is_success else "refused"
            if not answer.is_success:
                log.warning("prefill half refused", worker=worker.worker_id, status=answer.status_code)
        except httpx.HTTPError as error:
            outcome = "failed"
            log.warning("prefill half failed", worker=worker.worker_id, error=type(error).__name__)
        finally:
            metrics.PREFILL_HALVES.labels(outcome).inc()
