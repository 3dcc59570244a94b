"""NIXL, over its UCX or its LIBFABRIC backend: the road to EFA.

Fetching is a one-sided read of the peer's registered memory that leaves a notification there; a ticket names
the memory and the notification. NIXL wakes nobody, so both sides poll, but only while they have open
requests: an idle one does nothing. (NIXL's own progress thread would spin on a core for ever.)

Source: NIXL 1.5 `nixl/_api.py`.
"""

from __future__ import annotations

import asyncio
import secrets
import time

import msgspec
import torch

from connectors.errors import PeerLost
from connectors.transport import Peer, Request
from connectors.ucx_environment import tune
from kvindex.errors import ConfigError

try:
    tune()
    from nixl._api import nixl_agent, nixl_agent_config, nixl_xfer_handle
except ImportError as error:
    raise ConfigError(f"the transport nixl needs NIXL: pip install 'kvlane[nixl]' ({error})") from error

EAGER_POLLING_S = 0.02
"""How long every round of the event loop polls after the last sign of life; then it is once in a while."""
LAZY_POLLING_S = 0.002


class _Ticket(msgspec.Struct, frozen=True, array_like=True):
    address: int
    num_bytes: int
    device: int
    memory: str
    notification: bytes


class NixlTransport:
    """One NIXL agent.

    Args:
        backend: `UCX` or `LIBFABRIC`.

    Raises:
        ConfigError: this NIXL cannot use the backend here.
    """

    def __init__(self, backend: str) -> None:
        self.name = f"nixl-{backend.lower()}"
        self._agent = nixl_agent(
            secrets.token_hex(8), nixl_agent_config(enable_prog_thread=False, backends=[])
        )
        try:
            self._agent.create_backend(backend)
        except Exception as error:  # its errors share no base, and no module name that stays
            raise ConfigError(
                f"NIXL cannot use its backend {backend} here ({error}); choose another kvlane.transport"
            ) from error
        self._registered: list[object] = []
        self._agents: dict[Peer, str] = {}
        self._offers: dict[bytes, Request] = {}
        self._reads: dict[Request, nixl_xfer_handle] = {}
        self._polling: asyncio.Task[None] | None = None

    @property
    def address(self) -> bytes:
        """See `Transport`."""
        return bytes(self._agent.get_agent_metadata())

    def register(self, memory: torch.Tensor) -> None:
        """See `Transport`."""
        self._registered.append(self._agent.register_memory(memory))

    def connect(self, name: str, address: bytes) -> Peer:
        """See `Transport`."""
        peer = Peer(name)
        try:
            agent = self._agent.add_remote_agent(address)
        except Exception as error:
            raise PeerLost(f"{name}: NIXL cannot reach it: {error}") from error
        self._agents[peer] = agent.decode() if isinstance(agent, bytes) else agent
        return peer

    def disconnect(self, peer: Peer) -> None:
        """See `Transport`."""
        peer.mark_lost("disconnected")
        agent = self._agents.pop(peer, None)
        for notification, request in list(self._offers.items()):
            if request.peer is peer:
                # The peer may be reading still; nothing tells when it has ended. What it gets then, it has no
                # use for: it knows that it is disconnected, or is no more.
                del self._offers[notification]
                request.finish(peer.lost.result())
        for request in list(self._reads):
            if request.peer is peer:
                self._release(request)
        if agent is not None and agent not in self._agents.values():
            self._agent.remove_remote_agent(agent)

    def offer(self, peer: Peer, buffer: torch.Tensor) -> tuple[bytes, Request]:
        """See `Transport`."""
        peer.check()
        request = Request(peer)
        notification = secrets.token_bytes(16)
        self._offers[notification] = request
        ticket = _Ticket(*_description(buffer), notification)
        self._poll_on()
        return msgspec.msgpack.encode(ticket), request

    def fetch(self, peer: Peer, ticket: bytes, buffer: torch.Tensor) -> Request:
        """See `Transport`."""
        peer.check()
        try:
            there = msgspec.msgpack.decode(ticket, type=_Ticket)
        except msgspec.DecodeError as error:
            raise PeerLost(f"{peer.name}: {ticket!r} is no ticket of the transport nixl") from error
        request = Request(peer)
        *region, memory = _description(buffer)
        try:
            handle = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs([tuple(region)], memory),
                self._agent.get_xfer_descs([(there.address, there.num_bytes, there.device)], there.memory),
                self._agents[peer],
                there.notification,
            )
            state = self._agent.transfer(handle)
        except Exception as error:
            raise PeerLost(f"{peer.name}: NIXL cannot read what it offers: {error}") from error
        self._reads[request] = handle
        if state == "DONE":
            self._release(request)
        self._poll_on()
        return request

    def close(self) -> None:
        """See `Transport`."""
        if self._polling is not None:
            self._polling.cancel()
            self._polling = None
        for peer in list(self._agents):
            self.disconnect(peer)
        while self._registered:
            self._agent.deregister_memory(self._registered.pop())

    def _poll_on(self) -> None:
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll())

    async def _poll(self) -> None:
        moved_at = time.monotonic()
        while self._offers or self._reads:
            if self._progress():
                moved_at = time.monotonic()
            is_eager = time.monotonic() - moved_at < EAGER_POLLING_S
            await asyncio.sleep(0 if is_eager else LAZY_POLLING_S)
        self._polling = None

    def _progress(self) -> bool:
        """Look after the open requests; return whether one of them finished."""
        num_open = len(self._offers) + len(self._reads)
        for notifications in self._agent.get_new_notifs().values():
            for notification in notifications:
                if (offered := self._offers.pop(notification, None)) is not None:
                    offered.finish()
        for request, handle in list(self._reads.items()):
            try:
                state = self._agent.check_xfer_state(handle)
            except Exception as error:
                request.peer.mark_lost(f"NIXL has lost it: {error}")
                state = "ERR"
            if state != "PROC":
                self._release(request, failed=state == "ERR")
        return len(self._offers) + len(self._reads) < num_open

    def _release(self, request: Request, *, failed: bool = False) -> None:
        """Free the read of a request; it stays open if NIXL cannot stop reading."""
        try:
            self._agent.release_xfer_handle(self._reads[request])
        except Exception:
            return
        del self._reads[request]
        if failed:
            request.peer.mark_lost("NIXL could not read")
        request.finish(request.peer.lost.result() if request.peer.is_lost else None)


def _description(buffer: torch.Tensor) -> tuple[int, int, int, str]:
    """Return what NIXL calls a descriptor: address, bytes, device, and the kind of memory."""
    device = buffer.device.index or 0 if buffer.is_cuda else 0
    return buffer.data_ptr(), buffer.nbytes, device, "VRAM" if buffer.is_cuda else "DRAM"
