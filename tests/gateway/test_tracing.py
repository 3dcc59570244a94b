"""One span a request, a child of the client's and the parent of the engine's."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.responses import JSONResponse, Response

from gateway import tracing
from gateway.decision import End, HttpRequest, Served
from gateway.errors import RequestError
from gateway.receipts import Receipt, Receipts
from gateway.tracing import TracedRouter, traced
from tests.support.envoy import KnownEndpoints, ScriptedRouter, Stack, serve
from tests.support.waiting import eventually

TRACE, CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{CLIENT}-01", f"00-{TRACE}-{CLIENT}-00"
WORKER = "10.0.0.1:8000"


def request(**headers: str) -> HttpRequest:
    return HttpRequest("POST", "/v1/completions", headers, b"secret prompt")


@pytest.fixture
def spans():
    """Finished spans, in order."""
    return InMemorySpanExporter()


@pytest.fixture
def router(spans):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    receipts = Receipts(10)
    receipt = Receipt(decision_id=f"{1:016x}", request_id="id", path="/", model="tiny", prompt_tokens=7)
    receipt.steps_ms["match"] = 0.5
    receipts.add(receipt)
    return TracedRouter(ScriptedRouter((WORKER,)), provider.get_tracer("test"), receipts)


def served(decision_id: str) -> Served:
    return Served(decision_id, 200, WORKER, ttft_ms=12.0, duration_ms=20.0, request_bytes=1, response_bytes=1)


async def test_the_engine_is_a_child_of_the_gateway_and_that_of_the_client(router, spans):
    decision = await router.decide(request(traceparent=SAMPLED, tracestate="vendor=1"))
    version, trace, parent, flags = decision.request_headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert decision.request_headers["tracestate"] == "vendor=1"
    assert "x-request-id" in decision.request_headers
    await router.finish(decision.decision_id, End.COMPLETE)
    router.record(served(decision.decision_id))
    (span,) = spans.get_finished_spans()
    assert f"{span.context.span_id:016x}" == parent != CLIENT
    assert f"{span.parent.span_id:016x}" == CLIENT
    found = dict(span.attributes)
    assert (found["kvlane.decision_id"], found["kvlane.destinations"]) == (decision.decision_id, (WORKER,))
    assert (found["gen_ai.request.model"], found["kvlane.prompt_tokens"]) == ("tiny", 7)
    assert (found["kvlane.match_ms"], found["kvlane.ttft_ms"], found["kvlane.end"]) == (0.5, 12, "complete")
    assert "secret" not in span.to_json()


async def test_an_unsampled_trace_stays_unsampled_and_goes_on(router, spans):
    decision = await router.decide(request(traceparent=UNSAMPLED))
    _, trace, _, flags = decision.request_headers["traceparent"].split("-")
    assert (trace, flags) == (TRACE, "00")
    await router.finish(decision.decision_id, End.COMPLETE)
    router.close()
    assert spans.get_finished_spans() == ()


@pytest.mark.parametrize("traceparent", [None, "", "garbage", f"00-{'0' * 32}-{CLIENT}-01"])
async def test_without_a_trace_one_begins(router, traceparent):
    headers = {} if traceparent is None else {"traceparent": traceparent}
    decision = await router.decide(request(**headers))
    _, trace, _, flags = decision.request_headers["traceparent"].split("-")
    assert int(trace, 16)
    assert trace != TRACE
    assert int(flags, 16) & 1


async def test_refusals_and_defects_end_their_span(router, spans):
    for failure in (RequestError(429, "Later."), KeyError("defect")):

        async def fail(_, failure=failure):
            raise failure

        router._router.script = fail
        with pytest.raises(type(failure)):
            await router.decide(request())
    refused, defect = spans.get_finished_spans()
    assert refused.attributes["http.response.status_code"] == 429
    assert refused.status.is_unset
    assert not defect.status.is_ok
    assert defect.attributes["error.type"] == "KeyError"
    assert not defect.events  # an exception's message may repeat what the client sent


async def test_a_span_that_nobody_measures_ends_all_the_same(router, spans, monkeypatch):
    monkeypatch.setattr(tracing, "MEASURED_WITHIN_S", 0)
    decision = await router.decide(request())
    await router.finish(decision.decision_id, End.ABORTED)
    await eventually(spans.get_finished_spans)
    assert spans.get_finished_spans()[0].attributes["kvlane.end"] == "aborted"
    assert router._open == {}


async def test_spans_are_sent_over_otlp(monkeypatch):
    received = []

    async def collect(http):
        received.append(ExportTraceServiceRequest.FromString(await http.body()))
        return Response(media_type="application/x-protobuf")

    async with serve(collect) as address:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
        async with traced(ScriptedRouter((WORKER,)), Receipts(1)) as router:
            await router.decide(request(traceparent=SAMPLED))
    (resource,) = received[0].resource_spans
    assert {"service.name": "kvlane-gateway"}.items() <= {
        each.key: each.value.string_value for each in resource.resource.attributes
    }.items()
    (span,) = resource.scope_spans[0].spans
    assert span.trace_id.hex() == TRACE


@pytest.mark.envoy
@pytest.mark.parametrize("is_traced", [True, False])
async def test_the_trace_reaches_the_worker_through_envoy(tmp_path, spans, is_traced):
    seen = SimpleNamespace(headers=None)

    async def answer(http):
        seen.headers = dict(http.headers)
        return JSONResponse({})

    async with contextlib.AsyncExitStack() as exits:
        address = await exits.enter_async_context(serve(answer))
        router = ScriptedRouter((address,))
        if is_traced:
            provider = TracerProvider()
            provider.add_span_processor(SimpleSpanProcessor(spans))
            router = TracedRouter(router, provider.get_tracer("test"), Receipts(1))
        stack = await exits.enter_async_context(Stack(tmp_path, router, KnownEndpoints(address)).run())
        client = await exits.enter_async_context(httpx.AsyncClient())
        sent = {"traceparent": SAMPLED, "tracestate": "vendor=1"}
        response = await client.post(f"{stack.url}/v1/completions", json={"stream": True}, headers=sent)
        assert response.status_code == 200
        assert seen.headers["tracestate"] == "vendor=1"
        if not is_traced:
            assert seen.headers["traceparent"] == SAMPLED
            return
        async with asyncio.timeout(10):
            await eventually(spans.get_finished_spans)
        (span,) = spans.get_finished_spans()
        assert seen.headers["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
        assert span.attributes["kvlane.served_by"] == address
