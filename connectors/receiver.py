"""The receiving half: other engines' blocks are fetched into this one's, by chunks. On one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
import torch

from connectors import metrics
from connectors.channel import Channel
from connectors.config import TransferConfig
from connectors.errors import PeerLost, PeerRefused, ProtocolError, TransferError
from connectors.gaps import Gaps
from connectors.geometry import Chunk, Geometry, Source, Wire, sources
from connectors.kv_cache import KVCache
from connectors.messages import AnyMessage, Cancel, ChunkOffered, End, Failed, Subscribe
from connectors.params import TransferParams
from connectors.staging import Copier, StagingRing
from connectors.transport import Peer, Request, Transport

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class SenderRank:
    """A peer's rank, as it is reached, and the transfers from it by their ids."""

    channel: Channel
    geometry: Geometry
    peer: Peer
    wire: Wire
    inboxes: dict[str, asyncio.Queue[AnyMessage | TransferError]] = field(default_factory=dict)

    def lose(self) -> None:
        """End the transfers from a peer that is lost."""
        for inbox in self.inboxes.values():
            inbox.put_nowait(self.channel.lost.result())


@dataclass(eq=False)
class Incoming:
    """Blocks of one request that are to be filled. They are written until `receive` returns."""

    params: TransferParams
    block_ids: Sequence[int]
    """The request's physical blocks, from position 0 on."""
    tokens: range
    """Positions that are wanted: from the first that is missing to the end of the prompt."""
    gaps: Gaps
    """What of them has not arrived."""
    is_cancelled: bool = False
    num_bytes: int = 0
    """That have arrived."""
    num_under_way: int = 0
    """Chunks that were offered and have not arrived."""
    busy_since: float = 0.0
    busy_s: float = 0.0
    """In which there were such chunks, until the last time that there were none."""
    senders: list[SenderRank] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def begin_chunk(self, now: float) -> None:
        """Count a chunk that was offered."""
        if not self.num_under_way:
            self.busy_since = now
        self.num_under_way += 1

    def end_chunk(self, now: float) -> None:
        """Count it out: it has arrived, or will not."""
        self.num_under_way -= 1
        if not self.num_under_way:
            self.busy_s += now - self.busy_since


@dataclass(frozen=True, slots=True)
class Received:
    """What became of a transfer."""

    missing: set[int]
    """Physical blocks that could not be filled."""
    num_bytes: int
    busy_s: float
    """In which a chunk was on its way; not in it: while they were being computed."""


class Receiver:
    """Receives into the cache of this rank.

    Args:
        cache: where the blocks are.
        connect: returns a sender's rank by its address.
        transport: the wire, once it is open.
        copier: does the copying.
        config: timeouts.
    """

    def __init__(
        self,
        cache: KVCache,
        connect: Callable[[str, int], asyncio.Future[SenderRank]],
        transport: Callable[[], Transport],
        copier: Copier,
        config: TransferConfig,
    ) -> None:
        self._cache = cache
        self._connect = connect
        self._transport = transport
        self._copier = copier
        self._config = config
        self.ring = StagingRing(
            config.num_buffers(cache.device.type),
            config.buffer_bytes(cache.device.type),
            cache.device,
            poison=config.staging_poison,
        )
        self._live: dict[str, Incoming] = {}
        self._drops: set[asyncio.Task[None]] = set()

    @property
    def num_live(self) -> int:
        """Transfers that have not ended."""
        return len(self._live)

    async def receive(self, params: TransferParams, block_ids: Sequence[int], tokens: range) -> Received:
        """Fill blocks.

        Args:
            params: whose blocks, and which transfer.
            block_ids: the request's physical blocks, from position 0 on.
            tokens: positions that are wanted; the first is the first of a block.
        """
        geometry = self._cache.geometry
        gaps = Gaps(tokens, geometry.block_size, geometry.num_layers * len(geometry.heads))
        incoming = Incoming(params, block_ids, tokens, gaps)
        if params.transfer_id in self._live:
            _log.warning("transfer_refused", transfer_id=params.transfer_id, reason="it is under way already")
            return Received({block_ids[block] for block in gaps.blocks()}, 0, 0.0)
        self._live[params.transfer_id] = incoming
        outcomes = await asyncio.gather(
            *(self._receive(incoming, source) for source in sources(geometry, params.peer_tp_size)),
            return_exceptions=True,
        )
        del self._live[params.transfer_id]
        incoming.done.set()
        return Received(self._conclude(incoming, outcomes), incoming.num_bytes, incoming.busy_s)

    async def cancel(self, transfer_id: str) -> None:
        """Stop a transfer; no block is written any more when this returns."""
        if (incoming := self._live.get(transfer_id)) is not None:
            incoming.is_cancelled = True
            for sender in incoming.senders:
                sender.channel.send(Cancel(transfer_id))
                if inbox := sender.inboxes.get(transfer_id):
                    inbox.put_nowait(PeerRefused("the request was aborted"))
            await incoming.done.wait()

    def deliver(self, sender: SenderRank, message: AnyMessage) -> None:
        """Take a message of a sender."""
        if not isinstance(message, ChunkOffered | End | Failed):
            sender.channel.lose(
                ProtocolError(
                    f"{sender.channel.name}: it sent {type(message).__name__}, which senders do not"
                )
            )
        elif inbox := sender.inboxes.get(message.transfer_id):
            inbox.put_nowait(message)
        elif isinstance(message, ChunkOffered):
            self._drop(sender, message)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _drop(self, sender: SenderRank, offer: ChunkOffered) -> None:
        """Fetch a chunk that nobody wants any more: its sender waits for that, and cannot take it back."""

        async def drop() -> None:
            try:
                self._check(None, sender, offer.chunk)
                index, request = await self._fetch(sender, offer)
            except TransferError as error:
                sender.channel.lose(error)
                return
            try:
                await request.wait(self._config.chunk_timeout_s)
            except PeerLost as error:
                sender.channel.lose(error)
            finally:
                self.ring.release(index, request)

        task = asyncio.create_task(drop())
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    def _conclude(self, incoming: Incoming, outcomes: Sequence[BaseException | None]) -> set[int]:
        errors = [outcome for outcome in outcomes if outcome is not None]
        for error in errors:
            if not isinstance(error, TransferError):
                raise error
        missing = {incoming.block_ids[block] for block in incoming.gaps.blocks()}
        if not errors and missing:
            errors.append(ProtocolError(f"{incoming.params.peer}: it ended before it had sent everything"))
        outcome = "done" if not errors else "cancelled" if incoming.is_cancelled else type(errors[0]).__name__
        metrics.TRANSFERS.labels("receive", outcome).inc()
        if incoming.num_bytes:
            metrics.WIRE_BYTES.labels(incoming.params.peer).inc(incoming.num_bytes)
            metrics.WIRE_SECONDS.labels(incoming.params.peer).inc(incoming.busy_s)
        if errors and not incoming.is_cancelled:
            _log.warning(
                "transfer_failed",
                transfer_id=incoming.params.transfer_id,
                role="receive",
                peer=incoming.params.peer,
                reason=str(errors[0]),
                num_missing_blocks=len(missing),
            )
        return missing

    async def _receive(self, incoming: Incoming, source: Source) -> None:
        host, port = incoming.params.address
        sender = await self._connect(host, port + source.tp_rank)
        if sender.geometry.tp_size != incoming.params.peer_tp_size:
            raise PeerRefused(
                f"{sender.channel.name}: it has {sender.geometry.tp_size} tensor-parallel ranks, "
                f"not {incoming.params.peer_tp_size}"
            )
        transfer_id = incoming.params.transfer_id
        if incoming.is_cancelled:
            # So that the sender need not wait for its lease.
            sender.channel.send(Subscribe(transfer_id, incoming.tokens.start))
            sender.channel.send(Cancel(transfer_id))
            return
        inbox: asyncio.Queue[AnyMessage | TransferError] = asyncio.Queue()
        sender.inboxes[transfer_id] = inbox
        incoming.senders.append(sender)
        landing: list[asyncio.Task[None]] = []
        try:
            sender.channel.send(Subscribe(transfer_id, incoming.tokens.start))
            if sender.channel.lost.done():
                raise sender.channel.lost.result()
            while (offer := await self._next(sender, inbox)) is not None:
                self._check(incoming, sender, offer.chunk)
                incoming.begin_chunk(self._now())
                try:
                    index, request = await self._fetch(sender, offer)
                except BaseException:
                    incoming.end_chunk(self._now())
                    raise
                landing.append(asyncio.create_task(self._land(incoming, sender, offer.chunk, index, request)))
            await asyncio.gather(*landing)
        finally:
            # What is being copied is let finish: nobody writes after this.
            await asyncio.gather(*landing, return_exceptions=True)
            del sender.inboxes[transfer_id]
            while not inbox.empty():
                if isinstance(message := inbox.get_nowait(), ChunkOffered):
                    self._drop(sender, message)

    async def _next(
        self, sender: SenderRank, inbox: asyncio.Queue[AnyMessage | TransferError]
    ) -> ChunkOffered | None:
        """Return the next chunk, or None at the end."""
        try:
            async with asyncio.timeout(self._config.chunk_timeout_s):
                message = await inbox.get()
        except TimeoutError as error:
            raise PeerLost(
                f"{sender.channel.name}: no chunk came for {self._config.chunk_timeout_s:g} s"
            ) from error
        if isinstance(message, TransferError):
            raise message
        if isinstance(message, Failed):
            raise PeerRefused(f"{sender.channel.name}: {message.reason}")
        return message if isinstance(message, ChunkOffered) else None

    def _check(self, incoming: Incoming | None, sender: SenderRank, chunk: Chunk) -> None:
        """Raise if a chunk does not fit: it would be written to other blocks, or beyond the buffer."""
        geometry = self._cache.geometry
        tokens = incoming.tokens if incoming else chunk.tokens
        fits = (
            0 <= chunk.first_layer < chunk.layers.stop <= geometry.num_layers
            and tokens.start <= chunk.first_token < chunk.tokens.stop <= tokens.stop
            and sender.wire.chunk_bytes(geometry, chunk) <= self.ring.buffer_bytes
        )
        if not fits:
            error = ProtocolError(f"{sender.channel.name}: it offered {chunk}, which does not fit here")
            sender.channel.lose(error)
            raise error

    async def _fetch(self, sender: SenderRank, offer: ChunkOffered) -> tuple[int, Request]:
        """Begin to fetch a chunk; return its buffer and the request."""
        index = await self.ring.acquire(self._config.chunk_timeout_s)
        try:
            return index, self._transport().fetch(
                sender.peer, offer.ticket, self._buffer(sender, offer.chunk, index)
            )
        except PeerLost as error:
            self.ring.release(index)
            sender.channel.lose(error)
            raise

    def _buffer(self, sender: SenderRank, chunk: Chunk, index: int) -> torch.Tensor:
        return self.ring.memory[index][: sender.wire.chunk_bytes(self._cache.geometry, chunk)]

    async def _land(
        self, incoming: Incoming, sender: SenderRank, chunk: Chunk, index: int, request: Request
    ) -> None:
        buffer = self._buffer(sender, chunk, index)
        try:
            await request.wait(self._config.chunk_timeout_s)
            metrics.BYTES.labels("receive").inc(buffer.nbytes)
            incoming.num_bytes += buffer.nbytes
            if incoming.is_cancelled:
                return
            await self._copier.run(
                lambda: self._cache.scatter(chunk, incoming.block_ids, sender.wire, buffer)
            )
        except PeerLost as error:
            sender.channel.lose(error)
            raise
        finally:
            self.ring.release(index, request)
            incoming.end_chunk(self._now())
        incoming.gaps.fill(chunk.tokens, chunk.num_layers * sender.wire.num_heads)
