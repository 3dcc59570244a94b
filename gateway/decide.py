"""The router: reads the prompt, looks it up, plans, charges, and remembers until the request is over."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from gateway import metrics
from gateway.admission import TTFT_TARGET_HEADER, AdmissionDesk
from gateway.calls import Calls
from gateway.chains import Chain
from gateway.config import GatewayConfig
from gateway.decision import Decision, End, HttpRequest, Served
from gateway.errors import RequestError, TokenizerError
from gateway.fleet import Fleet
from gateway.lookup import Lookup, allowed, longest_prompt, registered_state
from gateway.plan import Choice, Demand, least_loaded, num_requests, plan
from gateway.rates import Rates
from gateway.receipts import Receipt, Receipts
from gateway.reserve import Charge, Reserver
from gateway.service import prefer
from gateway.tokens.models import ServedModel
from gateway.tokens.request import ReadRequest
from kvindex.errors import IndexUnavailable
from kvindex.index import IndexReader
from kvindex.worker import Worker

BYTES_PER_TOKEN = 4
"""A prompt whose tokens are not known is charged by the size of its body."""

RANK_HEADER = "x-data-parallel-rank"
"""Source: vLLM 0.32 `vllm/entrypoints/openai/engine/serving.py`, _get_data_parallel_rank."""


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
    charge: Charge | None
    since: float = field(default_factory=time.monotonic)


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
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._reader = reader
        self._rates = rates
        self._receipts = receipts
        self._lookup = Lookup(index, fleet, rates, max_hashes=config.receipt_hashes)
        self._calls = Calls()
        self._reserver = Reserver(config, index, self._calls)
        self._desk = AdmissionDesk(config)
        self._in_flight: dict[str, _InFlight] = {}
        self._requests: Counter[str] = Counter()
        self._answered: dict[str, float] = {}

    @property
    def requests_in_flight(self) -> Mapping[str, int]:
        """Requests sent by this gateway and not finished, by worker id."""
        return self._requests

    def silent_workers(self) -> Collection[str]:
        """Return the ids of workers that have let a request wait for long and ended none meanwhile."""
        now = time.monotonic()
        oldest: dict[str, float] = {}
        for flight in self._in_flight.values():
            oldest.setdefault(flight.worker.worker_id, flight.since)
        return {
            name
            for name, since in oldest.items()
            if now - since > self._config.silent_after_s and self._answered.get(name, since) <= since
        }

    async def stop(self) -> None:
        """Wait until every finished request is settled."""
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
            receipt.ttft_target_ms = _ttft_target_ms(request)
            return await self._decide(request, receipt)
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
        if flight.charge is not None:
            self._reserver.take_back(flight.charge)

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
        elif receipt.choice and receipt.choice.candidate.degraded:
            return  # What it had cached is not known, so neither is what it computed.
        elif served.status == 200 and receipt.streamed and served.ttft_ms is not None and receipt.choice:
            self._learn(receipt.choice, served.ttft_ms - sum(receipt.steps_ms.values()))

    async def overlaps(
        self, path: str, body: bytes
    ) -> tuple[ReadRequest, tuple[Choice, ...], tuple[Chain, ...]]:
        """Return the prompts in `body`, every worker that could serve them and the chain that was looked up;
        charges nothing.

        Raises:
            RequestError: the prompts cannot be read.
            TokenizerError: the model's tokenizer cannot be used here.
            IndexUnavailable: the index does not answer.
        """
        read = await self._reader.read(path, body)
        if read is None:
            raise RequestError(400, f"{path} carries no prompt that is understood.")
        demand = _demand(HttpRequest("POST", path, {}, body), read.model, read)
        found = await self._lookup.find(demand, self._served(read.model), read)
        return read, plan(demand, found.candidates, seed=0), found.chains

    async def _decide(self, request: HttpRequest, receipt: Receipt) -> Decision:
        if not self._fleet.addresses:
            raise self._no_worker("No worker is live.")
        read = await self._read(request, receipt)
        receipt.model = read.model if read else named_model(request.body)
        choices: tuple[Choice, ...] = ()
        charge = None
        if receipt.model is not None and (read or receipt.fallback):
            served = self._served(receipt.model)
            demand = _demand(request, receipt.model, read)
            choices, charge = await self._plan(demand, served, read, receipt)
        receipt.choices = choices
        if choices and (reason := choices[0].candidate.degraded):
            receipt.fallback = receipt.fallback or f"parity_{reason}"
        workers: Sequence[Worker] = [choice.candidate.worker for choice in choices]
        if not workers:
            workers = self._by_load(request, receipt)
        if receipt.fallback:
            receipt.mode = "load"
        else:
            receipt.mode = "overlap" if choices else "passed"
        return self._send(request, receipt, workers, charge)

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
        self, demand: Demand, served: ServedModel, read: ReadRequest | None, receipt: Receipt
    ) -> tuple[tuple[Choice, ...], Charge | None]:
        """Return the plan and its charge; nothing, with a fallback noted, if the index is away."""
        receipt.prompt_tokens = demand.num_tokens
        if read:
            receipt.inexact, receipt.streamed = read.inexact, read.stream
        if self._fleet.failure is not None:
            receipt.fallback = receipt.fallback or "index_unavailable"
            return (), None
        try:
            with _step(receipt, "match"):
                finding = self._calls.start(self._lookup.find(demand, served, read))
                found = await self._calls.within(self._config.index_deadline_ms, finding)
        except TimeoutError:
            receipt.fallback = receipt.fallback or "index_deadline"
            return (), None
        except IndexUnavailable:
            receipt.fallback = receipt.fallback or "index_unavailable"
            return (), None
        receipt.excluded, receipt.chains = found.excluded, found.chains
        with _step(receipt, "plan"):
            foreseen = self._reserver.foreseen(found.candidates, found.prompts)
            choices = plan(demand, foreseen, seed=int(receipt.decision_id, 16))
            choices = prefer(choices, receipt.ttft_target_ms)
        if choices:
            receipt.choices = choices
            receipt.verdict = self._desk.judge(receipt)
            with _step(receipt, "reserve"):
                charged = await self._reserver.charge(
                    receipt.decision_id,
                    demand,
                    found.candidates,
                    choices,
                    found.prompts,
                    ttft_target_ms=receipt.ttft_target_ms,
                )
            receipt.replans = charged.replans
            if charged.choices:
                return charged.choices, charged.charge
            self._reserver.take_back(charged.charge)
        elif self._fleet.is_recovering and not found.excluded:
            receipt.fallback = receipt.fallback or "index_recovering"
            return (), None
        raise self._no_worker(f"No live worker can serve `{demand.model}` now.", found.excluded)

    def _by_load(self, request: HttpRequest, receipt: Receipt) -> tuple[Worker, ...]:
        """Return the workers that serve the named model, or any if nobody knows it, least loaded first."""
        snapshot = self._fleet.snapshot
        is_known = any(model.name == receipt.model for model in snapshot.models)
        demand = _demand(request, receipt.model if is_known else None, None)
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
        self, request: HttpRequest, receipt: Receipt, workers: Sequence[Worker], charge: Charge | None
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
        metrics.DECISIONS.labels(receipt.mode, receipt.fallback or "").inc()
        metrics.PROMPT_TOKENS.inc(receipt.prompt_tokens)
        metrics.MATCHED_TOKENS.inc(receipt.matched_tokens)
        metrics.IN_FLIGHT.inc()
        self._receipts.add(receipt)
        self._requests[chosen.worker_id] += 1
        self._in_flight[decision_id] = _InFlight(receipt, chosen, charge)
        self._desk.take(request.caller, receipt)
        return Decision(
            decision_id,
            receipt.destinations,
            request_headers=request_headers,
            response_headers=response_headers,
            num_prompt_tokens=receipt.prompt_tokens,
        )

    def _learn(self, choice: Choice, ttft_ms: float) -> None:
        late_ms = ttft_ms - choice.terms.ttft_ms
        direction = "late" if late_ms > 0 else "early"
        metrics.TTFT_ERROR_SECONDS.labels(direction).observe(abs(late_ms) / 1000)
        num_tokens = choice.uncached_tokens + choice.candidate.state.backlog_tokens
        self._rates.observe(
            choice.candidate.worker,
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


class _Named(msgspec.Struct):
    model: str | None = None


def named_model(body: bytes) -> str | None:
    """Return the `model` of a JSON body, without looking at anything else."""
    try:
        return msgspec.json.decode(body, type=_Named).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _demand(request: HttpRequest, model: str | None, read: ReadRequest | None) -> Demand:
    """Return what the request asks of a worker; without its tokens, an estimate."""
    rank = request.headers.get(RANK_HEADER, "")
    return Demand(
        num_tokens=read.num_tokens if read else len(request.body) // BYTES_PER_TOKEN,
        num_lookup_tokens=len(longest_prompt(read).tokens) if read else 0,
        model=model,
        num_context_tokens=max(len(prompt.tokens) for prompt in read.prompts) if read else 0,
        endpoints=request.candidates,
        dp_rank=int(rank) if rank.isascii() and rank.isdecimal() else None,
    )


def _ttft_target_ms(request: HttpRequest) -> float | None:
    """Return the request's own target, or its key's.

    Raises:
        RequestError: 400, the header is no time.
    """
    if (given := request.headers.get(TTFT_TARGET_HEADER)) is None:
        return request.caller.ttft_target_ms if request.caller else None
    try:
        target_ms = float(given)
    except ValueError:
        target_ms = 0.0
    if not 0 < target_ms < math.inf:
        raise RequestError(400, f"{TTFT_TARGET_HEADER} must be a time in milliseconds, such as 800.")
    return target_ms


@contextlib.contextmanager
def _step(receipt: Receipt, name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        elapsed_s = time.perf_counter() - start
        receipt.steps_ms[name] = elapsed_s * 1000
        metrics.STEP_SECONDS.labels(name).observe(elapsed_s)
