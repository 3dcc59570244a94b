"""What stands around kvlane in a bench: an engine that answers at once, an ext_proc server that does nothing.

Each runs in a process of its own, so that its work is not in the figures of another.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import grpc
import msgspec
import uvloop

from gateway.protos import ext_proc_pb2 as wire
from gateway.readiness import Readiness

MAX_MESSAGE_BYTES = 32 << 20
RELEASE_PATH = "/bench/release"

_FIRST_EVENT = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b"a\r\ndata: {}\n\n\r\n"
)
_LAST_EVENT = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

_CONTENT_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


@contextmanager
def peer(serve: Callable[..., None], *arguments: object) -> Iterator[int]:
    """Run `serve(*arguments)` in a fresh process; yields its pid, and kills it afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
    process.start()
    try:
        yield process.pid or 0
    finally:
        process.kill()
        process.join()


def serve_engines(ports: Sequence[int], model: str, root: str, max_model_len: int) -> None:
    """Answer every request on every port at once: the list of models, or a short chat answer.

    A chat that streams gets its first event, and its last when somebody asks for `RELEASE_PATH`.
    """
    card = {"id": model, "object": "model", "root": root, "parent": None, "max_model_len": max_model_len}
    models = _http_answer({"object": "list", "data": [card]})
    message = {"role": "assistant", "content": "Yes."}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    chat = _http_answer({"id": "bench", "object": "chat.completion", "model": model, "choices": choices})

    async def run() -> None:
        loop = asyncio.get_running_loop()
        held: list[asyncio.Transport] = []
        for port in ports:
            await loop.create_server(lambda: _Engine(models, chat, held), "127.0.0.1", port)
        await asyncio.Event().wait()

    uvloop.run(run())


def _http_answer(content: object) -> bytes:
    body = msgspec.json.encode(content)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class _Engine(asyncio.Protocol):
    """HTTP/1.1 with Content-Length, as Envoy sends what it has buffered."""

    def __init__(self, models: bytes, chat: bytes, held: list[asyncio.Transport]) -> None:
        self._models = models
        self._chat = chat
        self._held = held
        self._received = bytearray()
        self._end: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while True:
            if self._end is None:
                head_end = self._received.find(b"\r\n\r\n")
                if head_end < 0:
                    return
                length = _CONTENT_LENGTH.search(self._received, 0, head_end)
                self._end = head_end + 4 + (int(length[1]) if length else 0)
            if len(self._received) < self._end:
                return
            self._answer(bytes(self._received[: self._end]))
            del self._received[: self._end]
            self._end = None

    def _answer(self, request: bytes) -> None:
        if request.startswith(f"GET {RELEASE_PATH}".encode()):
            for transport in self._held:
                transport.write(_LAST_EVENT)
            self._held.clear()
            self._transport.write(self._models)
        elif request.startswith(b"GET"):
            self._transport.write(self._models)
        elif b'"stream":true' in request:
            self._transport.write(_FIRST_EVENT)
            self._held.append(self._transport)
        else:
            self._transport.write(self._chat)


def serve_trivial_ext_proc(address: str) -> None:
    """Let every request pass, unread: what any ext_proc server in Python costs at least."""
    replies = {
        "request_headers": wire.ProcessingResponse(request_headers=wire.HeadersResponse()),
        "request_body": wire.ProcessingResponse(request_body=wire.BodyResponse()),
        "response_headers": wire.ProcessingResponse(response_headers=wire.HeadersResponse()),
    }

    async def process(
        _: object, context: grpc.aio.ServicerContext[wire.ProcessingRequest, wire.ProcessingResponse]
    ) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(replies[message.WhichOneof("request")])

    handler = grpc.stream_stream_rpc_method_handler(
        process,
        request_deserializer=wire.ProcessingRequest.FromString,
        response_serializer=wire.ProcessingResponse.SerializeToString,
    )

    async def run() -> None:
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
        service = "envoy.service.ext_proc.v3.ExternalProcessor"
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {"Process": handler}),)
        )
        readiness = Readiness()
        await readiness.serve(server)
        server.add_insecure_port(address)
        await server.start()
        await readiness.open()
        await server.wait_for_termination()

    uvloop.run(run())
