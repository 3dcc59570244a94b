"""The sending half: computed blocks leave, chunk by chunk, for those who subscribed to them. On one event
loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import structlog
import torch

from connectors import metrics
from connectors.channel import Channel
from connectors.condition import Condition
from connectors.config import TransferConfig
from connectors.errors import PeerLost, TransferAborted, TransferError, TransferTimeout
from connectors.fill import WireRate, least_fill, whole_buffers
from connectors.geometry import Chunk, Geometry, Source, Wire, num_receivers, plan_chunks, sources
from connectors.kv_cache import KVCache
from connectors.messages import ChunkOffered, End, Failed, Subscribe
from connectors.staging import Copier, StagingRing
from connectors.transport import Peer, Request, Transport

_log = structlog.get_logger(__name__)

REMEMBERED_IDS = 100_000
"""Ids of ended transfers that are known to be used. Older ones are unknown, which is refused as well, but
later.
"""

PATIENT_SHARE = 4
"""Blocks wait a fourth of a chunk's timeout at most until they are worth a chunk."""


@dataclass(frozen=True, eq=False)
class Receiver:
    """A peer's rank, as it is reached."""

    channel: Channel
    geometry: Geometry
    peer: Peer
    chunk_bytes: int
    """Most that a chunk for it may have: what fits into a buffer at both ends."""
    rate: WireRate = field(default_factory=WireRate)
    """Of the wire to it."""


@dataclass(eq=False)
class Outgoing:
    """Blocks of one request, and who gets them. They are read between `computed` and `ended`, and at no other
    time.
    """

    transfer_id: str
    num_tokens: int | None = None
    """Of the prompt; None before its request has come."""
    block_ids: list[int] = field(default_factory=list)
    num_ready_tokens: int = 0
    """Leading tokens whose KV is in the blocks now."""
    event: torch.cuda.Event | None = None
    """Marks, on a GPU, that they are computed."""
    on_end: Callable[[], None] | None = None
    served: set[int] = field(default_factory=set)
    """Receiving ranks that have been offered everything."""
    num_receivers: int | None = None
    receivers: dict[int, Receiver] = field(default_factory=dict)
    """By rank: those that have subscribed."""
    error: TransferError | None = None
    num_reading: int = 0
    changed: Condition = field(default_factory=Condition)
    lease: asyncio.TimerHandle | None = None

    @property
    def is_computed(self) -> bool:
        """Whether everything there will be is in the blocks."""
        return self.num_tokens is not None and self.num_ready_tokens >= self.num_tokens


class Sender:
    """Serves subscriptions from the cache of this rank.

    Args:
        cache: where the blocks are.
        transport: the wire, once it is open.
        copier: does the copying.
        config: leases and timeouts.
    """

    def __init__(
        self, cache: KVCache, transport: Callable[[], Transport], copier: Copier, config: TransferConfig
    ) -> None:
        self._cache = cache
        self._transport = transport
        self._copier = copier
        self._config = config
        self.ring = StagingRing(
            config.num_buffers(cache.device.type),
            config.buffer_bytes(cache.device.type),
            cache.device,
            poison=config.staging_poison,
        )
        self._live: dict[str, Outgoing] = {}
        self._used: OrderedDict[str, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_live(self) -> int:
        """Transfers that have not ended."""
        return len(self._live)

    # What the engine says

    def open(self, transfer_id: str, num_tokens: int, on_end: Callable[[], None]) -> None:
        """Take a request whose blocks are to be sent.

        Args:
            transfer_id: what its receivers ask for.
            num_tokens: of its prompt.
            on_end: called once, when its blocks are not needed any more.
        """
        if transfer_id in self._used:
            _log.warning("transfer_refused", transfer_id=transfer_id, reason="the id was used before")
            on_end()
            return
        outgoing = self._get(transfer_id)
        outgoing.num_tokens, outgoing.on_end = num_tokens, on_end
        self._set_lease(outgoing, None)

    def computed(
        self, transfer_id: str, block_ids: list[int], num_tokens: int, event: torch.cuda.Event | None
    ) -> None:
        """Say that the first `num_tokens` tokens are in these blocks, once `event` has passed."""
        outgoing = self._live.get(transfer_id)
        if outgoing is None:
            return
        outgoing.block_ids, outgoing.num_ready_tokens, outgoing.event = block_ids, num_tokens, event
        outgoing.changed.notify()
        if outgoing.is_computed and outgoing.lease is None:
            self._set_lease(outgoing, "no receiver came for it")

    async def suspend(self, transfer_id: str) -> None:
        """Read none of a transfer's blocks any more until `computed` is called again; then return."""
        if (outgoing := self._live.get(transfer_id)) is not None:
            outgoing.num_ready_tokens = 0
            await outgoing.changed.wait_for(lambda: outgoing.num_reading == 0)

    async def abort(self, transfer_id: str, reason: str) -> None:
        """End a transfer: its request was aborted. No block is read when this returns."""
        if transfer_id not in self._used:
            await self._end(self._get(transfer_id), TransferAborted(reason))

    # What the receivers say

    def subscribe(self, receiver: Receiver, message: Subscribe) -> None:
        """Begin to serve a receiving rank."""
        rank = receiver.geometry.tp_rank
        if message.transfer_id in self._used:
            self._refuse(receiver, message.transfer_id, "it was used before, or has ended")
            return
        outgoing = self._get(message.transfer_id)
        if rank in outgoing.receivers:
            self._refuse(receiver, message.transfer_id, f"rank {rank} has subscribed to it already")
            return
        outgoing.num_receivers = num_receivers(self._cache.geometry, receiver.geometry.tp_size)
        if outgoing.num_tokens is None and outgoing.lease is None:
            self._set_lease(outgoing, "there is no such request")
        outgoing.receivers[rank] = receiver
        self._spawn(self._serve(outgoing, receiver, message.first_token))

    async def cancel(self, receiver: Receiver, transfer_id: str) -> None:
        """End a transfer of which a receiving rank wants no more."""
        outgoing = self._live.get(transfer_id)
        if outgoing is not None and receiver in outgoing.receivers.values():
            await self._end(outgoing, TransferAborted("the receiver cancelled it"))

    async def lose(self, receiver: Receiver) -> None:
        """End every transfer to a peer that is lost."""
        for outgoing in list(self._live.values()):
            if receiver in outgoing.receivers.values():
                await self._end(outgoing, receiver.channel.lost.result())

    def is_serving(self, receiver: Receiver) -> bool:
        """Whether a peer has a transfer under way."""
        return any(receiver in outgoing.receivers.values() for outgoing in self._live.values())

    async def close(self) -> None:
        """End every transfer."""
        for outgoing in list(self._live.values()):
            await self._end(outgoing, TransferAborted("this engine stops"))
        for task in list(self._tasks):
            task.cancel()

    # Inside

    def _get(self, transfer_id: str) -> Outgoing:
        if transfer_id not in self._live:
            self._live[transfer_id] = Outgoing(transfer_id)
        return self._live[transfer_id]

    def _refuse(self, receiver: Receiver, transfer_id: str, reason: str) -> None:
        metrics.TRANSFERS.labels("send", "refused").inc()
        _log.warning("transfer_refused", transfer_id=transfer_id, peer=receiver.channel.name, reason=reason)
        receiver.channel.send(Failed(transfer_id, reason))

    def _set_lease(self, outgoing: Outgoing, reason: str | None) -> None:
        """Let the transfer end some time from now for this reason, or for none."""
        if outgoing.lease is not None:
            outgoing.lease.cancel()
            outgoing.lease = None
        if reason is not None:

            def expire() -> None:
                # A receiver that is being served renews the lease by being alive.
                if outgoing.num_tokens is None or len(outgoing.receivers) != outgoing.num_receivers:
                    self._spawn(self._end(outgoing, TransferTimeout(reason)))

            outgoing.lease = asyncio.get_running_loop().call_later(self._config.lease_s, expire)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, outgoing: Outgoing, receiver: Receiver, first_token: int) -> None:
        here = self._cache.geometry
        (source,) = (s for s in sources(receiver.geometry, here.tp_size) if s.tp_rank == here.tp_rank)
        try:
            await self._until(outgoing, receiver, lambda: outgoing.num_tokens is not None)
            if source.num_heads:
                await self._send(outgoing, receiver, source, first_token)
        except TransferError as error:
            receiver.channel.send(Failed(outgoing.transfer_id, str(error)))
            await self._end(outgoing, error)
            return
        receiver.channel.send(End(outgoing.transfer_id))
        outgoing.served.add(receiver.geometry.tp_rank)
        if len(outgoing.served) == outgoing.num_receivers:
            await self._end(outgoing, None)

    async def _send(self, outgoing: Outgoing, receiver: Receiver, source: Source, first_token: int) -> None:
        here = self._cache.geometry
        wire = Wire.between(here, receiver.geometry, source)
        sent = first_token
        token_bytes = here.num_layers * here.row_bytes(wire.num_heads)
        total_bytes = ((outgoing.num_tokens or 0) - first_token) * token_bytes
        fill_bytes = min(receiver.chunk_bytes, least_fill(total_bytes, receiver.rate.gb_per_s))
        min_tokens = max(1, int(fill_bytes / token_bytes))
        buffer_blocks = receiver.chunk_bytes // token_bytes // here.block_size
        gathering: set[asyncio.Task[None]] = set()
        try:
            while not (outgoing.is_computed and sent >= outgoing.num_ready_tokens):
                ready = await self._wait_ready(outgoing, receiver, sent, min_tokens)
                if not outgoing.is_computed:
                    ready = sent + whole_buffers(ready - sent, max(1, buffer_blocks) * here.block_size)
                for chunk in plan_chunks(here, wire, range(sent, ready), receiver.chunk_bytes):
                    index = await self.ring.acquire(self._config.chunk_timeout_s)
                    work = self._send_chunk(outgoing, receiver, wire, chunk, index)
                    gathering.add(asyncio.create_task(work))
                    for task in [task for task in gathering if task.done()]:
                        gathering.remove(task)
                        task.result()
                sent = ready
        finally:
            outcomes = await asyncio.gather(*gathering, return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def _wait_ready(self, outgoing: Outgoing, receiver: Receiver, sent: int, min_tokens: int) -> int:
        """Return up to where can be sent, whole blocks but for the last one.

        That is `min_tokens` more than `sent`, or all, or what there is after a while: the receiver does not
        wait for a chunk for ever.
        """

        def ready() -> int:
            num_tokens = outgoing.num_ready_tokens
            partial = num_tokens % self._cache.geometry.block_size
            return num_tokens if outgoing.is_computed else num_tokens - partial

        def has(num_tokens: int) -> Callable[[], bool]:
            return lambda: ready() >= sent + num_tokens or outgoing.is_computed

        try:
            async with asyncio.timeout(self._config.chunk_timeout_s / PATIENT_SHARE):
                await self._until(outgoing, receiver, has(min_tokens))
        except TimeoutError:
            await self._until(outgoing, receiver, has(1))
        return ready()

    async def _until(self, outgoing: Outgoing, receiver: Receiver, condition: Callable[[], bool]) -> None:
        await outgoing.changed.wait_for(
            lambda: outgoing.error is not None or receiver.channel.lost.done() or condition()
        )
        if outgoing.error is not None:
            raise outgoing.error
        if receiver.channel.lost.done():
            raise receiver.channel.lost.result()

    async def _send_chunk(
        self, outgoing: Outgoing, receiver: Receiver, wire: Wire, chunk: Chunk, index: int
    ) -> None:
        buffer = self.ring.memory[index][: wire.chunk_bytes(self._cache.geometry, chunk)]
        request = None
        try:
            # A request that was preempted has to compute this again.
            await self._until(outgoing, receiver, lambda: outgoing.num_ready_tokens >= chunk.tokens.stop)
            outgoing.num_reading += 1
            try:
                block_ids = outgoing.block_ids
                await self._copier.run(
                    lambda: self._cache.gather(chunk, block_ids, wire, buffer), outgoing.event
                )
            finally:
                outgoing.num_reading -= 1
                outgoing.changed.notify()
            ticket, request = self._transport().offer(receiver.peer, buffer)
            receiver.channel.send(ChunkOffered(outgoing.transfer_id, chunk, ticket))
        finally:
            if request is None:
                self.ring.release(index)
        self._spawn(self._watch(receiver, request, index, buffer.nbytes))

    async def _watch(self, receiver: Receiver, request: Request, index: int, num_bytes: int) -> None:
        clock = asyncio.get_running_loop().time
        offered_at = clock()
        try:
            await request.wait(self._config.chunk_timeout_s)
            receiver.rate.observe(num_bytes, clock() - offered_at)
            metrics.BYTES.labels("send").inc(num_bytes)
        except PeerLost as error:
            receiver.channel.lose(error)
        finally:
            self.ring.release(index, request)

    async def _end(self, outgoing: Outgoing, error: TransferError | None) -> None:
        """End a transfer, and let go of its blocks when none of them is being read. Idempotent."""
        if self._live.pop(outgoing.transfer_id, None) is None:
            return
        self._used[outgoing.transfer_id] = None
        while len(self._used) > REMEMBERED_IDS:
            self._used.popitem(last=False)
        self._set_lease(outgoing, None)
        outgoing.error = error
        outgoing.changed.notify()
        await outgoing.changed.wait_for(lambda: outgoing.num_reading == 0)
        metrics.TRANSFERS.labels("send", type(error).__name__ if error else "done").inc()
        if error is not None:
            _log.warning("transfer_failed", transfer_id=outgoing.transfer_id, role="send", reason=str(error))
        if outgoing.on_end is not None:
            outgoing.on_end()
