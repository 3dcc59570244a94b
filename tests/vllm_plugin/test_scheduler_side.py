"""What the connector reads of vLLM's own objects, made without an engine."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.config import KVEventsConfig, KVTransferConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

from kvindex.errors import ConfigError
from kvindex.memory_index import MemoryIndex, MemoryIndexWriter
from tests.support.vllm_engine import tiny_model
from tests.support.waiting import eventually
from vllm_plugin import compat, scheduler_side
from vllm_plugin.compat import KVConnectorRole
from vllm_plugin.connector import KvlaneConnector
from vllm_plugin.plugin import CONNECTOR_MODULE, CONNECTOR_NAME, register
from vllm_plugin.scheduler_side import SchedulerSide

BLOCK_SIZE = 32
NUM_BLOCKS = 24


def vllm_config(
    *, extra: dict[str, Any] | None = None, events: KVEventsConfig | None = None, **engine: Any
) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    transfer = KVTransferConfig(
        kv_connector=CONNECTOR_NAME,
        kv_connector_module_path=CONNECTOR_MODULE,
        kv_role="kv_both",
        kv_connector_extra_config={"kvlane.endpoint": "10.0.0.7:8000"} if extra is None else extra,
    )
    arguments = EngineArgs(
        model=str(tiny_model()),
        served_model_name=["tiny", "alias"],
        max_model_len=4096,
        block_size=BLOCK_SIZE,
        enforce_eager=True,
        kv_transfer_config=transfer,
        kv_events_config=events
        or KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint="inproc://kvlane"),
        **engine,
    )
    return arguments.create_engine_config()


def kv_cache_config() -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
    layers = [f"layers.{index}.attn" for index in range(4)]
    return KVCacheConfig(
        num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(layers, spec)]
    )


@pytest.fixture(scope="module")
def config() -> Any:
    return vllm_config()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryIndex]:
    index = MemoryIndex()
    monkeypatch.setattr(scheduler_side, "RedisIndexWriter", lambda config: MemoryIndexWriter(index))
    return index


def test_the_worker_is_what_vllm_was_configured_to_be(config: Any):
    worker = SchedulerSide(config, kv_cache_config()).worker
    assert (worker.endpoint, worker.model, worker.worker_id) == ("10.0.0.7:8000", "tiny", "10.0.0.7:8000")
    assert (worker.block_size, worker.num_blocks, worker.max_model_len) == (BLOCK_SIZE, NUM_BLOCKS, 4096)
    # 4 layers, K and V, 2 heads of 32 bfloat16 numbers.
    assert worker.bytes_per_token == 4 * 2 * 2 * 32 * 2
    assert worker.max_num_batched_tokens == config.scheduler_config.max_num_batched_tokens
    assert worker.engine.startswith("vLLM 0.")
    assert worker.incarnation != SchedulerSide(config, kv_cache_config()).worker.incarnation


def test_the_worker_says_where_it_sends_kv_if_it_does():
    assert SchedulerSide(vllm_config(), kv_cache_config()).worker.transfer_address == ""
    extra = {"kvlane.endpoint": "10.0.0.7:8000", "kvlane.transfer_port": 5600}
    worker = SchedulerSide(vllm_config(extra=extra), kv_cache_config()).worker
    assert (worker.transfer_address, worker.tp_size) == ("10.0.0.7:5600", 1)


def test_the_endpoint_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVLANE_ENDPOINT", "10.0.0.8:8000")
    assert SchedulerSide(vllm_config(extra={}), kv_cache_config()).worker.endpoint == "10.0.0.8:8000"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": {}}, "KVLANE_ENDPOINT"),
        ({"extra": {"kvlane.endpont": "a:1"}}, "endpont"),
        ({"events": KVEventsConfig(enable_kv_cache_events=False)}, "--kv-events-config"),
        ({"events": KVEventsConfig(enable_kv_cache_events=True, publisher="null")}, "--kv-events-config"),
        (
            {"events": KVEventsConfig(enable_kv_cache_events=True, endpoint="tcp://10.0.0.9:5557")},
            r"tcp://\*:PORT",
        ),
        ({"events": KVEventsConfig(enable_kv_cache_events=True, endpoint="tcp://*:0")}, r"tcp://\*:PORT"),
        ({"enable_prefix_caching": False}, "--no-enable-prefix-caching"),
    ],
)
def test_what_cannot_be_published_is_named_with_its_cure(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        SchedulerSide(vllm_config(**options), kv_cache_config())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "replay", "rank", "expected"),
    [
        ("inproc://kvlane", None, 0, ("inproc://kvlane", None)),
        ("inproc://kvlane", None, 2, ("inproc://kvlane_dp2", None)),
        ("tcp://*:5557", "tcp://*:5657", 0, ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5657")),
        ("tcp://*:5557", "tcp://*:5657", 3, ("tcp://127.0.0.1:5560", "tcp://127.0.0.1:5660")),
    ],
)
def test_events_are_read_where_vllm_publishes_them(
    config: Any,
    monkeypatch: pytest.MonkeyPatch,
    endpoint: str,
    replay: str | None,
    rank: int,
    expected: tuple[str, str | None],
):
    events = KVEventsConfig(
        enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint, replay_endpoint=replay
    )
    monkeypatch.setattr(config, "kv_events_config", events)
    monkeypatch.setattr(config.parallel_config, "data_parallel_index", rank)
    assert compat.event_endpoints(config) == expected


class Request:
    """As much of a vLLM request as is read."""

    def __init__(self, request_id: str, block_hashes: list[bytes], num_prompt_tokens: int) -> None:
        self.request_id = request_id
        self.block_hashes = block_hashes
        self.num_prompt_tokens = self.num_tokens = num_prompt_tokens
        self.num_computed_tokens = 0
        self.status = type("Status", (), {"name": "WAITING"})


def pool_with(hashes: list[bytes]) -> BlockPool:
    pool = BlockPool(num_gpu_blocks=NUM_BLOCKS, enable_caching=True, hash_block_size=BLOCK_SIZE)
    for block, block_hash in zip(pool.get_new_blocks(len(hashes)), hashes, strict=True):
        pool._insert_block_hash(make_block_hash_with_group_id(block_hash, 0), block, num_tokens=BLOCK_SIZE)
    return pool


def test_of_a_hybrid_model_the_group_with_full_attention_is_indexed():
    window = SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=32, dtype=torch.bfloat16, sliding_window=64
    )
    (full,) = kv_cache_config().kv_cache_groups
    groups = [KVCacheGroupSpec(["a"], window), KVCacheGroupSpec(["b"], window), full]
    config = KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)
    assert (compat.followed_group(config), compat.block_size(config)) == (2, BLOCK_SIZE)
    config = KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups[:2])
    assert compat.followed_group(config) == 0


def test_a_request_does_not_have_reused_blocks_reported_as_stored():
    request = Request("a", [], 1)
    compat.report_new_copies_only(request)
    assert not hasattr(request, "kv_cache_report_mode")
    request.kv_cache_report_mode = "full"
    compat.report_new_copies_only(request)
    assert request.kv_cache_report_mode == "incremental"


@pytest.mark.parametrize("num_cached", range(6))
def test_cached_tokens_of_a_new_request_are_found(num_cached: int):
    hashes = [bytes([index]) * 32 for index in range(5)]
    pool = pool_with(hashes[:num_cached])
    request = Request("a", hashes, 170)
    assert compat.cached_tokens_counter(pool, BLOCK_SIZE)(request) == num_cached * BLOCK_SIZE
    assert compat.cached_tokens_counter(pool, 2 * BLOCK_SIZE)(request) == 0
    assert compat.cached_tokens_counter(pool, BLOCK_SIZE, 1)(request) == 0


async def test_the_connector_registers_reports_and_leaves(config: Any, index: MemoryIndex):
    connector = KvlaneConnector(config, KVConnectorRole.SCHEDULER, kv_cache_config())
    pool = connector.scheduler_side.worker.pool
    assert index.live(pool) == []
    connector.bind_gpu_block_pool(pool_with([]))
    await eventually(lambda: index.live(pool))
    (slot,) = index.live(pool)
    request = Request("cmpl-kv0123456789abcdef-0", [], 100)
    connector.on_new_request(request)
    await eventually(lambda: slot.load.waiting_prefill_tokens == 100)
    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    assert connector.request_finished_all_groups(request, ([],)) == (False, None)
    await eventually(lambda: slot.load.waiting_requests == 0)
    connector.shutdown()
    assert index.live(pool) == []


def test_the_worker_role_publishes_nothing(config: Any, index: MemoryIndex):
    connector = KvlaneConnector(config, KVConnectorRole.WORKER, kv_cache_config())
    connector.bind_gpu_block_pool(pool_with([]))
    connector.shutdown()
    assert index.known_pools() == []


def test_vllm_finds_the_connector_by_name_and_by_module_path(config: Any):
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    register()
    register()
    by_name = KVTransferConfig(kv_connector=CONNECTOR_NAME, kv_role="kv_both")
    assert KVConnectorFactory.get_connector_class(by_name) is KvlaneConnector
    assert KVConnectorFactory.get_connector_class(config.kv_transfer_config) is KvlaneConnector


def test_the_flag_in_the_message_is_one_that_vllm_takes():
    value = compat.EVENTS_FLAG.split(" ", 1)[1].strip("'")
    assert KVEventsConfig(**json.loads(value)).publisher == "zmq"


class TestTransferIsPossible:
    """An engine that cannot move KV says at its start why, and what to change."""

    @pytest.mark.parametrize(
        ("policy", "groups", "message"),
        [
            ("fail", 1, r'"kv_load_failure_policy": "recompute"'),
            ("recompute", 2, "2 KV cache groups.*--disable-hybrid-kv-cache-manager"),
        ],
    )
    def test_or_it_is_refused(self, config: Any, policy: str, groups: int, message: str):
        config = copy.deepcopy(config)
        config.kv_transfer_config.kv_load_failure_policy = policy
        caches = kv_cache_config()
        caches.kv_cache_groups *= groups
        with pytest.raises(ConfigError, match=message):
            compat.check_transfer(config, caches)

    @pytest.mark.parametrize(
        ("tensor", "axes"),
        [
            (torch.zeros(2, 9, BLOCK_SIZE, 2, 32), "KBTHD"),
            (torch.zeros(2, 9, 2, BLOCK_SIZE, 32).transpose(2, 3), "KBHTD"),
            (torch.zeros(9, 2, BLOCK_SIZE, 4, 32), "BKTHD"),
            (torch.zeros(9, 2, BLOCK_SIZE, 64), "BHTKD"),
            (torch.zeros(9, BLOCK_SIZE, 2, 64).transpose(1, 2), "BTHKD"),
            (torch.zeros(9, BLOCK_SIZE, 4, 4, 4, 4), ""),
        ],
    )
    def test_the_axes_of_a_cache_are_told_by_shape_and_strides(self, tensor: torch.Tensor, axes: str):
        assert compat._axes(tensor, BLOCK_SIZE, is_mla=False) == axes
