"""A TCP relay to a server on loopback, which may speak TLS and be pointed at another server."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Relay:
    """Where new connections lead to; those that exist stay where they are."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ssl.SSLError):
            to, back = await asyncio.open_connection("127.0.0.1", self.target_port)
            await asyncio.gather(_copy(reader, back), _copy(to, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, ssl.SSLError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextmanager
def relay(target_port: int, tls: ssl.SSLContext | None = None) -> Iterator[Relay]:
    """Run a relay to `target_port`; with `tls` its clients must speak TLS."""
    made = Relay(target_port)
    loop = asyncio.new_event_loop()
    listening = threading.Event()

    async def serve() -> None:
        server = await asyncio.start_server(made.pass_on, "127.0.0.1", 0, ssl=tls)
        made.port = server.sockets[0].getsockname()[1]
        listening.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        server.close()

    def run() -> None:
        asyncio.set_event_loop(loop)
        with asyncio.Runner(loop_factory=lambda: loop) as runner, suppress(asyncio.CancelledError):
            tasks.append(loop.create_task(serve()))
            runner.get_loop().run_until_complete(tasks[0])

    tasks: list[asyncio.Task[None]] = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert listening.wait(10)
        yield made
    finally:
        loop.call_soon_threadsafe(tasks[0].cancel)
        thread.join(10)
