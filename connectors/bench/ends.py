"""The two ends of a measured transfer, for each way of moving blocks. Each in a process of its own."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from concurrent.futures import Future
from typing import Any

import torch

from connectors.config import TransferConfig
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
NIXL_SELF = "NIXL_INIT_AGENT"
"""How NIXL calls the local side of a prepared list."""


def _layers(device: str, num_blocks: int) -> list[torch.Tensor]:
    shape = (num_blocks, BLOCK_SIZE, 8, 256)
    return [torch.ones(shape, dtype=torch.bfloat16, device=device) for _ in range(NUM_LAYERS)]


def _blocks(size: int, num_blocks: int) -> list[int]:
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
        self._mover = KVMover("bench", KVCache(_layers(device, num_blocks), GEOMETRY), config)
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
        blocks = _blocks(size, self._num_blocks)
        self._mover.open_send("bench", transfer_id, size * BLOCK_SIZE)
        self._mover.computed(transfer_id, blocks, size * BLOCK_SIZE, None)
        return transfer_id

    def fetch(self, size: int, transfer_id: str) -> None:
        """Have them in this cache when it returns."""
        params = TransferParams(transfer_id, "receive", self._peer)
        blocks = _blocks(size, self._num_blocks)
        missing = self._mover.fetch(params, blocks, range(size * BLOCK_SIZE)).result().missing
        if missing:
            raise RuntimeError(f"{len(missing)} blocks did not arrive")

    def finish(self) -> None:
        """Do nothing: the transfer ends by itself."""


class RawUcxEnd:
    """UCXX's own API: one contiguous buffer, whole or in four messages at a time, whichever is faster."""

    CHUNK_BYTES = 4 << 20

    def __init__(self, device: str, num_blocks: int) -> None:
        tune()
        self._memory = torch.ones(num_blocks * BLOCK_BYTES, dtype=torch.uint8, device=device)
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
        memory = self._memory[: size * BLOCK_BYTES]
        parts = torch.split(memory, self.CHUNK_BYTES)
        for first in range(0, len(parts), 4):
            await asyncio.gather(
                *(
                    getattr(endpoint, verb)(part if part.is_cuda else part.numpy())
                    for part in parts[first : first + 4]
                )
            )


class NixlEnd:
    """What vLLM's NixlConnector does: one descriptor per block and layer, prepared once, read by index."""

    def __init__(self, device: str, num_blocks: int) -> None:
        tune()
        from nixl._api import nixl_agent, nixl_agent_config

        self._num_blocks = num_blocks
        self._memory = "VRAM" if device == "cuda" else "DRAM"
        self._layers = _layers(device, num_blocks)
        self._agent = nixl_agent(f"bench-{os.getpid()}", nixl_agent_config(backends=["UCX"]))
        self._agent.register_memory(self._layers)
        self._ours = self._agent.prep_xfer_dlist(NIXL_SELF, self._regions(self._bases()), self._memory)
        self._theirs: Any = None
        self._peer = ""

    def address(self) -> tuple[bytes, list[int]]:
        """Return the agent's metadata and where the layers are."""
        return self._agent.get_agent_metadata(), self._bases()

    def connect(self, address: tuple[bytes, list[int]]) -> None:
        """Prepare the other end's descriptors."""
        metadata, bases = address
        peer = self._agent.add_remote_agent(metadata)
        self._peer = peer.decode() if isinstance(peer, bytes) else peer
        self._theirs = self._agent.prep_xfer_dlist(self._peer, self._regions(bases), self._memory)

    def begin(self, size: int) -> None:
        """Do nothing: the reader reads."""

    def fetch(self, size: int, _: None) -> None:
        """Read blocks from the other cache into this one."""
        blocks = _blocks(size, self._num_blocks)
        indices = [layer * self._num_blocks + block for layer in range(NUM_LAYERS) for block in blocks]
        handle = self._agent.make_prepped_xfer("READ", self._ours, indices, self._theirs, indices, b"done")
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL: {state}")

    def finish(self) -> None:
        """Do nothing."""

    def _bases(self) -> list[int]:
        return [layer.data_ptr() for layer in self._layers]

    def _regions(self, bases: list[int]) -> Any:  # noqa: ANN401
        return self._agent.get_xfer_descs(
            [
                (base + block * LAYER_BLOCK_BYTES, LAYER_BLOCK_BYTES, 0)
                for base in bases
                for block in range(self._num_blocks)
            ],
            self._memory,
        )
