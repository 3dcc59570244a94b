"""OpenTelemetry spans of requests: the client's trace goes on through the gateway and into the engine.

Needs the extra `otel`; imported only where tracing is on. One span a request, from the decision to the end
of its stream. Where spans go is said by OpenTelemetry's own variables (`OTEL_EXPORTER_OTLP_ENDPOINT`,
`OTEL_TRACES_SAMPLER`, `OTEL_SERVICE_NAME`); an unsampled client's trace stays unsampled.

Source: W3C Trace Context; OpenTelemetry semantic conventions for generative AI.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.decision import Decision, End, HttpRequest, Router, Served
from gateway.errors import RequestError
from gateway.receipts import Receipts

SERVICE_NAME = "kvlane-gateway"
MEASURED_WITHIN_S = 1.0
"""How long a span whose stream has ended is kept for what the access log says of it."""

_CONTEXT = TraceContextTextMapPropagator()


@contextlib.asynccontextmanager
async def traced(router: Router, receipts: Receipts) -> AsyncIterator[Router]:
    """Yield `router` with spans, which are exported over OTLP; what is left is sent at the end."""
    resource = Resource.create()
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracing = TracedRouter(router, provider.get_tracer(SERVICE_NAME), receipts)
    try:
        yield tracing
    finally:
        tracing.close()
        await asyncio.to_thread(provider.shutdown)


@dataclass(slots=True)
class _Open:
    span: Span
    ended_ns: int | None = None
    is_measured: bool = False


class TracedRouter:
    """A router each of whose decisions is a span. Implements `Router` on one event loop.

    Args:
        router: decides.
        receipts: where its decisions can be read.
    """

    def __init__(self, router: Router, tracer: Tracer, receipts: Receipts) -> None:
        self._router = router
        self._tracer = tracer
        self._receipts = receipts
        self._open: dict[str, _Open] = {}

    def close(self) -> None:
        """End the spans that are left."""
        for decision_id in tuple(self._open):
            self._end(decision_id)

    def admit(self, head: HttpRequest, /) -> None:
        """See `Router`."""
        self._router.admit(head)

    async def decide(self, request: HttpRequest) -> Decision:
        """See `Router`. The engine's parent is our span."""
        span = self._tracer.start_span(
            "kvlane.request",
            context=_CONTEXT.extract(request.headers),
            attributes={"url.path": request.path.partition("?")[0], "http.request.method": request.method},
        )
        try:
            decision = await self._router.decide(request)
        except RequestError as error:
            span.set_attribute("http.response.status_code", error.status)
            span.end()
            raise
        except BaseException as error:
            # By its kind alone: the message may repeat what the client sent.
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
            span.end()
            raise
        self._describe(span, decision)
        self._open[decision.decision_id] = _Open(span)
        headers = dict(decision.request_headers)
        _CONTEXT.inject(headers, set_span_in_context(span))
        return replace(decision, request_headers=headers)

    async def finish(self, decision_id: str, end: End) -> None:
        """See `Router`."""
        await self._router.finish(decision_id, end)
        if (found := self._open.get(decision_id)) is not None:
            found.ended_ns = time.time_ns()
            found.span.set_attribute("kvlane.end", end)
            if found.is_measured:
                self._end(decision_id)
            else:
                asyncio.get_running_loop().call_later(MEASURED_WITHIN_S, self._end, decision_id)

    def record(self, served: Served) -> None:
        """See `Router`."""
        self._router.record(served)
        if (found := self._open.get(served.decision_id)) is not None:
            found.is_measured = True
            found.span.set_attribute("http.response.status_code", served.status)
            found.span.set_attribute("kvlane.served_by", served.worker or "")
            if served.ttft_ms is not None:
                found.span.set_attribute("kvlane.ttft_ms", served.ttft_ms)
            if found.ended_ns is not None:
                self._end(served.decision_id)

    def _end(self, decision_id: str) -> None:
        if (found := self._open.pop(decision_id, None)) is not None:
            found.span.end(found.ended_ns)

    def _describe(self, span: Span, decision: Decision) -> None:
        span.set_attribute("kvlane.decision_id", decision.decision_id)
        span.set_attribute("kvlane.destinations", list(decision.destinations))
        if not span.is_recording() or (receipt := self._receipts.get(decision.decision_id)) is None:
            return
        span.set_attribute("gen_ai.request.model", receipt.model or "")
        if receipt.tenant is not None:
            span.set_attribute("kvlane.tenant", receipt.tenant)
        span.set_attribute("kvlane.prompt_tokens", receipt.prompt_tokens)
        span.set_attribute("kvlane.matched_tokens", receipt.matched_tokens)
        span.set_attribute("kvlane.fallback", receipt.fallback or "")
        for step, took_ms in receipt.steps_ms.items():
            span.set_attribute(f"kvlane.{step}_ms", took_ms)
        if receipt.choice is not None:
            span.set_attribute("kvlane.predicted_ttft_ms", receipt.choice.terms.ttft_ms)
