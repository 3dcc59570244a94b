"""Everything that depends on how vLLM is made inside, for 0.24 and newer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING

import vllm
from vllm.distributed.kv_events import ZmqEventPublisher
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvindex.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = [
    "ENGINE",
    "KVConnectorBase_V1",
    "KVConnectorMetadata",
    "KVConnectorRole",
    "SupportsHMA",
    "block_size",
    "bytes_per_token",
    "cached_tokens_counter",
    "event_endpoints",
    "followed_group",
    "report_new_copies_only",
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
