"""The router: reads the prompt, looks it up, plans, charges, and remembers until the request is over."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import httpx

from gateway import metrics
from gateway.admission import AdmissionDesk
from gateway.calls import Calls
from gateway.chains import Chain
from gateway.config import GatewayConfig
from gateway.decision import Decision, End, HttpRequest, Served
from gateway.demand import RANK_HEADER, demand_of, named_model, ttft_target_ms
from gateway.disagg import Disaggregation, Pair
from gateway.errors import RequestError, TokenizerError
from gateway.fleet import Fleet
from gateway.halves import PATHS, with_load_limit, without_transfer_params
from gateway.lookup import Lookup, allowed, registered_state
from gateway.plan import Choice, Demand, least_loaded, num_requests, plan
from gateway.rates import Rates
from gateway.receipts import Receipt, Receipts
from gateway.reserve import Charge, Reserver
from gateway.service import prefer
from gateway.split import whole
from gateway.tiers import TierSpeeds
from gateway.tokens.models import ServedModel
from gateway.tokens.request import ReadRequest
from kvindex.errors import IndexUnavailable
from kvindex.index import IndexReader
from kvindex.worker import Worker


class Reader(Protocol):
    """What turns a request's bytes into token ids (`gateway.tokens`)."""

    async def read(self, path: str, body: bytes) -> ReadRequest | None:
        """Return the request's prompts, or None if the path is not one whose prompts are understood.

        Raises:
            RequestError: no engine could serve the request.
            TokenizerError: the model's tokenizer cannot be used here.
        """


@dataclass(frozen=True, slots=True)
class _InFlight:
    receipt: Receipt
    worker: Worker
    charges: tuple[Charge, ...]
    prefill: asyncio.Task[None] | None
    """The other half of a split request."""
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class _Planned:
    """Who may serve a request, best first, and what was charged for it."""

    choices: tuple[Choice, ...] = ()
    charges: tuple[Charge, ...] = ()
    pair: Pair | None = None
    """How it is split; the decode worker is the first of the choices."""


class KvRouter:
    """Sends each request to the worker that will answer soonest. Implements `Router` on one event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        index: IndexReader,
        fleet: Fleet,
        reader: Reader,
        *,
        rates: Rates,
        receipts: Receipts,
        client: httpx.AsyncClient,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._reader = reader
        self._rates = rates
        self._receipts = receipts
        self._tier_speeds = TierSpeeds(config.tier_speeds)
        self._lookup = Lookup(index, fleet, rates, self._tier_speeds, max_hashes=config.receipt_hashes)
        self._calls = Calls()
        self._reserver = Reserver(config, index, self._calls)
        self._disagg = Disaggregation(config, client)
        self._desk = AdmissionDesk(config)
        self._in_flight: dict[str, _InFlight] = {}
        self._requests: Counter[str] = Counter()
        self._answered: dict[str, float] = {}

    @property
    def requests_in_flight(self) -> Mapping[str, int]:
        """Requests sent by this gateway and not finished, by worker id."""
        return self._requests

    @property
    def tier_speeds(self) -> TierSpeeds:
        """How fast stores are taken to be."""
        return self._tier_speeds

    def silent_workers(self) -> Collection[str]:
        """Return the ids of workers that have requests, and have ended none for long."""
        long_ago = time.monotonic() - self._config.silent_after_s
        oldest: dict[str, float] = {}
        for flight in self._in_flight.values():
            oldest.setdefault(flight.worker.worker_id, flight.since)
        return {
            name for name, since in oldest.items() if max(since, self._answered.get(name, since)) < long_ago
        }

    async def stop(self) -> None:
        """Let go of prefill halves, and wait until every finished request is settled."""
        await self._disagg.stop()
        await self._calls.finished()

    def admit(self, _: HttpRequest) -> None:
        """See `Router`. A body for which there is no worker is not worth reading."""
        if not self._fleet.addresses:
            metrics.REJECTED.labels(503).inc()
            raise self._no_worker("No worker is live.")

    async def decide(self, request: HttpRequest) -> Decision:
        """See `Router`."""
        request_id = request.headers.get("x-request-id") or secrets.token_hex(8)
        path = request.path.partition("?")[0]
        receipt = Receipt(decision_id=secrets.token_hex(8), request_id=request_id, path=path)
        try:
            receipt.tenant = request.caller.tenant if request.caller else None
            receipt.ttft_target_ms = ttft_target_ms(request)
            stripped = without_transfer_params(request.body)
            if stripped is None:
                return await self._decide(request, receipt)
            decision = await self._decide(replace(request, body=stripped), receipt)
            return decision if decision.body is not None else replace(decision, body=stripped)
        except RequestError as error:
            metrics.REJECTED.labels(error.status).inc()
            raise

    async def finish(self, decision_id: str, end: End) -> None:
        """See `Router`. Returns at once; the index is told in the background."""
        flight = self._in_flight.pop(decision_id, None)
        if flight is None:
            return
        flight.receipt.end = end
        self._desk.give_back(flight.receipt)
        metrics.IN_FLIGHT.dec()
        if end is End.COMPLETE:
            self._answered[flight.worker.worker_id] = time.monotonic()
        self._requests[flight.worker.worker_id] -= 1
        if not self._requests[flight.worker.worker_id]:
            del self._requests[flight.worker.worker_id]
        if flight.prefill is not None:
            flight.prefill.cancel()
        for charge in flight.charges:
            self._reserver.take_back(charge)

    def record(self, served: Served) -> None:
        """See `Router`."""
        receipt = self._receipts.get(served.decision_id)
        if receipt is None:
            return
        receipt.served = served
        self._receipts.measured(receipt)
        if served.status == 200 and receipt.streamed and served.ttft_ms is not None:
            metrics.TTFT_SECONDS.observe(served.ttft_ms / 1000)
        self._desk.measure(receipt)
        # A proxy that follows the endpoint picker protocol may not tell who served.
        went_astray = served.worker is None and served.status != 200
        if went_astray or served.worker not in (None, receipt.destinations[0]):
            self._fleet.suspect()
        elif served.status == 200 and receipt.streamed and (late_ms := receipt.ttft_error_ms) is not None:
            if receipt.choice is None or receipt.choice.candidate.degraded:
                return  # What the worker had cached is not known.
            direction = "late" if late_ms > 0 else "early"
            metrics.TTFT_ERROR_SECONDS.labels(direction).observe(abs(late_ms) / 1000)
            if receipt.split is None:
                self._learn(receipt.choice, receipt.choice.terms.ttft_ms + late_ms)

    async def overlaps(
        self, path: str, body: bytes
    ) -> tuple[ReadRequest, tuple[Choice, ...], tuple[Chain, ...]]:
        """Return the prompts in `body`, every worker that could serve them and the chains that were
        looked up; charges nothing.

        Raises:
            RequestError: the prompts cannot be read.
            TokenizerError: the model's tokenizer cannot be used here.
            IndexUnavailable: the index does not answer.
        """
        read = await self._reader.read(path, body)
        if read is None:
            raise RequestError(400, f"{path} carries no prompt that is understood.")
        demand = demand_of(HttpRequest("POST", path, {}, body), read.model, read)
        found = await self._lookup.find(demand, self._served(read.model), read)
        return read, plan(demand, found.candidates, seed=0), found.chains + found.chunk_chains

    async def _decide(self, request: HttpRequest, receipt: Receipt) -> Decision:
        if not self._fleet.addresses:
            raise self._no_worker("No worker is live.")
        read = await self._read(request, receipt)
        receipt.model = read.model if read else named_model(request.body)
        planned = _Planned()
        if receipt.model is not None and (read or receipt.fallback):
            served = self._served(receipt.model)
            demand = demand_of(request, receipt.model, read)
            planned = await self._plan(request, demand, served, read, receipt)
        choices = receipt.choices = planned.choices
        if choices and (reason := choices[0].candidate.degraded):
            receipt.fallback = receipt.fallback or f"parity_{reason}"
        workers: Sequence[Worker] = [choice.candidate.worker for choice in choices]
        if not workers:
            workers = self._by_load(request, receipt)
        if receipt.fallback:
            receipt.mode = "load"
        elif planned.pair is not None:
            receipt.mode, receipt.split = "split", planned.pair.split
        else:
            receipt.mode = "overlap" if choices else "passed"
        return self._send(request, receipt, workers, planned)

    async def _read(self, request: HttpRequest, receipt: Receipt) -> ReadRequest | None:
        """Return the request's prompts; None, with a fallback noted if they could not be read here."""
        if request.method != "POST":
            return None
        deadline_ms = self._config.tokenize_deadline_ms
        deadline_ms += self._config.tokenize_deadline_ms_per_mb * len(request.body) // 1_000_000
        try:
            with _step(receipt, "read"):
                async with asyncio.timeout(deadline_ms / 1000):
                    return await self._read_known(request)
        except TimeoutError:
            receipt.fallback = "tokenize_deadline"
        except TokenizerError:
            receipt.fallback = "tokenizer"
        return None

    async def _read_known(self, request: HttpRequest) -> ReadRequest | None:
        try:
            return await self._reader.read(request.path, request.body)
        except RequestError as error:
            if error.status != 404:
                raise
            if (model := named_model(request.body)) is not None and self._is_between_workers(model):
                raise self._no_worker(f"No worker that serves `{model}` is live.") from error
        await self._fleet.look_again()
        return await self._reader.read(request.path, request.body)

    async def _plan(
        self,
        request: HttpRequest,
        demand: Demand,
        served: ServedModel,
        read: ReadRequest | None,
        receipt: Receipt,
    ) -> _Planned:
        """Return the plan and its charge; nothing, with a fallback noted, if the index is away."""
        receipt.prompt_tokens = demand.num_tokens
        if read:
            receipt.inexact, receipt.streamed = read.inexact, read.stream
            receipt.max_output_tokens = read.max_output_tokens
        if self._fleet.failure is not None:
            receipt.fallback = receipt.fallback or "index_unavailable"
            return _Planned()
        try:
            with _step(receipt, "match"):
                finding = self._calls.start(self._lookup.find(demand, served, read))
                found = await self._calls.within(self._config.index_deadline_ms, finding)
        except TimeoutError:
            receipt.fallback = receipt.fallback or "index_deadline"
            return _Planned()
        except IndexUnavailable:
            receipt.fallback = receipt.fallback or "index_unavailable"
            return _Planned()
        receipt.excluded, receipt.chains = found.excluded, found.chains
        receipt.chunk_chains = found.chunk_chains
        with _step(receipt, "plan"):
            foreseen = self._reserver.foreseen(found.candidates, found.prompts)
            choices = plan(demand, foreseen, seed=int(receipt.decision_id, 16))
            choices = prefer(choices, receipt.ttft_target_ms)
            dividend = self._disagg.dividend(request, read)
        if choices:
            receipt.choices = whole(choices)
            receipt.verdict = self._desk.judge(receipt)
            with _step(receipt, "reserve"):
                charged = await self._reserver.charge(
                    receipt.decision_id,
                    demand,
                    found.candidates,
                    choices,
                    found.prompts,
                    ttft_target_ms=receipt.ttft_target_ms,
                    propose=None if dividend is None else partial(self._disagg.propose, demand, dividend),
                )
            receipt.replans = charged.replans
            if charged.choices:
                pair = None
                if charged.split is not None and dividend is not None:
                    pair = self._disagg.pair(charged.split, dividend, charged.charges[0].decision_id)
                return _Planned(charged.choices, charged.charges, pair)
            for charge in charged.charges:
                self._reserver.take_back(charge)
        elif self._fleet.is_recovering and not found.excluded:
            receipt.fallback = receipt.fallback or "index_recovering"
            return _Planned()
        raise self._no_worker(f"No live worker can serve `{demand.model}` now.", found.excluded)

    def _by_load(self, request: HttpRequest, receipt: Receipt) -> tuple[Worker, ...]:
        """Return the workers that serve the named model, or any if nobody knows it, least loaded first."""
        snapshot = self._fleet.snapshot
        is_known = any(model.name == receipt.model for model in snapshot.models)
        demand = demand_of(request, receipt.model if is_known else None, None)
        registered, receipt.excluded = allowed(snapshot.workers(), demand, self._fleet)
        if not registered:
            raise self._no_worker("No live worker can serve the request now.", receipt.excluded)
        requests = dict(self._requests)
        # What we sent ourselves is always known; what others sent only while the index answers.
        if self._fleet.failure is None:
            for each in registered:
                name = each.worker.worker_id
                requests[name] = max(requests.get(name, 0), num_requests(registered_state(each)))
        seed = int(receipt.decision_id, 16)
        return least_loaded([each.worker for each in registered], requests, seed=seed)

    def _send(
        self, request: HttpRequest, receipt: Receipt, workers: Sequence[Worker], planned: _Planned
    ) -> Decision:
        chosen = workers[0]
        decision_id = receipt.decision_id
        request_headers = {"x-request-id": f"{receipt.request_id}-kv{decision_id}"}
        if chosen.dp_size > 1:
            request_headers[RANK_HEADER] = str(chosen.dp_rank)
            # The rank goes to whoever answers, so it must exist there.
            workers = [worker for worker in workers if worker.dp_size == chosen.dp_size]
        endpoints = dict.fromkeys(worker.endpoint for worker in workers)
        receipt.chosen = chosen.worker_id
        receipt.destinations = tuple(endpoints)[: 1 + self._config.fallbacks]
        response_headers = {
            "x-kvlane-worker": chosen.worker_id,
            "x-kvlane-matched-tokens": str(receipt.matched_tokens),
            "x-kvlane-decision": decision_id,
        }
        if receipt.fallback:
            response_headers["x-kvlane-fallback"] = receipt.fallback
        prefill = None
        if (pair := planned.pair) is not None:
            response_headers["x-kvlane-prefill"] = pair.prefill_worker.worker_id
            prefill = self._disagg.send_prefill(request.path, pair, _prefill_headers(receipt, pair))
        metrics.DECISIONS.labels(receipt.mode, receipt.fallback or "").inc()
        metrics.PROMPT_TOKENS.inc(receipt.prompt_tokens)
        metrics.MATCHED_TOKENS.inc(receipt.matched_tokens)
        _count_loads(planned.pair.split.prefill if planned.pair is not None else receipt.choice)
        metrics.IN_FLIGHT.inc()
        self._receipts.add(receipt)
        self._requests[chosen.worker_id] += 1
        self._in_flight[decision_id] = _InFlight(receipt, chosen, planned.charges, prefill)
        self._desk.take(request.caller, receipt)
        return Decision(
            decision_id,
            receipt.destinations,
            request_headers=request_headers,
            body=pair.bodies.decode if pair else self._limited_body(request, receipt),
            response_headers=response_headers,
            num_prompt_tokens=receipt.prompt_tokens,
        )

    def _limited_body(self, request: HttpRequest, receipt: Receipt) -> bytes | None:
        """Return a body that says how far to read tiers; None where all that they have is to be loaded."""
        limit_tokens = receipt.choice.load_limit_tokens if receipt.choice is not None else None
        if limit_tokens is None or receipt.path not in PATHS:
            return None
        return with_load_limit(request.body, limit_tokens)

    def _learn(self, choice: Choice, ttft_ms: float) -> None:
        if choice.loads:
            self._tier_speeds.observe(
                choice.loads,
                predicted_ms=choice.terms.ttft_ms,
                queue_ms=choice.terms.queue_ms,
                ttft_ms=ttft_ms,
            )
            return
        num_tokens = choice.uncached_tokens + choice.candidate.state.backlog_tokens
        worker = choice.candidate.worker
        self._rates.observe(
            worker,
            self._fleet.snapshot.basis_of(worker),
            num_tokens=num_tokens,
            predicted_ms=choice.terms.ttft_ms,
            queue_ms=choice.terms.queue_ms,
            by=choice.candidate.profile,
            ttft_ms=ttft_ms,
        )

    def _served(self, model: str) -> ServedModel:
        return self._fleet.snapshot.models.find(model)

    def _is_between_workers(self, model: str) -> bool:
        """Whether the index still knows a pool of `model` whose workers have all gone."""
        return any(pool.model == model for pool in self._fleet.snapshot.pools)

    def _no_worker(self, message: str, excluded: Mapping[str, str] | None = None) -> RequestError:
        reasons = Counter((excluded or {}).values())
        details = "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        return RequestError(
            503,
            f"{message} Try again later." + (f" Workers: {details}." if details else ""),
            kind="ServiceUnavailableError",
            retry_after_s=self._config.retry_after_s,
        )


def _count_loads(choice: Choice | None) -> None:
    for load in choice.loads if choice is not None else ():
        metrics.LOADED_TOKENS.labels(load.tier).inc(load.num_tokens)
    for load in choice.passed_over if choice is not None else ():
        metrics.UNLOADED_TOKENS.labels(load.tier).inc(load.num_tokens)


def _prefill_headers(receipt: Receipt, pair: Pair) -> dict[str, str]:
    headers = {"x-request-id": f"{receipt.request_id}-kv{pair.prefill_id}"}
    if pair.prefill_worker.dp_size > 1:
        headers[RANK_HEADER] = str(pair.prefill_worker.dp_rank)
    return headers


@contextlib.contextmanager
def _step(receipt: Receipt, name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        elapsed_s = time.perf_counter() - start
        receipt.steps_ms[name] = elapsed_s * 1000
        metrics.STEP_SECONDS.labels(name).observe(elapsed_s)
