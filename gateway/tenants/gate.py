"""The router as tenants see it: who they are is asked first, and what they send is kept apart."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import structlog

from gateway.decision import Caller, Decision, End, HttpRequest, Router, Served
from gateway.errors import DEFECTS, RequestError
from gateway.tenants import metrics
from gateway.tenants.bodies import Use, salted, use_of
from gateway.tenants.keys import KEY_PREFIX
from gateway.tenants.limits import Limiter
from gateway.tenants.roster import Roster, Tenant
from kvindex.log import frames

log = structlog.get_logger(__name__)

BYTES_PER_TOKEN = 4
"""A prompt is charged by the size of its body until its tokens are known."""

CREDENTIALS = ("authorization", "x-api-key", "api-key")
"""Headers that may hold a client's key; the first that does counts."""

# Source: vLLM 0.32 `vllm/entrypoints/generate/base/serving.py`: it goes before the body's `priority`.
PRIORITY_HEADER = "x-vllm-priority"

REMOVED_HEADERS = (*CREDENTIALS, PRIORITY_HEADER)

NO_TENANT = "-"
"""In metrics, of requests without a key that is known."""


class TenantGate:
    """Lets tenants' requests through to `router`, salted, and nothing else. Implements `Router`.

    A request that fails here or behind is refused: it never goes on without its salt.

    Args:
        roster: the tenants as of now.
        secret: of the salts, the same in every gateway.
        engine_key: what the engines want to see in place of the client's key; None where they want none.
    """

    def __init__(
        self,
        router: Router,
        roster: Callable[[], Roster],
        limiter: Limiter,
        *,
        secret: bytes,
        engine_key: str | None = None,
    ) -> None:
        self._router = router
        self._roster = roster
        self._limiter = limiter
        self._secret = secret
        self._engine_key = engine_key
        self._running: dict[str, str] = {}

    def admit(self, head: HttpRequest) -> None:
        """See `Router`. Refuses for the key, the path or the rate, before a body is read."""
        caller, tenant = self._known(head)
        with _counting(tenant, "path"):
            use_of(head.method, head.path)
        if wait_s := self._limiter.request_wait_s(tenant):
            raise _too_much(tenant, "requests", f"{tenant.requests_per_s:g} requests/s", wait_s)
        self._router.admit(replace(head, caller=caller))

    async def decide(self, request: HttpRequest) -> Decision:
        """See `Router`."""
        caller, tenant = self._known(request)
        body: bytes | None = None
        with _counting(tenant, "path"):
            use = use_of(request.method, request.path)
        if use is Use.SALTED:
            with _counting(tenant, "body"):
                body = salted(request.body, caller, self._secret)
        request = replace(request, caller=caller, body=request.body if body is None else body)
        estimate = 0 if body is None else len(body) // BYTES_PER_TOKEN + 1
        self._enter(tenant, estimate)
        num_tokens = 0
        try:
            with _counting(tenant, "routing"):
                decision = await self._decided(request)
            self._running[decision.decision_id] = tenant.name
            num_tokens = (decision.num_prompt_tokens or estimate) if estimate else 0
        except BaseException:
            self._leave(tenant.name)
            raise
        finally:
            self._limiter.correct_tokens(tenant, num_tokens - estimate)
        metrics.REQUESTS.labels(tenant.name).inc()
        metrics.PROMPT_TOKENS.labels(tenant.name).inc(num_tokens)
        return self._disguised(decision, body)

    async def finish(self, decision_id: str, end: End) -> None:
        """See `Router`."""
        if (name := self._running.pop(decision_id, None)) is not None:
            self._leave(name)
        await self._router.finish(decision_id, end)

    def record(self, served: Served) -> None:
        """See `Router`."""
        self._router.record(served)

    def _known(self, request: HttpRequest) -> tuple[Caller, Tenant]:
        roster = self._roster()
        key = _key_of(request)
        caller = roster.caller(key) if key else None
        if caller is None:
            metrics.REFUSED.labels(NO_TENANT, "key").inc()
            raise _unknown(key)
        return caller, roster.tenants[caller.tenant]

    def _enter(self, tenant: Tenant, num_tokens: int) -> None:
        """Count the request as running and charge its prompt tokens."""
        if not self._limiter.has_room(tenant):
            raise _too_much(tenant, "concurrency", f"{tenant.max_concurrent} requests at a time", 1)
        if num_tokens and (wait_s := self._limiter.tokens_wait_s(tenant, num_tokens)):
            raise _too_much(tenant, "tokens", f"{tenant.prompt_tokens_per_s:g} prompt tokens/s", wait_s)
        self._limiter.running[tenant.name] += 1
        metrics.RUNNING.labels(tenant.name).inc()

    def _leave(self, tenant: str) -> None:
        self._limiter.running[tenant] -= 1
        metrics.RUNNING.labels(tenant).dec()

    async def _decided(self, request: HttpRequest) -> Decision:
        try:
            return await self._router.decide(request)
        except RequestError:
            raise
        except DEFECTS as error:
            path = request.path.partition("?")[0]
            log.error("request refused", path=path, error=type(error).__name__, at=frames(error))
            raise RequestError(
                500, "The gateway failed on this request. Send it again.", kind="InternalServerError"
            ) from error

    def _disguised(self, decision: Decision, body: bytes | None) -> Decision:
        """Return the decision with the salted body, and without what only the gateway may see."""
        headers = dict(decision.request_headers)
        if self._engine_key is not None:
            headers["authorization"] = f"Bearer {self._engine_key}"
        removed = tuple(name for name in (*decision.removed_headers, *REMOVED_HEADERS) if name not in headers)
        body = decision.body if decision.body is not None else body
        return replace(decision, request_headers=headers, removed_headers=removed, body=body)


@contextlib.contextmanager
def _counting(tenant: Tenant, reason: str) -> Iterator[None]:
    """Count the refusal that ends the block."""
    try:
        yield
    except RequestError:
        metrics.REFUSED.labels(tenant.name, reason).inc()
        raise


def _key_of(request: HttpRequest) -> str:
    found = next((request.headers[name] for name in CREDENTIALS if name in request.headers), "")
    scheme, _, token = found.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else found.strip()


def _unknown(key: str) -> RequestError:
    found = "This API key is not known here." if key else "No API key came with the request."
    return RequestError(
        401,
        f"{found} Send one that the operator gave you as `Authorization: Bearer {KEY_PREFIX}...`.",
        kind="AuthenticationError",
    )


def _too_much(tenant: Tenant, reason: str, limit: str, wait_s: float) -> RequestError:
    metrics.REFUSED.labels(tenant.name, reason).inc()
    return RequestError(
        429,
        f"Tenant `{tenant.name}` may have {limit}. Send the request again after the time in Retry-After.",
        kind="RateLimitError",
        retry_after_s=math.ceil(wait_s),
    )
