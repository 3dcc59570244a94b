"""UCX by way of UCXX: TCP, shared memory, CUDA IPC, and RDMA where the system's UCX has it.

A buffer is a tagged message, its ticket a random tag. Large messages are rendezvous in UCX: they stay where
they are until the receive is posted. UCXX's own asyncio layer has one worker per process and completes no
request of a lost peer, so this drives UCX workers itself: progress in blocking mode, woken by the worker's
file descriptor.

Source: UCXX 0.52 `ucxx/_lib_async/`, UCX 1.21 `ucp.h` (ucp_worker_arm).
"""

from __future__ import annotations

import asyncio
import secrets
import zlib

import torch

from connectors.buffers import exposed
from connectors.errors import PeerLost
from connectors.transport import Peer, Request
from connectors.ucx_environment import tune
from kvindex.errors import ConfigError

ROUNDS_OF_PROGRESS = 64
"""After so many the event loop gets its turn, busy or not."""
EAGER_ROUNDS = 1_000
LAZY_POLLING_S = 0.001

_TICKET_BYTES = 8
_CHECKSUM_BYTES = 4

try:
    tune()
    import ucxx  # noqa: F401 - loads the libraries
    from ucxx._lib import libucxx as ucx
    from ucxx._lib.arr import Array
except ImportError as error:
    raise ConfigError(f"the transport ucx needs UCXX: pip install 'kvlane[ucx]' ({error})") from error


class UcxTransport:
    """One UCX worker."""

    name = "ucx"

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker = ucx.UCXWorker(
            ucx.UCXContext({}, feature_flags=(ucx.Feature.TAG, ucx.Feature.WAKEUP)),
            enable_delayed_submission=False,
            enable_python_future=False,
        )
        self._worker.init_blocking_progress_mode()
        self._endpoints: dict[Peer, ucx.UCXEndpoint] = {}
        # The message's memory must live as long as the request.
        self._open: dict[Request, tuple[ucx.UCXRequest, Array]] = {}
        self._is_due = False
        self._num_busy_rounds = 0
        self._is_closed = False
        self._loop.add_reader(self._worker.epoll_file_descriptor, self._progress)
        self._progress()

    @property
    def address(self) -> bytes:
        """See `Transport`."""
        address = bytes(self._worker.address)
        return zlib.crc32(address).to_bytes(_CHECKSUM_BYTES, "little") + address

    def register(self, memory: torch.Tensor) -> None:
        """Do nothing: UCX registers what it meets, and remembers it."""

    def connect(self, name: str, address: bytes) -> Peer:
        """See `Transport`."""
        peer = Peer(name)
        checksum, address = address[:_CHECKSUM_BYTES], address[_CHECKSUM_BYTES:]
        # UCX believes what it reads.
        if not address or int.from_bytes(checksum, "little") != zlib.crc32(address):
            raise PeerLost(f"{name}: what it sent is no address of the transport ucx")
        try:
            endpoint = self._worker.create_endpoint_from_worker_address(
                ucx.UCXAddress.create_from_buffer(address), True
            )
        except ucx.UCXError as error:
            raise PeerLost(f"{name}: UCX cannot reach it: {error}") from error
        # Called within progress, where nothing may be done about it.
        endpoint.set_close_callback(
            lambda: self._loop.call_soon_threadsafe(self._lose, peer, "UCX has lost the connection")
        )
        self._endpoints[peer] = endpoint
        self._soon()
        return peer

    def disconnect(self, peer: Peer) -> None:
        """See `Transport`."""
        self._lose(peer, "disconnected")

    def offer(self, peer: Peer, buffer: torch.Tensor) -> tuple[bytes, Request]:
        """See `Transport`."""
        ticket = secrets.token_bytes(_TICKET_BYTES)
        message = Array(exposed(buffer))
        posted = self._endpoint(peer).tag_send(message, _tag(ticket))
        return ticket, self._watch(peer, posted, message)

    def fetch(self, peer: Peer, ticket: bytes, buffer: torch.Tensor) -> Request:
        """See `Transport`."""
        if len(ticket) != _TICKET_BYTES:
            raise PeerLost(f"{peer.name}: {ticket!r} is no ticket of the transport ucx")
        message = Array(exposed(buffer))
        posted = self._endpoint(peer).tag_recv(message, _tag(ticket))
        return self._watch(peer, posted, message)

    def close(self) -> None:
        """See `Transport`."""
        if self._is_closed:
            return
        for peer in list(self._endpoints):
            self._lose(peer, "this transport is closed")
        self._worker.cancel_inflight_requests()
        self._progress()
        self._is_closed = True
        self._loop.remove_reader(self._worker.epoll_file_descriptor)

    def _endpoint(self, peer: Peer) -> ucx.UCXEndpoint:
        peer.check()
        endpoint = self._endpoints[peer]
        if not endpoint.alive:
            self._lose(peer, "UCX has lost the connection")
            peer.check()
        return endpoint

    def _lose(self, peer: Peer, reason: str) -> None:
        peer.mark_lost(reason)
        if (endpoint := self._endpoints.pop(peer, None)) is not None:
            endpoint.close_blocking()  # by force: it waits for no peer, and cancels what can be cancelled
            self._soon()

    def _watch(self, peer: Peer, posted: ucx.UCXRequest, message: Array) -> Request:
        request = Request(peer)
        self._open[request] = posted, message
        self._soon()
        return request

    def _soon(self, delay_s: float = 0) -> None:
        if not self._is_due:
            self._is_due = True
            if delay_s:
                self._loop.call_later(delay_s, self._progress)
            else:
                self._loop.call_soon(self._progress)

    def _progress(self) -> None:
        """Do what UCX has to do, then have it wake this loop when there is more."""
        self._is_due = False
        if self._is_closed:
            return
        has_moved = False
        for _ in range(ROUNDS_OF_PROGRESS):
            if not self._worker.progress_once():
                break
            has_moved = True
        if self._worker.arm():
            self._num_busy_rounds = 0
        else:
            # There is more to do, or a peer's queue is full, which must not keep this loop from other work.
            self._num_busy_rounds = 0 if has_moved else self._num_busy_rounds + 1
            self._soon(LAZY_POLLING_S if self._num_busy_rounds > EAGER_ROUNDS else 0)
        for request, (posted, _) in list(self._open.items()):
            if posted.completed:
                del self._open[request]
                try:
                    posted.check_error()
                except ucx.UCXError as error:
                    request.finish(PeerLost(f"{request.peer.name}: {error or type(error).__name__}"))
                else:
                    request.finish()


def _tag(ticket: bytes) -> ucx.UCXXTag:
    return ucx.UCXXTag(int.from_bytes(ticket, "little"))
