"""A side channel: messages to and from one peer, and whether it is alive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import msgspec

from connectors.errors import PeerLost, PeerRefused, ProtocolError, TransferError
from connectors.messages import MAX_FRAME_BYTES, AnyMessage, Message, Ping, Pong, Refused, decode, encode

PINGS_PER_TIMEOUT = 4
MAX_BACKLOG_BYTES = 16 << 20
"""A peer that does not read so much is not read to either."""

Expected = TypeVar("Expected", bound=Message)


class Channel:
    """A connection to another rank. On one event loop.

    Args:
        reader: from it.
        writer: to it.
        timeout_s: how long it may be silent while a transfer is under way.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout_s: float) -> None:
        self._reader = reader
        self._writer = writer
        self._timeout_s = timeout_s
        host, port = (writer.get_extra_info("peername") or ("unknown", 0))[:2]
        self.name = f"{host}:{port}"
        self._heard_at = 0.0
        self.lost: asyncio.Future[TransferError] = asyncio.get_running_loop().create_future()

    def send(self, message: Message) -> None:
        """Send a message; to a lost peer it is dropped."""
        if self.lost.done():
            return
        if self._writer.transport.get_write_buffer_size() > MAX_BACKLOG_BYTES:
            self.lose(PeerLost(f"{self.name}: it does not read what we say"))
            return
        self._writer.write(encode(message))

    async def receive(self) -> AnyMessage:
        """Return the next message.

        Raises:
            PeerLost: the connection ended.
            ProtocolError: what came is no message.
        """
        try:
            num_bytes = int.from_bytes(await self._reader.readexactly(4), "big")
            if num_bytes > MAX_FRAME_BYTES:
                raise ProtocolError(f"{self.name}: a frame of {num_bytes} bytes; no kvlane speaks there")
            message = decode(await self._reader.readexactly(num_bytes))
        except asyncio.IncompleteReadError as error:
            cut = " in the middle of a frame" if error.partial or error.expected != 4 else ""
            raise PeerLost(f"{self.name}: it closed the connection{cut}") from error
        except OSError as error:
            raise PeerLost(f"{self.name}: {error}") from error
        except msgspec.DecodeError as error:
            raise ProtocolError(f"{self.name}: not a message of this protocol: {error}") from error
        self._heard_at = asyncio.get_running_loop().time()
        return message

    async def expect(self, kind: type[Expected], timeout_s: float) -> Expected:
        """Return the next message, which must be of one kind.

        Raises:
            PeerLost: the connection ended, or nothing came in time.
            PeerRefused: the peer refuses.
            ProtocolError: something else came.
        """
        try:
            message = await asyncio.wait_for(self.receive(), timeout_s)
        except TimeoutError as error:
            raise PeerLost(f"{self.name}: it said nothing for {timeout_s:g} s") from error
        if isinstance(message, Refused):
            raise PeerRefused(f"{self.name} refuses: {message.reason}")
        if not isinstance(message, kind):
            raise ProtocolError(f"{self.name}: it sent {type(message).__name__} instead of {kind.__name__}")
        return message

    async def listen(self, handle: Callable[[AnyMessage], None], is_busy: Callable[[], bool]) -> None:
        """Hand over every message until the peer is lost; then return.

        While `is_busy`, the peer must not be silent: it is pinged, and given up when it does not answer.
        While it is not, nothing happens.
        """
        heart = asyncio.create_task(self._watch(is_busy))
        receiving = asyncio.create_task(self._receive_all(handle))
        try:
            await asyncio.wait((receiving, self.lost), return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                receiving.result()
        except TransferError as error:
            self.lose(error)
        finally:
            heart.cancel()
            receiving.cancel()
            self.lose(PeerLost(f"{self.name}: this side has closed the connection"))

    def lose(self, error: TransferError) -> None:
        """Close the connection, for this reason. Idempotent."""
        if not self.lost.done():
            self.lost.set_result(error)
            with suppress(OSError):
                self._writer.close()

    async def _receive_all(self, handle: Callable[[AnyMessage], None]) -> None:
        """Hand over every message. One task for all of them: what has come in one piece costs one turn of the
        event loop.
        """
        while not self.lost.done():
            message = await self.receive()
            if isinstance(message, Ping):
                self.send(Pong())
            elif not isinstance(message, Pong):
                handle(message)

    async def _watch(self, is_busy: Callable[[], bool]) -> None:
        interval_s = self._timeout_s / PINGS_PER_TIMEOUT
        busy_since: float | None = None
        while not self.lost.done():
            await asyncio.sleep(interval_s)
            now = asyncio.get_running_loop().time()
            if not is_busy():
                busy_since = None
                continue
            busy_since = busy_since or now
            if now - max(self._heard_at, busy_since) > self._timeout_s:
                self.lose(PeerLost(f"{self.name}: it has been silent for {self._timeout_s:g} s"))
                return
            self.send(Ping())
