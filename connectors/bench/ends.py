"""The two ends of a measured transfer, for each way of moving blocks. Each in a process of its own.

That of vLLM's NixlConnector is in `vllm_plugin/nixl_end.py`.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from connectors.config import TransferConfig
from connectors.errors import BenchFailed
from connectors.geometry import Geometry, Layout
from connectors.kv_cache import KVCache
from connectors.mover import KVMover
from connectors.params import TransferParams, new_transfer_id
from connectors.ucx_environment import tune

NUM_LAYERS = 4
BLOCK_SIZE = 16
LAYER_BLOCK_BYTES = 64 << 10
"""16 tokens of 8 heads of 128 bfloat16 numbers, K and V: an 8B model's."""
BLOCK_BYTES = NUM_LAYERS * LAYER_BLOCK_BYTES
GEOMETRY = Geometry(
    layout=Layout.NHD_PAIRS,
    num_layers=NUM_LAYERS,
    block_size=BLOCK_SIZE,
    num_heads=8,
    head_size=128,
    dtype="bfloat16",
    itemsize=2,
)


class End(Protocol):
    """One of the two ends: the sender's, or the receiver's."""

    layers: list[torch.Tensor]
    """Its cache, whose blocks are along the first axis."""

    def address(self) -> Any:  # noqa: ANN401 - each its own
        """Return what the other end connects with."""

    def connect(self, address: Any) -> None:  # noqa: ANN401 - each its own
        """Take the other end's address."""

    def begin(self, size: int) -> Any:  # noqa: ANN401 - each its own
        """Let the other end have so many blocks; return the ticket to fetch them with."""

    def fetch(self, size: int, ticket: Any) -> None:  # noqa: ANN401 - each its own
        """Have them in this cache when it returns.

        Raises:
            BenchFailed: some did not arrive.
        """

    def finish(self) -> None:
        """Wait until the sender is done with what it began."""

    def blocks(self, size: int) -> list[int]:
        """Return which blocks a transfer of so many moves."""


def _layers(device: str, num_blocks: int) -> list[torch.Tensor]:
    shape = (num_blocks, BLOCK_SIZE, 8, 256)
    return [torch.ones(shape, dtype=torch.bfloat16, device=device) for _ in range(NUM_LAYERS)]


def random_blocks(size: int, num_blocks: int) -> list[int]:
    """Return so many blocks in random places, the same ones every time."""
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(size))
    picked: list[int] = order[:size].tolist()
    return picked


class StagedEnd:
    """Ours: gather, wire, scatter."""

    def __init__(self, device: str, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        config = TransferConfig.model_validate(
            {"transfer_port": self._port, "transport": "ucx", "transfer_host": "127.0.0.1"}
        )
        self.layers = _layers(device, num_blocks)
        self._mover = KVMover("bench", KVCache(self.layers, GEOMETRY), config)
        self._mover.start()
        self._peer = ""

    def address(self) -> str:
        """Return the side channel."""
        return f"127.0.0.1:{self._port}"

    def connect(self, address: str) -> None:
        """Remember the other end; the first transfer connects."""
        self._peer = address

    def begin(self, size: int) -> str:
        """Offer blocks; return the transfer's id."""
        transfer_id = new_transfer_id()
        self._mover.open_send("bench", transfer_id, size * BLOCK_SIZE)
        self._mover.computed(transfer_id, self.blocks(size), size * BLOCK_SIZE, None)
        return transfer_id

    def fetch(self, size: int, transfer_id: str) -> None:
        """Have them in this cache when it returns."""
        params = TransferParams(transfer_id, "receive", self._peer)
        missing = self._mover.fetch(params, self.blocks(size), range(size * BLOCK_SIZE)).result().missing
        if missing:
            raise BenchFailed(f"{len(missing)} blocks did not arrive")

    def finish(self) -> None:
        """Do nothing: the transfer ends by itself."""

    def blocks(self, size: int) -> list[int]:
        """Return them in random places."""
        return random_blocks(size, self._num_blocks)


class RawUcxEnd:
    """UCXX's own API: one contiguous buffer in one message."""

    MESSAGE_BYTES = 1 << 40
    AT_A_TIME = 4

    def __init__(self, device: str, num_blocks: int) -> None:
        tune()
        self._memory = torch.ones(num_blocks * BLOCK_BYTES, dtype=torch.uint8, device=device)
        self.layers = [self._memory.view(num_blocks, BLOCK_BYTES)]
        self._loop = asyncio.new_event_loop()
        self._endpoint: Any = None
        self._connected = asyncio.Event()
        self._sending: Future[None] | None = None
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def address(self) -> int:
        """Return the port of a listener."""
        port: int = self._do(self._listen())
        return port

    def connect(self, port: int) -> None:
        """Connect to the other end's listener."""
        self._do(self._connect(port))

    def begin(self, size: int) -> None:
        """Send a buffer as large as so many blocks."""
        self._sending = asyncio.run_coroutine_threadsafe(self._move(size, self._endpoint, "send"), self._loop)

    def fetch(self, size: int, _: None) -> None:
        """Receive it."""
        self._do(self._move(size, self._accepted, "recv"))

    def finish(self) -> None:
        """Wait until it is sent."""
        if self._sending is not None:
            self._sending.result()

    def blocks(self, size: int) -> list[int]:
        """Return the first ones."""
        return list(range(size))

    def _do(self, work: Any) -> Any:  # noqa: ANN401
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> int:
        import ucxx

        if self._memory.is_cuda:
            torch.cuda.synchronize()  # makes this thread's CUDA context
        ucxx.init(progress_mode="blocking")

        async def accept(endpoint: Any) -> None:  # noqa: ANN401 - an untyped library's
            self._accepted = endpoint
            self._connected.set()

        self._listener = ucxx.create_listener(accept)
        port: int = self._listener.port
        return port

    async def _connect(self, port: int) -> None:
        import ucxx

        self._endpoint = await ucxx.create_endpoint("127.0.0.1", port)
        await self._connected.wait()

    async def _move(self, size: int, endpoint: Any, verb: str) -> None:  # noqa: ANN401
        parts = torch.split(self._memory[: size * BLOCK_BYTES], self.MESSAGE_BYTES)
        for first in range(0, len(parts), self.AT_A_TIME):
            await asyncio.gather(
                *(
                    getattr(endpoint, verb)(part if part.is_cuda else part.numpy())
                    for part in parts[first : first + self.AT_A_TIME]
                )
            )


class RawPartsEnd(RawUcxEnd):
    """The same in several messages at a time, which is faster on some links."""

    MESSAGE_BYTES = 4 << 20
