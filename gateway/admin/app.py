"""The admin API: health, readiness, metrics, the fleet, and why a request went where it went."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import StreamingResponse

from gateway.admin.history import Historian
from gateway.admin.predictions import view_rates
from gateway.chains import Chain
from gateway.decide import KvRouter
from gateway.errors import RequestError, TokenizerError
from gateway.fleet import Fleet
from gateway.plan import Choice
from gateway.rates import Rates
from gateway.readiness import Readiness
from gateway.receipts import Receipt, Receipts
from gateway.recording import recorded
from gateway.tenants.salts import cache_salt
from kvindex.errors import IndexUnavailable
from kvindex.index import IndexReader
from kvindex.worker import RegisteredWorker, Tier

UNAVAILABLE_ERRORS = (IndexUnavailable, TokenizerError)


def create_app(
    router: KvRouter,
    fleet: Fleet,
    index: IndexReader,
    *,
    rates: Rates,
    receipts: Receipts,
    readiness: Readiness,
    salt_secret: bytes | None = None,
) -> FastAPI:
    """Return the app. It authenticates nobody: see `TokenGuard`."""
    historian = Historian(index, fleet, receipts)
    app = FastAPI(title="kvlane gateway", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> Response:
        """Answer as long as the event loop turns."""
        return _json({"status": "alive"})

    @app.get("/ready")
    async def ready() -> Response:
        """Answer 200 once the index has been read; later failures of it only degrade the routing."""
        if not readiness.is_ready:
            reason = fleet.failure or f"the gateway is {readiness.state}"
            return _json({"status": "unready", "reason": reason}, status=503)
        if fleet.failure:
            return _json({"status": "degraded", "reason": fleet.failure})
        return _json({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return the process's metrics in Prometheus' text format."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/fleet")
    async def show_fleet() -> Response:
        """Return every live worker with its load, rates, blocks and parity, and the state of every pool."""
        snapshot = fleet.snapshot

        def view(registered: RegisteredWorker) -> dict[str, Any]:
            worker = registered.worker
            known: dict[str, Any] = msgspec.to_builtins(registered)
            return known | {
                "worker_id": worker.worker_id,
                "pool_id": worker.pool.pool_id,
                "models": sorted(snapshot.served_names(worker)),
                "reachable": worker.endpoint not in snapshot.unreachable,
                "parity": snapshot.parity_of(worker),
                "prefill_tokens_per_s": rates.profile(worker, snapshot.basis_of(worker)).prefill_tokens_per_s,
                "requests_from_here": router.requests_in_flight.get(worker.worker_id, 0),
            }

        pools = [
            {"pool_id": pool.pool_id, "model": pool.model, "block_size": pool.block_size}
            | {"num_workers": len(live.workers), "parity": snapshot.pool_state(pool)}
            for pool, live in snapshot.pools.items()
        ]
        return _json(
            {
                "failure": fleet.failure,
                "parity_probe": fleet.checks_parity,
                "pools": pools,
                "workers": [view(each) for each in snapshot.workers()],
            }
        )

    @app.get("/rates")
    async def show_rates() -> Response:
        """Return what steps and loads cost, whence that is known, and how far predictions were off."""
        return _json(view_rates(fleet.snapshot, rates, router.tier_speeds, receipts))

    @app.get("/decisions")
    async def latest_decisions(limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> Response:
        """Return the latest receipts, newest first."""
        return _json([receipt.view() for receipt in receipts.latest(limit)])

    @app.get("/decisions/{key:path}")
    async def decision(key: str) -> Response:
        """Return the receipt of a decision id or of a client's x-request-id."""
        if receipt := receipts.get(key):
            return _json(receipt.view())
        return _unknown(key)

    @app.get("/recording")
    async def recording() -> Response:
        """Return the receipts as a trace, a JSON object a line, oldest first: hashes and counts."""
        return StreamingResponse(_lines(list(receipts.latest())[::-1]), media_type="application/x-ndjson")

    @app.get("/why/{key:path}")
    async def why(key: str, worker: str | None = None) -> Response:
        """Return why the decision's worker, the best holder and `worker` did not hold more of the prompt."""
        receipt = receipts.get(key)
        if receipt is None:
            return _unknown(key)
        try:
            return _json(await historian.why(receipt, worker))
        except IndexUnavailable as error:
            return _json({"detail": str(error)}, status=503)

    @app.get("/traffic")
    async def traffic(seconds: Annotated[float, Query(gt=0, le=3600)] = 60) -> Response:
        """Return what was asked and matched lately, overall and by worker, as far as receipts go back."""
        return _json(_traffic(receipts, seconds))

    @app.get("/prompts")
    async def prompts(limit: Annotated[int, Query(ge=1, le=1000)] = 200) -> Response:
        """Return the block hashes of the latest prompts, newest first."""
        return _json([_view_prompt(receipt) for receipt in receipts.latest(limit)])

    @app.post("/prefix")
    async def prefix(request: Request) -> Response:
        """Return how much of a prompt each worker holds, and how soon it would answer it.

        The body is `{"model", "text"}`, or that of a chat request; with `tenant`, as if that tenant sent it.
        """
        try:
            path, body = _asked_prompt(await request.body(), salt_secret)
            read, choices, chains = await router.overlaps(path, body)
        except msgspec.DecodeError as error:
            return _json({"detail": f"the body is no JSON object: {error}"}, status=400)
        except RequestError as error:
            return Response(error.body(), error.status, media_type="application/json")
        except UNAVAILABLE_ERRORS as error:
            return _json({"detail": str(error)}, status=503)
        return _json(
            {
                "model": read.model,
                "prompt_tokens": read.num_tokens,
                "inexact": read.inexact,
                "workers": [_view_overlap(choice) for choice in choices],
                "chains": [_view_chain(chain) for chain in chains],
            }
        )

    return app


async def _lines(receipts: Sequence[Receipt]) -> AsyncIterator[bytes]:
    for receipt in receipts:
        if (line := recorded(receipt)) is not None:
            yield msgspec.json.encode(line) + b"\n"
            await asyncio.sleep(0)  # requests do not wait for all of them


def _asked_prompt(content: bytes, salt_secret: bytes | None) -> tuple[str, bytes]:
    """Return the path and body of the request that a client would have sent."""
    fields = msgspec.json.decode(content, type=dict[str, Any])
    if (tenant := fields.pop("tenant", None)) is not None:
        if salt_secret is None:
            raise RequestError(400, "This gateway tells no tenants apart.", param="tenant")
        fields["cache_salt"] = cache_salt(salt_secret, tenant, fields.get("cache_salt"))
    path = "/v1/chat/completions"
    if "text" in fields:
        path = "/v1/completions"
        fields["prompt"] = fields.pop("text")
    return path, msgspec.json.encode(fields)


def _view_overlap(choice: Choice) -> dict[str, Any]:
    candidate = choice.candidate
    tiers: dict[Tier, int] = {}
    for part in candidate.tiers:
        tiers[part.tier] = tiers.get(part.tier, 0) + part.end_token - part.first_token
    return {
        "worker": candidate.worker.worker_id,
        "matched_blocks": candidate.overlap_blocks,
        "matched_tokens": candidate.overlap_blocks * candidate.worker.block_size,
        "degraded": candidate.degraded,
        "tier_tokens": {Tier.DEVICE: candidate.overlap_blocks * candidate.worker.block_size} | tiers,
        "predicted_ttft_ms": choice.terms.ttft_ms,
        "cuts": msgspec.to_builtins(choice.cuts),
    }


def _view_prompt(receipt: Receipt) -> dict[str, Any]:
    return {
        "decision_id": receipt.decision_id,
        "at": receipt.at,
        "model": receipt.model,
        "worker": receipt.chosen,
        "prompt_tokens": receipt.prompt_tokens,
        "matched_tokens": receipt.matched_tokens,
        "chains": [_view_chain(chain) for chain in receipt.chains + receipt.chunk_chains],
    }


def _view_chain(chain: Chain) -> dict[str, Any]:
    return {
        "pool_id": chain.pool.pool_id,
        "num_blocks": chain.num_blocks,
        "stride": chain.stride,
        "hashes": base64.b64encode(chain.hashes).decode(),
    }


def _traffic(receipts: Receipts, seconds: float) -> dict[str, Any]:
    now = time.time()
    counted = ("requests", "prompt_tokens", "matched_tokens")
    total = dict.fromkeys(counted, 0)
    workers: defaultdict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(counted, 0))
    covered_s = 0.0
    for receipt in receipts.latest():
        covered_s = min(now - receipt.at, seconds)
        if now - receipt.at > seconds:
            break
        for counts in (total, workers[receipt.chosen or ""]):
            counts["requests"] += 1
            counts["prompt_tokens"] += receipt.prompt_tokens
            counts["matched_tokens"] += receipt.matched_tokens
    return {"covered_s": covered_s, "total": total, "workers": workers}


def _unknown(key: str) -> Response:
    return _json({"detail": f"no decision {key} here: too old, or of another gateway"}, status=404)


def _json(content: object, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
