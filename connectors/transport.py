"""The small interface to a wire: offer a buffer to a peer, fetch a buffer that a peer offers.

The sender *offers* a buffer and gets a ticket, which it hands to the peer by other means (the side channel);
the peer *fetches* the ticket into a buffer of its own. That fits two-sided wires (tag send and receive) and
one-sided ones (remote read) alike, and the receiver sets the pace: what it does not fetch does not move.

A `Request` is finished when the wire touches its memory no more, and not before: a peer that dies or falls
silent may leave requests open for a long time. Giving up on one is the caller's own affair (`Request.wait`
does, for a lost peer or a passed deadline); the memory stays in use until `Request.finished`. There is no
cancellation of one request, as no wire can promise it: `Transport.disconnect` cancels all requests of a peer
at once.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import torch

from connectors.errors import PeerLost, TransferTimeout


class Peer:
    """Another process as this one's transport reaches it.

    Args:
        name: what it is called in messages: its address.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost: asyncio.Future[PeerLost] = asyncio.get_running_loop().create_future()

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be exchanged with it any more."""
        return self.lost.done()

    def mark_lost(self, reason: str) -> None:
        """Let every wait for this peer end. Idempotent."""
        if not self.lost.done():
            self.lost.set_result(PeerLost(f"{self.name}: {reason}"))

    def check(self) -> None:
        """Raise if it is lost.

        Raises:
            PeerLost: it is.
        """
        if self.lost.done():
            raise PeerLost(str(self.lost.result()))


class Request:
    """A buffer on its way. `finished` has a result or an error once the wire is done with the memory."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # An error that nobody waits for any more is no news.
        self.finished.add_done_callback(lambda done: done.cancelled() or done.exception())

    def finish(self, error: BaseException | None = None) -> None:
        """Say that the wire is done with the memory. Idempotent."""
        if self.finished.done():
            return
        if error is None:
            self.finished.set_result(None)
        else:
            self.finished.set_exception(error)

    async def wait(self, timeout_s: float) -> None:
        """Return when the buffer has arrived.

        Raises:
            PeerLost: the peer is lost; the request may be unfinished still.
            TransferTimeout: the time is over; the request is unfinished still.
        """
        await asyncio.wait(
            (self.finished, self.peer.lost), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if self.finished.done():
            return self.finished.result()
        self.peer.check()
        raise TransferTimeout(f"{self.peer.name}: a chunk was not moved within {timeout_s:g} s")


class Transport(Protocol):
    """A wire. Everything runs on the event loop that `open_transport` was called in.

    An idle transport uses no CPU.
    """

    name: str

    @property
    def address(self) -> bytes:
        """What a peer's `connect` needs; to be read after all memory was registered."""

    def register(self, memory: torch.Tensor) -> None:
        """Make memory known from which buffers are offered, and into which they are fetched, until `close`.

        Args:
            memory: contiguous uint8, on any device that the transport reaches.
        """

    def connect(self, name: str, address: bytes) -> Peer:
        """Return the peer with this address; both sides must connect before buffers move.

        Raises:
            PeerLost: the address is not one of this transport, or cannot be reached.
        """

    def disconnect(self, peer: Peer) -> None:
        """Give a peer up: it is lost, and its requests finish as soon as the wire lets go of them.
        Idempotent.
        """

    def offer(self, peer: Peer, buffer: torch.Tensor) -> tuple[bytes, Request]:
        """Let the peer fetch `buffer`: contiguous, within registered memory, not to be changed until
        finished.

        Returns:
            The ticket, of use once and to this peer alone, and the request.

        Raises:
            PeerLost: the peer is lost.
        """

    def fetch(self, peer: Peer, ticket: bytes, buffer: torch.Tensor) -> Request:
        """Get what the peer offered with `ticket`; `buffer` has the size of what was offered.

        Raises:
            PeerLost: the peer is lost, or the ticket is none of this transport's.
        """

    def close(self) -> None:
        """Give up every peer and the wire. Idempotent."""
