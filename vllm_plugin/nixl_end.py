"""vLLM's own NixlConnector without an engine: an end of `kvlane bench transport`.

Scheduler side and worker side in one process, told of blocks as a scheduler would. Where vLLM 0.24 and 0.32
differ is here as well. Source: `vllm/distributed/kv_transfer/kv_connector/v1/nixl` of both.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from uuid import uuid4

import torch
from vllm.config import KVTransferConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backend
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from connectors.bench.ends import LAYER_BLOCK_BYTES, NUM_LAYERS, random_blocks
from connectors.bench.ports import free_ports
from connectors.errors import BenchFailed
from connectors.ucx_environment import tune
from kvindex.errors import ConfigError

HOST = "127.0.0.1"
BLOCK_SIZE = 32
"""The CPU's attention takes no smaller one; heads are half as large for it."""
NUM_HEADS = 8
HEAD_SIZE = 64
LEASE_S = 30.0
"""vLLM's own."""
PAUSE_S = 1e-4
"""Between two looks; an engine looks once a step. Without it NIXL's threads have less of the CPU."""

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": NUM_HEADS * HEAD_SIZE,
    "intermediate_size": NUM_HEADS * HEAD_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_HEADS,
    "head_dim": HEAD_SIZE,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
}


class NixlConnectorEnd:
    """What an engine with NixlConnector does to move KV: the reader pulls blocks from the other cache.

    One to a process: it sets environment and vLLM's process groups.

    Raises:
        ConfigError: the vLLM here is made for another device.
    """

    def __init__(self, device: str, num_blocks: int) -> None:
        if device != current_platform.device_type:
            raise ConfigError(
                f"the vLLM here keeps its caches on {current_platform.device_type}, not on {device}: use "
                f"--device {current_platform.device_type}, or another build of vLLM"
            )
        tune()
        self._port, group_port = free_ports(2)
        os.environ |= {"VLLM_NIXL_SIDE_CHANNEL_HOST": HOST, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self._port)}
        config = _config(device)
        names = [f"model.layers.{index}.self_attn.attn" for index in range(NUM_LAYERS)]
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=NUM_HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16
        )
        if spec.page_size_bytes != LAYER_BLOCK_BYTES:
            raise AssertionError(f"blocks of {spec.page_size_bytes} bytes, others move {LAYER_BLOCK_BYTES}")
        caches = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(names, spec)])
        cores = os.sched_getaffinity(0)
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"tcp://{HOST}:{group_port}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            shape = _cache_shape(config, num_blocks)
            self.layers = [torch.ones(shape, dtype=torch.bfloat16, device=device) for _ in names]
            self._worker = NixlConnector(config, KVConnectorRole.WORKER, caches)
            self._worker.register_kv_caches(dict(zip(names, self.layers, strict=True)))
            self._scheduler = NixlConnector(config, KVConnectorRole.SCHEDULER, caches)
        # On a CPU it goes to the last core, to leave others to the engine; there both ends would share it.
        os.sched_setaffinity(0, cores)
        self._scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): self._worker.get_handshake_metadata()})
        self._engine_id: str = config.kv_transfer_config.engine_id
        self._num_blocks = num_blocks
        self._peer = ("", 0)
        self._ticket = ""

    def address(self) -> tuple[str, int]:
        """Return the engine's id and the side channel's port."""
        return self._engine_id, self._port

    def connect(self, address: tuple[str, int]) -> None:
        """Remember the other end; the first transfer connects."""
        self._peer = address

    def begin(self, size: int) -> str:
        """Hold blocks for the reader, as a finished prefill does; return the request's id."""
        self._ticket = f"{size}-{uuid4().hex}"
        step = NixlConnectorMetadata()
        step.reqs_in_batch = {self._ticket}
        step.reqs_to_send = {self._ticket: time.perf_counter() + LEASE_S}
        self._step(step)
        return self._ticket

    def fetch(self, size: int, ticket: str) -> None:
        """Read blocks from the other cache into this one."""
        blocks = self.blocks(size)
        engine_id, port = self._peer
        step = NixlConnectorMetadata()
        step.add_new_req_to_recv(
            ticket,
            (blocks,),
            {
                "remote_block_ids": (blocks,),
                "remote_engine_id": engine_id,
                "remote_request_id": ticket,
                "remote_host": HOST,
                "remote_port": port,
                "tp_size": 1,
            },
        )
        _, received = self._step(step)
        while ticket not in received:
            time.sleep(PAUSE_S)
            _, received = self._step(NixlConnectorMetadata())
        if missing := self._worker.get_block_ids_with_load_errors():
            raise BenchFailed(f"NixlConnector could not load {len(missing)} blocks")

    def finish(self) -> None:
        """Wait until the reader has said that it has the blocks."""
        while self._ticket not in self._step(NixlConnectorMetadata())[0]:
            time.sleep(PAUSE_S)

    def blocks(self, size: int) -> list[int]:
        """Return them in random places."""
        return random_blocks(size, self._num_blocks)

    def _step(self, metadata: NixlConnectorMetadata) -> tuple[set[str], set[str]]:
        """Do what an engine's step does; return the requests that were sent, and those received."""
        self._worker.bind_connector_metadata(metadata)
        self._worker.start_load_kv(None)
        finished: tuple[set[str], set[str]] = self._worker.get_finished(set())
        self._worker.clear_connector_metadata()
        return finished


def _config(device: str) -> VllmConfig:
    transfer = KVTransferConfig(
        kv_connector="NixlConnector",
        kv_role="kv_both",
        kv_buffer_device=device,
        # The ends' models are the same and lie in folders of their own.
        kv_connector_extra_config={"enforce_handshake_compat": False},
    )
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(_MODEL))
        return EngineArgs(
            model=model,
            skip_tokenizer_init=True,
            load_format="dummy",
            block_size=BLOCK_SIZE,
            enforce_eager=True,
            kv_transfer_config=transfer,
        ).create_engine_config()


def _cache_shape(config: VllmConfig, num_blocks: int) -> tuple[int, ...]:
    """Return the shape that an engine's model runner gives a layer's cache, and settle the layout."""
    backend = get_current_attn_backend(config)
    if hasattr(backend, "get_kv_cache_shape"):  # 0.24
        shape: tuple[int, ...] = backend.get_kv_cache_shape(num_blocks, BLOCK_SIZE, NUM_HEADS, HEAD_SIZE)
        return shape
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout

    layouts = [layout.name for layout in get_supported_kv_cache_layouts([backend])]
    resolve_kv_cache_layout(config, [layouts])
    return (num_blocks, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
