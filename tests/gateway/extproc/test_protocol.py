"""The endpoint picker protocol case by case, over real gRPC: the table in docs/endpoint-picker.md.

Source: Gateway API Inference Extension, proposal 004.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.config import GatewayConfig
from gateway.decide import KvRouter
from gateway.decision import End
from gateway.envoy_services import serve_envoy
from gateway.errors import RequestError
from gateway.extproc.messages import CHUNK_BYTES, PICK_KEY
from gateway.fleet import Fleet
from gateway.probe import worker_client
from gateway.profile import Profile
from gateway.protos import ext_proc_pb2 as wire
from gateway.rates import Rates
from gateway.readiness import Readiness
from gateway.receipts import Receipts
from gateway.tokens.request import Api, Prompt, ReadRequest
from kvindex.blocks import hash_blocks, root_hash
from kvindex.memory_index import MemoryIndex, MemoryIndexReader, MemoryIndexWriter
from kvindex.worker import Batch
from tests.support import extproc
from tests.support.waiting import eventually
from tests.support.workers import make_worker

DOCUMENT = Path(__file__).parents[3] / "docs" / "endpoint-picker.md"

WORKERS = ("10.0.0.1:8000", "10.0.0.2:8000", "[fd00::3]:8000")
HOLDER = WORKERS[1]
PROMPT = tuple(range(100))
BODY = json.dumps({"model": "tiny"}).encode()
EXT_PROC = "envoy.service.ext_proc.v3.ExternalProcessor"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class SameReader:
    """Understands every body as `PROMPT`."""

    async def read(self, path, body):
        json.loads(body)
        return ReadRequest(Api.COMPLETION, "tiny", (Prompt(PROMPT, len(PROMPT)),))


@dataclass
class Reply:
    """What a proxy makes of the answers to one request."""

    headers: dict[str, str]
    metadata: dict[str, object]
    refusal: wire.ImmediateResponse | None
    body: bytes
    chunks: list[wire.StreamedBodyResponse]
    kinds: list[str]

    @property
    def pick(self) -> list[str]:
        """The endpoints in order, which header and metadata must agree on."""
        assert self.headers[PICK_KEY] == self.metadata["envoy.lb"][PICK_KEY]
        return self.headers[PICK_KEY].split(",")

    @property
    def error(self) -> tuple[int, str]:
        """Status and OpenAI error type."""
        error = json.loads(self.refusal.body)["error"]
        assert error["code"] == self.refusal.status.code
        return error["code"], error["type"]


def understand(answers: Iterable[wire.ProcessingResponse]) -> Reply:
    reply = Reply({}, {}, None, b"", [], [])
    for answer in answers:
        kind = answer.WhichOneof("response")
        reply.kinds.append(kind)
        if answer.HasField("dynamic_metadata"):
            reply.metadata |= {key: dict(value) for key, value in answer.dynamic_metadata.items()}
        if kind == "immediate_response":
            reply.refusal = answer.immediate_response
        elif kind in {"request_headers", "request_body"}:
            change = getattr(answer, kind).response
            reply.headers |= extproc.headers_set(change.header_mutation)
            if change.body_mutation.HasField("streamed_response"):
                reply.chunks.append(change.body_mutation.streamed_response)
                reply.body += reply.chunks[-1].body
    return reply


class Picker:
    """A gateway whose workers a test knows, and a proxy that speaks to it in one body mode."""

    def __init__(self, mode: wire.BodySendMode, client) -> None:
        self.mode = mode
        memory = MemoryIndex()
        self.writer = MemoryIndexWriter(memory)
        index = MemoryIndexReader(memory)
        self.config = GatewayConfig(
            listen="127.0.0.1:0", stop_grace_s=0, index_deadline_ms=5_000, fallbacks=2
        )
        self.fleet = Fleet(self.config, index, client)
        self.receipts = Receipts(10)
        self.router = KvRouter(
            self.config,
            index,
            self.fleet,
            SameReader(),
            rates=Rates(Profile(prefill_tokens_per_s=1000)),
            receipts=self.receipts,
            client=client,
        )
        self.readiness = Readiness()

    async def join(self, *names: str) -> None:
        for name in names:
            worker = make_worker(name)
            slot = self.writer.open_slot(worker, lease_ms=60_000)
            if name == HOLDER:
                blocks = tuple(hash_blocks(root_hash("tiny"), PROMPT, worker.block_size))
                self.writer.apply(worker.pool, slot, worker.incarnation, Batch(sequence=1, stored=blocks))
            self.fleet._replace(cards={**self.fleet.snapshot.cards, name: ()})
        await self.fleet.poll()

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[Picker]:
        async with (
            serve_envoy(self.config, self.router, self.fleet, self.readiness) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as self.channel,
        ):
            yield self

    @property
    def is_duplex(self) -> bool:
        return self.mode == wire.FULL_DUPLEX_STREAMED

    def head(self, *, subset: object = None, end_of_stream: bool = False, **headers: str):
        message = extproc.request_headers(
            "GET" if end_of_stream else "POST",
            mode=self.mode,
            response_mode=self.mode if self.is_duplex else wire.NONE,
            end_of_stream=end_of_stream,
            **headers,
        )
        if subset is not None:
            namespace = message.metadata_context.filter_metadata["envoy.lb.subset_hint"]
            namespace.update({"x-gateway-destination-endpoint-subset": subset})
        return message

    async def ask(self, *messages: wire.ProcessingRequest, **head: object) -> Reply:
        """Send a whole request (none given: a small one) and half-close as proxies do; read every answer."""
        sent = messages or (self.head(**head), extproc.request_body(BODY))
        call = extproc.process(self.channel)
        # A refusal may end the stream before the whole request is told.
        with contextlib.suppress(asyncio.InvalidStateError):
            for message in sent:
                await call.write(message)
            await call.done_writing()
        return understand([answer async for answer in call])

    async def health(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        stub = health_pb2_grpc.HealthStub(self.channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


CASES: dict[str, Callable[[Picker], Awaitable[None]]] = {}


def case(name: str):
    """Add a function to the table under the name that the document uses."""

    def add(check: Callable[[Picker], Awaitable[None]]) -> Callable[[Picker], Awaitable[None]]:
        CASES[name] = check
        return check

    return add


@case("pick in header and metadata")
async def _(picker):
    await picker.join(*WORKERS)
    assert (await picker.ask()).pick[0] == HOLDER


@case("ordered fallback list")
async def _(picker):
    await picker.join(*WORKERS)
    pick = (await picker.ask()).pick
    assert pick[0] == HOLDER
    assert sorted(pick) == sorted(WORKERS)


@case("pick of a client's own")
async def _(picker):
    await picker.join(*WORKERS)
    head = picker.head(**{PICK_KEY: "6.6.6.6:80"})
    assert (await picker.ask(head, extproc.request_body(BODY))).pick[0] == HOLDER


@case("subset as a list")
async def _(picker):
    await picker.join(*WORKERS)
    assert (await picker.ask(subset=[WORKERS[2]])).pick == [WORKERS[2]]


@case("subset as a string")
async def _(picker):
    await picker.join(*WORKERS)
    assert sorted((await picker.ask(subset=f"{WORKERS[2]}, {WORKERS[0]}")).pick) == sorted(WORKERS[::2])


@case("subset without a live endpoint")
async def _(picker):
    await picker.join(*WORKERS)
    assert (await picker.ask(subset=["10.0.0.9:8000"])).error == (503, "ServiceUnavailableError")


@case("empty subset")
async def _(picker):
    await picker.join(*WORKERS)
    assert (await picker.ask(subset=[])).error == (503, "ServiceUnavailableError")


@case("subset of a request without a body")
async def _(picker):
    await picker.join(*WORKERS)
    head = picker.head(subset=[WORKERS[2]], end_of_stream=True)
    assert (await picker.ask(head)).pick == [WORKERS[2]]


@case("no ready endpoint")
async def _(picker):
    await picker.fleet.poll()
    reply = await picker.ask()
    assert reply.error == (503, "ServiceUnavailableError")
    assert int(extproc.headers_set(reply.refusal.headers)["retry-after"]) >= 1


@case("request that is shed")
async def _(picker):
    await picker.join(*WORKERS)

    async def shed(_):
        raise RequestError(429, "Too much.", kind="TooManyRequestsError", retry_after_s=7)

    picker.router.decide = shed
    reply = await picker.ask()
    assert reply.error == (429, "TooManyRequestsError")
    assert extproc.headers_set(reply.refusal.headers)["retry-after"] == "7"


@case("request without a body")
async def _(picker):
    await picker.join(*WORKERS)
    reply = await picker.ask(picker.head(end_of_stream=True))
    assert set(reply.pick) == set(WORKERS)
    assert reply.kinds == ["request_headers"]


@case("body in pieces")
async def _(picker):
    await picker.join(*WORKERS)
    parts = [BODY[:3], BODY[3:9], BODY[9:]]
    sent = [extproc.request_body(part, end_of_stream=part is parts[-1]) for part in parts]
    if not picker.is_duplex:
        sent = [extproc.request_body(BODY)]
    reply = await picker.ask(picker.head(), *sent)
    assert reply.pick[0] == HOLDER
    if picker.is_duplex:
        assert reply.body == BODY


@case("body whose end is a message of its own")
async def _(picker):
    await picker.join(*WORKERS)
    if picker.is_duplex:
        sent = [extproc.request_body(BODY, end_of_stream=False), extproc.request_body(b"")]
        reply = await picker.ask(picker.head(), *sent)
        assert (reply.pick[0], reply.body, reply.chunks[-1].end_of_stream) == (HOLDER, BODY, True)
    else:
        reply = await picker.ask(picker.head(), extproc.request_body(BODY, end_of_stream=False))
        assert reply.pick[0] == HOLDER


@case("body beyond 64 KB")
async def _(picker):
    await picker.join(*WORKERS)
    body = json.dumps({"model": "tiny", "user": "u" * (5 * CHUNK_BYTES)}).encode()
    reply = await picker.ask(picker.head(), extproc.request_body(body))
    assert reply.pick[0] == HOLDER
    if picker.is_duplex:
        assert reply.body == body
        assert max(len(chunk.body) for chunk in reply.chunks) == CHUNK_BYTES
        assert [chunk.end_of_stream for chunk in reply.chunks] == [False] * 5 + [True]


@case("trailers behind a body")
async def _(picker):
    await picker.join(*WORKERS)
    body = extproc.request_body(BODY, end_of_stream=False)
    reply = await picker.ask(picker.head(), body, extproc.request_trailers())
    assert reply.pick[0] == HOLDER
    assert reply.kinds[-1] == "request_trailers"
    assert not any(chunk.end_of_stream for chunk in reply.chunks)


@case("trailers without a body")
async def _(picker):
    await picker.join(*WORKERS)
    head = extproc.request_headers("GET", "/v1/models", mode=picker.mode)
    reply = await picker.ask(head, extproc.request_trailers())
    assert reply.kinds == ["request_headers", "request_trailers"]
    if picker.is_duplex:
        assert set(reply.pick) == set(WORKERS)


def response(picker: Picker, served: str | None) -> list[wire.ProcessingRequest]:
    head = extproc.response_headers()
    head.response_headers.headers.headers.add(key=":status", raw_value=b"200")
    if served:
        head.metadata_context.filter_metadata["envoy.lb"].update(
            {"x-gateway-destination-endpoint-served": served}
        )
    ended = extproc.response_body(b"y" * 10, end_of_stream=True)
    return [head, extproc.response_body(b"x", end_of_stream=False), ended] if picker.is_duplex else [head]


@case("served endpoint")
async def _(picker):
    await picker.join(*WORKERS)
    await picker.ask(picker.head(), extproc.request_body(BODY), *response(picker, WORKERS[0]))
    (receipt,) = picker.receipts.latest()
    if picker.is_duplex:
        await eventually(lambda: receipt.served)
        assert (receipt.served.worker, receipt.served.status) == (WORKERS[0], 200)
        assert (receipt.served.response_bytes, receipt.served.end) == (11, End.COMPLETE)
        assert 0 < receipt.served.ttft_ms <= receipt.served.duration_ms
        # Somebody else served than was picked.
        assert picker.fleet._probe_now.is_set()
    else:
        await eventually(lambda: receipt.end is End.COMPLETE)


@case("served endpoint that is not told")
async def _(picker):
    await picker.join(*WORKERS)
    await picker.ask(picker.head(), extproc.request_body(BODY), *response(picker, None))
    (receipt,) = picker.receipts.latest()
    await eventually(lambda: receipt.end is End.COMPLETE)
    assert not picker.fleet._probe_now.is_set()


@case("response")
async def _(picker):
    await picker.join(*WORKERS)
    call = extproc.process(picker.channel)
    for message in (picker.head(), extproc.request_body(BODY), *response(picker, None)):
        await call.write(message)
    await call.done_writing()
    answers = [each async for each in call]
    head = next(each for each in answers if each.WhichOneof("response") == "response_headers")
    headers = extproc.headers_set(head.response_headers.response.header_mutation)
    assert headers["x-kvlane-worker"] == HOLDER
    if picker.is_duplex:
        bodies = [each.response_body for each in answers if each.WhichOneof("response") == "response_body"]
        sent = [each.response.body_mutation.streamed_response for each in bodies]
        assert (b"".join(each.body for each in sent), sent[-1].end_of_stream) == (b"x" + b"y" * 10, True)


@case("health before the index was read")
async def _(picker):
    picker.readiness = Readiness()
    async with picker.run():
        assert await picker.health("liveness") == SERVING
        for service in ("", "readiness", EXT_PROC):
            assert await picker.health(service) == NOT_SERVING
        # Nothing is written: a write that meets the refusal hides it.
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await extproc.process(picker.channel).read()
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


@case("health once it was read")
async def _(picker):
    await picker.join(*WORKERS)
    for service in ("liveness", "", "readiness", EXT_PROC):
        assert await picker.health(service) == SERVING


@case("health of a gateway that stops")
async def _(picker):
    await picker.join(*WORKERS)
    under_way = extproc.process(picker.channel)
    await under_way.write(picker.head())
    await eventually(lambda: picker.readiness.is_ready)
    if not picker.is_duplex:
        await under_way.read()
    await picker.readiness.close()
    assert await picker.health("liveness") == SERVING
    assert await picker.health("readiness") == NOT_SERVING
    if not picker.is_duplex:
        await under_way.write(extproc.request_body(BODY))
        assert understand([await under_way.read()]).pick[0] == HOLDER
    under_way.cancel()


@case("message out of place")
async def _(picker):
    await picker.join(*WORKERS)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await picker.ask(extproc.request_body(BODY))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("mode", [wire.BUFFERED, wire.FULL_DUPLEX_STREAMED], ids=["buffered", "full_duplex"])
@pytest.mark.parametrize("name", CASES)
async def test_case(name, mode):
    async with worker_client(GatewayConfig()) as client, Picker(mode, client).run() as picker:
        await picker.readiness.open()
        await CASES[name](picker)


def test_the_document_has_the_same_table():
    rows = re.findall(r"^\| (.+?) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert [row for row in rows if row in CASES] == list(CASES)
    assert set(rows) - set(CASES) == {"case"}
