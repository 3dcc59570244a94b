"""`KVMover`: one rank's part in all transfers, in a thread of its own; the engine's side of `connectors`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import structlog
import torch

from connectors import metrics
from connectors.channel import Channel
from connectors.config import TransferConfig
from connectors.errors import PeerLost, PeerRefused, ProtocolError, TransferError
from connectors.geometry import Wire, mismatch, sources
from connectors.kv_cache import KVCache
from connectors.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Cancel,
    Hello,
    Ready,
    Refused,
    Subscribe,
    Welcome,
)
from connectors.pace import Moved
from connectors.params import TransferParams
from connectors.receiver import Received, Receiver, SenderRank
from connectors.sender import Receiver as ReceiverRank
from connectors.sender import Sender
from connectors.staging import Copier
from connectors.transport import Peer, Transport
from connectors.transports import TransportChoice, best_common
from kvindex.errors import ConfigError

_log = structlog.get_logger(__name__)

T = TypeVar("T")


class KVMover:
    """Sends this rank's blocks to those who ask for them, and fetches blocks of others.

    Every method may be called from any one thread. Those that say so wait for the mover's thread; the others
    do not.

    Args:
        model: what must be equal at both ends for KV to mean the same: name and quantisation.
        cache: this rank's cache.
        config: the settings.
    """

    def __init__(self, model: str, cache: KVCache, config: TransferConfig) -> None:
        geometry = cache.geometry
        geometry.check()
        needed = geometry.block_size * geometry.row_bytes(len(geometry.heads))
        self._chunk_bytes = config.buffer_bytes(cache.device.type)
        if needed > self._chunk_bytes:
            raise ConfigError(f"kvlane.chunk_bytes must be at least {needed}: one layer of one block")
        self._model = model
        self._cache = cache
        self._config = config
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvlane-mover", daemon=True)
        self._ended_sends: list[str] = []
        self._ended_receives: dict[str, set[int]] = {}
        self._moved: list[Moved] = []
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._peers: dict[tuple[str, int], asyncio.Task[SenderRank]] = {}
        self._channels: set[Channel] = set()

    def start(self) -> None:
        """Listen for receivers. Waits.

        Raises:
            ConfigError: the transport or the port cannot be used.
        """
        self._thread.start()
        try:
            self._wait(self._start())
        except BaseException:
            self._end_thread()
            raise

    def stop(self) -> None:
        """End every transfer and give up every peer. Waits. Idempotent."""
        if self._thread.is_alive():
            self._wait(self._stop())
            self._end_thread()

    # Sending

    def open_send(self, request_id: str, transfer_id: str, num_tokens: int) -> None:
        """Take a request whose blocks others will ask for; `take_ended` names it when they are not needed any
        more.
        """

        def ended() -> None:
            with self._lock:
                self._ended_sends.append(request_id)

        self._loop.call_soon_threadsafe(self._sender.open, transfer_id, num_tokens, ended)

    def computed(
        self, transfer_id: str, block_ids: list[int], num_tokens: int, event: torch.cuda.Event | None
    ) -> None:
        """Say that a request's first tokens are in these blocks, on a GPU once `event` has passed."""
        self._loop.call_soon_threadsafe(self._sender.computed, transfer_id, block_ids, num_tokens, event)

    def suspend(self, transfer_id: str) -> None:
        """Stop reading a request's blocks, which it loses, until they are computed again. Waits for the
        reader.
        """
        self._wait(self._sender.suspend(transfer_id))

    def abort_send(self, transfer_id: str) -> None:
        """End a transfer whose request was aborted; `take_ended` names it soon."""
        self._begin(self._sender.abort(transfer_id, "the request was aborted"))

    # Receiving

    def receive(
        self, request_id: str, params: TransferParams, block_ids: Sequence[int], tokens: range
    ) -> None:
        """Fill a request's blocks; `take_ended` tells when that is over, and what is missing then.

        Args:
            request_id: under which it is reported.
            params: whose blocks.
            block_ids: the request's physical blocks, from position 0 on.
            tokens: the positions to fill.
        """
        self._begin(self._receive(request_id, params, block_ids, tokens))

    def fetch(self, params: TransferParams, block_ids: Sequence[int], tokens: range) -> Future[Received]:
        """Fill blocks as `receive` does; the result says what is missing."""
        return asyncio.run_coroutine_threadsafe(self._receiver.receive(params, block_ids, tokens), self._loop)

    def cancel_receive(self, transfer_id: str) -> None:
        """Stop filling a request's blocks; `take_ended` names it soon."""
        self._begin(self._receiver.cancel(transfer_id))

    def take_ended(self) -> tuple[list[str], dict[str, set[int]]]:
        """Return the requests whose sending, and whose receiving, ended since the last call.

        The latter with the physical blocks that were not filled.
        """
        with self._lock:
            sends, self._ended_sends = self._ended_sends, []
            receives, self._ended_receives = self._ended_receives, {}
        return sends, receives

    def take_moved(self) -> list[Moved]:
        """Return what complete transfers took, of those since the last call."""
        with self._lock:
            moved, self._moved = self._moved, []
        return moved

    # The mover's thread

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._loop.call_soon_threadsafe(self._spawn, work)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        config = self._config
        if self._cache.device.type == "cuda":
            # A transport works in the CUDA context of its thread.
            torch.cuda.set_device(self._cache.device)
            torch.cuda.synchronize()
        self._choice = TransportChoice(config.transport)
        # One for each direction: what was received must not wait for the step that computes what is sent.
        self._copiers = Copier(self._cache.device), Copier(self._cache.device)
        self._sender = Sender(self._cache, self._transport, self._copiers[0], config)
        self._receiver = Receiver(self._cache, self._connect, self._transport, self._copiers[1], config)
        self._is_registered = False
        port = config.transfer_port + self._cache.geometry.tp_rank
        tls = config.transfer_tls
        self._client_context = tls.client_context() if tls else None
        server_context = tls.server_context() if tls else None
        try:
            self._server = await asyncio.start_server(
                self._serve, config.transfer_host, port, ssl=server_context
            )
        except OSError as error:
            raise ConfigError(
                f"transfer_port {port} of {config.transfer_host} cannot be used: {error}; choose another one"
            ) from error
        metrics.watch("send", self._sender)
        metrics.watch("receive", self._receiver)
        metrics.PEERS.set_function(lambda: len(self._channels))

    async def _stop(self) -> None:
        self._server.close()
        await self._sender.close()
        for channel in list(self._channels):
            channel.lose(PeerLost("this engine stops"))
        if pending := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
            await asyncio.wait(pending, timeout=1)
        for task in pending:
            task.cancel()
        self._choice.close()
        for copier in self._copiers:
            copier.close()

    async def _receive(
        self, request_id: str, params: TransferParams, block_ids: Sequence[int], tokens: range
    ) -> None:
        missing = set(block_ids)
        try:
            received = await self._receiver.receive(params, block_ids, tokens)
            missing = received.missing
            if not missing:
                with self._lock:
                    self._moved.append(Moved(received.num_bytes, received.busy_s))
        finally:
            with self._lock:
                self._ended_receives[request_id] = missing

    def _transport(self) -> Transport:
        transport = self._choice.transport
        if transport is None:
            raise PeerLost("no transport is open")
        return transport

    def _open(self, name: str) -> Transport:
        transport = self._choice.open(name)
        if not self._is_registered:
            transport.register(self._sender.ring.memory)
            transport.register(self._receiver.ring.memory)
            self._is_registered = True
        return transport

    # As sender: receivers connect

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(reader, writer, self._config.peer_timeout_s)
        self._channels.add(channel)
        try:
            receiver = await self._greet(channel)
        except (TransferError, ConfigError) as error:
            metrics.REFUSED_PEERS.labels(type(error).__name__).inc()
            _log.warning("peer_refused", peer=channel.name, reason=str(error))
            channel.send(Refused(str(error)))
            channel.lose(error if isinstance(error, TransferError) else PeerRefused(str(error)))
            self._channels.discard(channel)
            return

        def handle(message: AnyMessage) -> None:
            if isinstance(message, Subscribe):
                self._sender.subscribe(receiver, message)
            elif isinstance(message, Cancel):
                self._spawn(self._sender.cancel(receiver, message.transfer_id))
            else:
                channel.lose(
                    ProtocolError(f"{channel.name}: it sent {type(message).__name__}, which receivers do not")
                )

        await self._listen(channel, receiver.peer, handle, lambda: self._sender.is_serving(receiver))
        await self._sender.lose(receiver)

    async def _greet(self, channel: Channel) -> ReceiverRank:
        """Agree with a receiver.

        Raises:
            TransferError: that is not possible; the message says why.
            ConfigError: the transport that both have does not work here.
        """
        timeout_s = self._config.peer_timeout_s
        hello = await channel.expect(Hello, timeout_s)
        if reason := self._refusal(hello):
            raise PeerRefused(reason)
        name = best_common(self._choice.names, hello.transports)
        if name is None:
            raise PeerRefused(
                f"no common transport: {', '.join(self._choice.names)} here, "
                f"{', '.join(hello.transports)} there"
            )
        transport = self._open(name)
        channel.send(Welcome(self._cache.geometry, name, transport.address))
        ready = await channel.expect(Ready, timeout_s)
        peer = transport.connect(channel.name, ready.address)
        return ReceiverRank(channel, hello.geometry, peer, min(self._chunk_bytes, hello.chunk_bytes))

    def _refusal(self, hello: Hello) -> str | None:
        if hello.version != PROTOCOL_VERSION:
            return f"protocol version {PROTOCOL_VERSION} here and {hello.version} there"
        if hello.model != self._model:
            return f"the model is {self._model} here and {hello.model} there"
        geometry = self._cache.geometry
        if reason := mismatch(geometry, hello.geometry):
            return reason
        num_heads = min(len(geometry.heads), len(hello.geometry.heads))
        needed = geometry.block_size * geometry.row_bytes(num_heads)
        if needed > hello.chunk_bytes:
            return (
                f"blocks of this engine need kvlane.chunk_bytes of {needed}, it is {hello.chunk_bytes} there"
            )
        return None

    # As receiver: connect to senders

    def _connect(self, host: str, port: int) -> asyncio.Task[SenderRank]:
        known = self._peers.get((host, port))
        if known is None or (
            known.done() and (known.cancelled() or known.exception() or known.result().channel.lost.done())
        ):
            known = self._loop.create_task(self._introduce(host, port))
            known.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._peers[host, port] = known
        return known

    async def _introduce(self, host: str, port: int) -> SenderRank:
        timeout_s = self._config.peer_timeout_s
        geometry = self._cache.geometry
        try:
            connecting = asyncio.open_connection(host, port, ssl=self._client_context)
            reader, writer = await asyncio.wait_for(connecting, timeout_s)
        except (OSError, TimeoutError) as error:
            raise PeerLost(f"{host}:{port}: it cannot be reached: {error or 'no answer'}") from error
        channel = Channel(reader, writer, timeout_s)
        self._channels.add(channel)
        try:
            channel.send(
                Hello(PROTOCOL_VERSION, self._model, geometry, self._choice.names, self._chunk_bytes)
            )
            welcome = await channel.expect(Welcome, timeout_s)
            if welcome.transport not in self._choice.names:
                raise PeerRefused(f"{channel.name}: this side cannot use the transport {welcome.transport}")
            if reason := mismatch(geometry, welcome.geometry):
                raise PeerRefused(f"{channel.name}: {reason}")
            wires = [
                Wire.between(welcome.geometry, geometry, source)
                for source in sources(geometry, welcome.geometry.tp_size)
                if source.tp_rank == welcome.geometry.tp_rank
            ]
            if not wires:
                raise PeerRefused(f"{channel.name}: it has nothing for rank {geometry.tp_rank}")
            transport = self._open(welcome.transport)
            peer = transport.connect(channel.name, welcome.address)
            channel.send(Ready(transport.address))
        except (TransferError, ConfigError) as error:
            lost = error if isinstance(error, TransferError) else PeerRefused(str(error))
            channel.lose(lost)
            self._channels.discard(channel)
            raise lost from error
        sender = SenderRank(channel, welcome.geometry, peer, wires[0])
        self._spawn(self._attend(sender))
        return sender

    async def _attend(self, sender: SenderRank) -> None:
        await self._listen(
            sender.channel,
            sender.peer,
            lambda message: self._receiver.deliver(sender, message),
            lambda: bool(sender.inboxes),
        )
        sender.lose()

    async def _listen(
        self, channel: Channel, peer: Peer, handle: Callable[[AnyMessage], None], is_busy: Callable[[], bool]
    ) -> None:
        """Take a peer's messages until it is lost, by the side channel or by the transport."""
        peer.lost.add_done_callback(lambda lost: channel.lose(lost.result()))
        try:
            await channel.listen(handle, is_busy)
        finally:
            _log.info("peer_gone", peer=channel.name, reason=str(channel.lost.result()))
            self._transport().disconnect(peer)
            self._channels.discard(channel)
