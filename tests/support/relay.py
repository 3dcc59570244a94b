"""A TCP relay to a server on loopback, which may speak TLS and be pointed at another server."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress


class Relay:
    """Where new connections lead to; those that exist stay where they are."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.delay_s = 0.0
        """By which what the server sends comes later."""

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ssl.SSLError):
            to, back = await asyncio.open_connection("127.0.0.1", self.target_port)
            await asyncio.gather(_copy(reader, back), _copy(to, writer, lambda: self.delay_s))


async def _copy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: Callable[[], float] = lambda: 0.0
) -> None:
    with suppress(OSError, ssl.SSLError):
        while data := await reader.read(1 << 16):
            await asyncio.sleep(delay_s())
            writer.write(data)
            await writer.drain()
    writer.close()


@contextmanager
def relay(target_port: int, tls: ssl.SSLContext | None = None) -> Iterator[Relay]:
    """Run a relay to `target_port`; with `tls` its clients must speak TLS."""
    made = Relay(target_port)
    started: Future[asyncio.AbstractEventLoop] = Future()
    stopped = asyncio.Event()

    async def serve() -> None:
        server = await asyncio.start_server(made.pass_on, "127.0.0.1", 0, ssl=tls)
        made.port = server.sockets[0].getsockname()[1]
        started.set_result(asyncio.get_running_loop())
        await stopped.wait()
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    loop = started.result(10)
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(10)
