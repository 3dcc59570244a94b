"""A wire within one process: fetching copies. For tests, and for two engines in one process."""

from __future__ import annotations

import asyncio
import secrets

import torch

from connectors.errors import PeerLost
from connectors.transport import Peer, Request

_open: dict[bytes, MemoryTransport] = {}


class MemoryTransport:
    """Reaches the other memory transports of its event loop."""

    name = "memory"

    def __init__(self) -> None:
        self._address = secrets.token_bytes(8)
        self._peers: dict[Peer, bytes] = {}
        self._offers: dict[bytes, tuple[torch.Tensor, Request]] = {}
        _open[self._address] = self

    @property
    def address(self) -> bytes:
        """See `Transport`."""
        return self._address

    def register(self, memory: torch.Tensor) -> None:
        """Do nothing: any memory will do."""

    def connect(self, name: str, address: bytes) -> Peer:
        """See `Transport`."""
        if address not in _open:
            raise PeerLost(f"{name}: no memory transport of this process has its address")
        peer = Peer(name)
        self._peers[peer] = address
        return peer

    def disconnect(self, peer: Peer) -> None:
        """See `Transport`."""
        self._peers.pop(peer, None)
        peer.mark_lost("disconnected")
        for ticket, (_, request) in list(self._offers.items()):
            if request.peer is peer:
                del self._offers[ticket]
                request.finish(peer.lost.result())

    def offer(self, peer: Peer, buffer: torch.Tensor) -> tuple[bytes, Request]:
        """See `Transport`."""
        peer.check()
        ticket, request = secrets.token_bytes(8), Request(peer)
        self._offers[ticket] = buffer, request
        return ticket, request

    def fetch(self, peer: Peer, ticket: bytes, buffer: torch.Tensor) -> Request:
        """See `Transport`."""
        peer.check()
        request = Request(peer)
        asyncio.get_running_loop().call_soon(self._copy, request, ticket, buffer)
        return request

    def close(self) -> None:
        """See `Transport`."""
        _open.pop(self._address, None)
        for other in _open.values():
            for peer, address in list(other._peers.items()):
                if address == self._address:
                    other.disconnect(peer)
        for peer in list(self._peers):
            self.disconnect(peer)

    def _copy(self, request: Request, ticket: bytes, buffer: torch.Tensor) -> None:
        peer = request.peer
        if peer.is_lost:
            return request.finish(peer.lost.result())
        offer = _open[self._peers[peer]]._offers.pop(ticket, None)
        # A ticket that nobody offers is waited for, as on a real wire.
        if offer is not None:
            source, offered = offer
            buffer.copy_(source)
            offered.finish()
            request.finish()
        return None
