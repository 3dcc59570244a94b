"""What a worker's part makes of a step's news, without an engine."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

from connectors.bench.ports import free_ports
from kvindex.errors import ConfigError
from vllm_plugin import compat
from vllm_plugin.metadata import Computed, KvlaneMetadata
from vllm_plugin.worker_side import WorkerSide

SHAPE = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
FULL = KVCacheGroupSpec(["layers.0.attn"], FullAttentionSpec(**SHAPE))
SLIDING = KVCacheGroupSpec(["layers.1.attn"], SlidingWindowSpec(sliding_window=128, **SHAPE))


def worker_side(*groups: KVCacheGroupSpec, **differences: Any) -> WorkerSide:
    extra = {"kvlane.endpoint": "10.0.0.7:8000", "kvlane.transfer_port": free_ports(1)[0]}
    transfer = {"kv_load_failure_policy": "recompute", "kv_connector_extra_config": extra}
    config: Any = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            **{name: differences.pop(name, value) for name, value in transfer.items()}
        ),
        parallel_config=SimpleNamespace(**{"pipeline_parallel_size": 1} | differences),
    )
    return WorkerSide(config, KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[*groups]))


@pytest.mark.parametrize(
    ("groups", "differences", "message"),
    [
        ((FULL, SLIDING), {}, "2 KV cache groups.*--disable-hybrid-kv-cache-manager"),
        ((FULL,), {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 1"),
        ((FULL,), {"kv_load_failure_policy": "fail"}, '"kv_load_failure_policy": "recompute"'),
    ],
)
def test_an_engine_that_cannot_move_kv_says_what_to_change(
    groups: tuple[KVCacheGroupSpec, ...], differences: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=f"{message}.*kvlane.transfer_port"):
        worker_side(*groups, **differences).start({})


def test_blocks_are_read_behind_the_work_that_fills_them(monkeypatch: pytest.MonkeyPatch):
    """Also those of the steps before: with async scheduling they may be under way when the next begins."""
    events = iter(["before the step", "behind the step"])
    monkeypatch.setattr(compat, "record_event", lambda: next(events))
    side, mover = worker_side(FULL), Mock()
    side._mover = mover
    side.begin_step(KvlaneMetadata(computed=[Computed("id", [4, 5], 32, 64)]))
    side.end_step()
    assert mover.computed.call_args_list == [
        call("id", [4, 5], 32, "before the step"),
        call("id", [4, 5], 64, "behind the step"),
    ]


def test_blocks_that_a_transfer_and_a_tier_fill_are_filled_when_both_say_so():
    side, mover, tiers = worker_side(FULL), Mock(), Mock()
    side._mover, side.tiers = mover, tiers
    mover.take_moved.return_value = []
    side.begin_step(KvlaneMetadata(filled_twice={"both"}))
    steps = [({"both": {7}, "received": set()}, {"loaded"}), ({}, {"both"})]
    filled = []
    for received, loaded in steps:
        mover.take_ended.return_value = ({}, received)
        tiers.take_finished.return_value = (set(), loaded)
        filled.append(side.take_finished(set())[1])
    assert filled == [{"received", "loaded"}, {"both"}]
