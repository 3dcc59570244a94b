"""A real S3 server whose answers can be made to fail, as networks, permissions and other people's load do."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus

import httpx

from tests.support.tiers import S3Server, s3_server

_NO_LINGER = struct.pack("ii", 1, 0)
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "server", "date"}


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of a request's answer."""

    spoil: Callable[[Exchange], object]
    methods: frozenset[str] = frozenset({"GET", "PUT", "HEAD"})

    def of(self, *methods: str) -> Fault:
        """Return the fault for these methods only."""
        return Fault(self.spoil, frozenset(methods))


def error(status: int, code: str) -> Fault:
    """S3 answers that it will not, or cannot.

    Source: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
    """
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    return Fault(lambda exchange: exchange.answer(status, body))


FORBIDDEN = error(403, "AccessDenied")
EXPIRED = error(400, "ExpiredToken")
GONE = error(404, "NoSuchKey")
FAILING = error(500, "InternalError")
SLOW_DOWN = error(503, "SlowDown")
HUNG_UP = Fault(lambda exchange: exchange.reset())
RESET = Fault(lambda exchange: exchange.answer_half(then=exchange.reset))
CUT = Fault(lambda exchange: exchange.answer_half(then=exchange.close))
STALLED = Fault(lambda exchange: exchange.answer_half(then=exchange.wait))
SILENT = Fault(lambda exchange: exchange.wait())
TRUNCATED = Fault(lambda exchange: exchange.answer(exchange.status, exchange.body[: len(exchange.body) // 2]))


@dataclass(slots=True)
class Exchange:
    """A request for an object, with the server's true answer, before any of it is sent."""

    method: str
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    writer: asyncio.StreamWriter
    size: int
    """That is said to follow."""

    def answer(self, status: int, body: bytes) -> None:
        self.status, self.body, self.size = status, body, len(body)
        self.send(body)

    def send(self, body: bytes) -> None:
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}", f"content-length: {self.size}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if self.method == "HEAD" else body))

    async def answer_half(self, then: Callable[[], object]) -> None:
        self.send(self.body[: len(self.body) // 2])
        await self.writer.drain()
        await asyncio.sleep(0.05)  # so that it arrives before what comes then
        outcome = then()
        if asyncio.iscoroutine(outcome):
            await outcome

    def reset(self) -> None:
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.writer.close()

    def close(self) -> None:
        self.writer.close()

    async def wait(self) -> None:
        """Say nothing more, as long as the client can bear it."""
        await asyncio.sleep(3600)


@dataclass(slots=True)
class FaultyS3(S3Server):
    """moto's server behind one that passes requests on; `url` is the latter's.

    `fault` is what becomes of requests for objects from now on; listings pass.
    """

    fault: Fault | None = None
    num_spoiled: int = 0
    behind: S3Server = field(kw_only=True)

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """Have requests fail until the block ends."""
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer what comes on one connection."""
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            async with httpx.AsyncClient(base_url=self.behind.url, timeout=60) as client:
                while await self._answer(reader, writer, client):
                    await writer.drain()
        writer.close()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: httpx.AsyncClient
    ) -> bool:
        """Answer one request; return whether the connection goes on."""
        request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = request.split(" ")
        headers = dict(line.split(": ", 1) for line in lines if line)
        lower = {name.lower(): value for name, value in headers.items()}
        if "expect" in lower:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        content = await reader.readexactly(int(lower.get("content-length", 0)))
        passed = {
            name: value for name, value in headers.items() if name.lower() not in {"expect", "connection"}
        }
        passed["accept-encoding"] = "identity"
        fault = self.fault
        is_spoiled = fault is not None and method in fault.methods and "?" not in target
        if is_spoiled and method == "PUT":
            true = httpx.Response(200)  # what is spoiled is not stored
        else:
            true = await client.request(method, target, headers=passed, content=content)
        size = int(true.headers.get("content-length", len(true.content)))
        kept = [(name, value) for name, value in true.headers.items() if name not in _HOP_BY_HOP]
        exchange = Exchange(method, true.status_code, kept, true.content, writer, size)
        if fault is not None and is_spoiled:
            self.num_spoiled += 1
            outcome = fault.spoil(exchange)
            if asyncio.iscoroutine(outcome):
                await outcome
        else:
            exchange.send(exchange.body)
        return not writer.is_closing()


@contextmanager
def faulty_s3_server() -> Iterator[FaultyS3]:
    """Run an S3 server with an empty bucket, as `s3_server`, which can be made to fail."""
    started: Future[asyncio.AbstractEventLoop] = Future()
    stopped = asyncio.Event()
    with s3_server() as behind:
        faulty = FaultyS3(0, behind.process, behind=behind)

        async def serve() -> None:
            server = await asyncio.start_server(faulty.serve, "127.0.0.1", 0)
            faulty.port = server.sockets[0].getsockname()[1]
            started.set_result(asyncio.get_running_loop())
            await stopped.wait()

        thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
        thread.start()
        loop = started.result(60)
        try:
            yield faulty
        finally:
            loop.call_soon_threadsafe(stopped.set)
            thread.join(10)
