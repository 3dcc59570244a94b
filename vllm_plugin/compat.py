"""Everything that depends on how vLLM is made inside, for 0.24 and newer."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import vllm
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_events import ZmqEventPublisher
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from connectors.geometry import Geometry, Layout
from kvindex.errors import ConfigError
from vllm_plugin.tier_request import model_name

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = [
    "ENGINE",
    "KVConnectorBase_V1",
    "KVConnectorMetadata",
    "KVConnectorRole",
    "KVConnectorWorkerMetadata",
    "ScheduledRequest",
    "SupportsHMA",
    "block_size",
    "bytes_per_token",
    "cache_geometry",
    "cached_tokens_counter",
    "check_transfer",
    "event_endpoints",
    "followed_group",
    "model_identity",
    "preempted",
    "record_event",
    "report_new_copies_only",
    "scheduled",
    "tier_config",
]

ENGINE = f"vLLM {vllm.__version__}"

EVENTS_FLAG = """--kv-events-config '{"enable_kv_cache_events": true, "endpoint": "inproc://kvlane"}'"""


def followed_group(kv_cache_config: KVCacheConfig) -> int:
    """Return the index of the KV cache group that is indexed: the first with full attention in all layers."""
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        specs = spec.kv_cache_specs.values() if hasattr(spec, "kv_cache_specs") else (spec,)
        if all(isinstance(each, FullAttentionSpec) for each in specs):
            return index
    return 0


def block_size(kv_cache_config: KVCacheConfig) -> int:
    """Return the tokens per block of the KV cache group that is indexed."""
    group = kv_cache_config.kv_cache_groups[followed_group(kv_cache_config)]
    size: int = group.kv_cache_spec.block_size
    return size


def bytes_per_token(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Return the KV bytes of one token over all layers and tensor-parallel ranks."""
    total_bytes = 0
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        # A spec that unites several layers' specs has the bytes of them all, any other those of one layer.
        num_layers = 1 if hasattr(spec, "kv_cache_specs") else len(group.layer_names)
        total_bytes += spec.page_size_bytes * num_layers // spec.block_size
    return total_bytes * int(vllm_config.parallel_config.tensor_parallel_size)


def report_new_copies_only(request: Request) -> None:
    """Keep vLLM from reporting blocks as stored that the request only reuses; they would be counted twice."""
    if getattr(request, "kv_cache_report_mode", None) is not None:
        request.kv_cache_report_mode = "incremental"


def cached_tokens_counter(
    block_pool: BlockPool, block_size: int, group_index: int = 0
) -> Callable[[Request], int]:
    """Return a function that tells how many leading tokens of a new request are in the device cache.

    It looks up a logarithmic number of blocks, as prefixes have no holes but for a moment. For models whose
    groups have blocks of several sizes, whose hashes are finer than this group's blocks, it says 0.
    """

    def count(request: Request) -> int:
        if block_pool.hash_block_size != block_size:
            return 0
        num_blocks = bisect_left(
            request.block_hashes,
            True,
            key=lambda block: block_pool.get_cached_block(block, [group_index]) is None,
        )
        return num_blocks * block_size

    return count


def event_endpoints(vllm_config: VllmConfig) -> tuple[str, str | None]:
    """Return where this rank's KV events, and replays of them, are read.

    Raises:
        ConfigError: there are no KV events, or none that this process can read.
    """
    if not vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError("kvlane needs prefix caching: remove --no-enable-prefix-caching")
    config = vllm_config.kv_events_config
    if config is None or not config.enable_kv_cache_events or config.publisher != "zmq":
        raise ConfigError(f"kvlane needs vLLM's KV events: add {EVENTS_FLAG}, or start with kvlane serve")
    # vLLM binds inproc, ipc and wildcard hosts, and connects to any other host: nobody can subscribe there.
    bound = config.endpoint.startswith(("inproc://", "ipc://", "tcp://*:"))
    if not bound or config.endpoint.endswith(":0"):
        raise ConfigError(
            f"kvlane cannot read the KV events of {config.endpoint}: use inproc://NAME or tcp://*:PORT"
        )
    rank = vllm_config.parallel_config.data_parallel_index
    endpoint, replay = (
        ZmqEventPublisher.offset_endpoint_port(each, rank)
        for each in (config.endpoint, config.replay_endpoint)
    )
    return _from_here(endpoint), _from_here(replay) if replay else None


def _from_here(endpoint: str) -> str:
    return endpoint.replace("tcp://*:", "tcp://127.0.0.1:")


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """What one step computes of one request."""

    request_id: str
    block_ids: list[int]
    """Its physical blocks: all of them, or those that are new."""
    are_all_blocks: bool
    num_computed_tokens: int
    num_scheduled_tokens: int


def scheduled(output: SchedulerOutput) -> Iterator[ScheduledRequest]:
    """Yield what a step computes, for engines with one KV cache group."""
    for new in output.scheduled_new_reqs:
        num = output.num_scheduled_tokens[new.req_id]
        yield ScheduledRequest(new.req_id, list(new.block_ids[0]), True, new.num_computed_tokens, num)
    cached = output.scheduled_cached_reqs
    for request_id, blocks, num_computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        yield ScheduledRequest(
            request_id,
            list(blocks[0]) if blocks else [],
            request_id in cached.resumed_req_ids,
            num_computed,
            output.num_scheduled_tokens[request_id],
        )


def preempted(output: SchedulerOutput) -> set[str]:
    """Return the requests that lose their blocks with this step."""
    return output.preempted_req_ids or set()


def model_identity(vllm_config: VllmConfig) -> str:
    """Return what must be equal for two engines' KV to mean the same."""
    model = vllm_config.model_config
    name = model.served_model_name or model.model
    name = name[0] if isinstance(name, list) else name
    return f"{name}, quantisation {model.quantization or 'none'}, revision {model.revision or 'none'}"


def tier_config(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, address: str) -> VllmConfig:
    """Return what LMCache's connector is to know of this engine.

    Args:
        address: `host:port` of its server.
    """
    host, _, port = address.rpartition(":")
    given = vllm_config.kv_transfer_config.kv_connector_extra_config
    transfer = copy(vllm_config.kv_transfer_config)
    transfer.kv_connector_extra_config = {
        "lmcache.mp.host": f"tcp://{host}",
        "lmcache.mp.port": int(port),
        # With its defaults a server that was killed holds requests up for minutes.
        "lmcache.mp.mq_timeout": 5,
        "lmcache.mp.heartbeat_interval": 1,
        # Disk and S3 are read while a request waits for its turn.
        "lmcache.mp.eager_prefetch": True,
        **{key: value for key, value in given.items() if key.startswith("lmcache.")},
    }
    model = copy(vllm_config.model_config)
    model.model = _tier_model(vllm_config, kv_cache_config)
    config = copy(vllm_config)
    config.kv_transfer_config = transfer
    config.model_config = model
    return config


def _tier_model(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    model = vllm_config.model_config
    spec = kv_cache_config.kv_cache_groups[followed_group(kv_cache_config)].kv_cache_spec
    is_packed = current_platform.is_cpu() and isinstance(spec, FullAttentionSpec)
    served = model.served_model_name or model.model
    architecture = model.hf_config.to_dict()
    architecture.pop("_name_or_path", None)
    directory = Path(model.model)
    traits = (
        str(model.dtype),
        str(vllm_config.cache_config.cache_dtype),
        str(model.quantization),
        json.dumps(architecture, sort_keys=True, default=str),
        # Chunks are made of blocks as they are.
        str(block_size(kv_cache_config)),
        _packing(vllm_config, spec) if is_packed else "",
        "" if directory.is_dir() else f"{model.model} {model.revision}",
    )
    return model_name(
        served[0] if isinstance(served, list) else served, traits, directory if directory.is_dir() else None
    )


def check_transfer(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raise if KV cannot be moved to or from this engine.

    Raises:
        ConfigError: it cannot; the message says what to change.
    """
    off = "or remove kvlane.transfer_port"
    if len(kv_cache_config.kv_cache_groups) != 1:
        raise ConfigError(
            f"the model has {len(kv_cache_config.kv_cache_groups)} KV cache groups, and KV of one is moved: "
            f"add --disable-hybrid-kv-cache-manager, {off}"
        )
    if vllm_config.parallel_config.pipeline_parallel_size != 1:
        raise ConfigError(f"KV is not moved between pipeline stages: set --pipeline-parallel-size 1, {off}")
    if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
        raise ConfigError(
            'a transfer may fail: set "kv_load_failure_policy": "recompute" in --kv-transfer-config, ' + off
        )


def cache_geometry(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, kv_caches: dict[str, torch.Tensor]
) -> tuple[Geometry, list[torch.Tensor]]:
    """Return what this rank's cache is, and its tensors with their axes in the order of memory.

    Raises:
        ConfigError: the tensors are like none that we know.
    """
    group = kv_cache_config.kv_cache_groups[0]
    spec = group.kv_cache_spec
    layers = [kv_caches[name] for name in group.layer_names if name in kv_caches]
    is_mla = isinstance(spec, MLAAttentionSpec)
    axes = _axes(layers[0], spec.block_size, is_mla=is_mla)
    layers = [layer.permute(_memory_order(layer)) for layer in layers]
    # The CPU's kernels order the numbers of a head of a block as suits them.
    is_packed = layers[0].device.type == "cpu" and not is_mla
    try:
        layout = Layout.PACKED if is_packed else Layout(axes)
    except ValueError as error:
        raise ConfigError(
            f"KV caches of shape {tuple(layers[0].shape)} and axes {axes} cannot be moved: remove "
            "kvlane.transfer_port"
        ) from error
    geometry = Geometry(
        layout=layout,
        num_layers=len(layers),
        block_size=spec.block_size,
        num_heads=1 if is_mla else vllm_config.model_config.get_total_num_kv_heads(),
        head_size=spec.head_size,
        dtype=str(layers[0].dtype).removeprefix("torch."),
        itemsize=layers[0].element_size(),
        packing=_packing(vllm_config, spec) if is_packed else "",
        tp_rank=get_tensor_model_parallel_rank(),
        tp_size=vllm_config.parallel_config.tensor_parallel_size,
    )
    return geometry, layers


def record_event() -> torch.cuda.Event | None:
    """Return an event behind what was enqueued on this thread's GPU stream, or None without a GPU.

    Who waits for it sleeps.
    """
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _axes(layer: torch.Tensor, block_size: int, *, is_mla: bool) -> str:
    """Name a layer's axes in the order of memory, as `connectors.geometry` does.

    0.24 hands over (2, B, T, H, D) or (B, 2, T, H, D), 0.32 (B, H, T, 2 * D), and both (B, T, D) for MLA; how
    they lie in memory is told by their strides.
    """
    if is_mla:
        return "BTD"
    match layer.dim():
        case 5:
            logical = ("KB" if layer.shape[0] == 2 else "BK") + "THD"
        case 4:
            logical = "BHTX"
        case _:
            return ""
    if layer.shape[logical.index("T")] != block_size:
        return ""
    return "".join(logical[axis] for axis in _memory_order(layer)).replace("X", "KD")


def _memory_order(layer: torch.Tensor) -> list[int]:
    """Return a tensor's axes, the outermost in memory first."""
    strides = layer.stride()
    return sorted(range(layer.dim()), key=lambda axis: strides[axis], reverse=True)


def _packing(vllm_config: VllmConfig, spec: FullAttentionSpec) -> str:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(_get_attn_isa(spec.dtype, spec.block_size, spec.head_size))
