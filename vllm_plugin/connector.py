"""`KvlaneConnector`, what vLLM loads: a facade that hands each call to the side it belongs to.

Source: vLLM 0.24 and 0.32 `vllm/distributed/kv_transfer/kv_connector/v1/base.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_plugin.compat import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole, SupportsHMA
from vllm_plugin.config import worker_config
from vllm_plugin.metadata import KvlaneMetadata, WorkerReport
from vllm_plugin.scheduler_side import SchedulerSide
from vllm_plugin.worker_side import WorkerSide

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent, KVConnectorKVEvents
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorTransferResults,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_plugin.tier_scheduler import TierScheduler
    from vllm_plugin.tier_worker import TierWorker


class KvlaneConnector(KVConnectorBase_V1, SupportsHMA):
    """Publishes the engine's cache and load to the global index; moves KV between engines, and to tiers."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.scheduler_side = (
            SchedulerSide(vllm_config, kv_cache_config) if role is KVConnectorRole.SCHEDULER else None
        )
        self.worker_side = (
            WorkerSide(vllm_config, kv_cache_config) if role is KVConnectorRole.WORKER else None
        )

    @property
    def requires_kv_delivery(self) -> bool:
        """Whether finished requests may owe their KV to another engine."""
        return self.scheduler_side is not None and self.scheduler_side.transfer is not None

    # Scheduler side

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Begin to publish: the scheduler is complete."""
        if self.scheduler_side is not None:
            self.scheduler_side.start(gpu_block_pool)

    def shutdown(self) -> None:
        """Stop publishing, and moving KV."""
        if self.scheduler_side is not None:
            self.scheduler_side.stop()
        if self.worker_side is not None:
            self.worker_side.stop()

    def on_new_request(self, request: Request) -> None:
        """Note a request that the engine has taken."""
        if self.scheduler_side is not None:
            self.scheduler_side.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many tokens come from another engine or a tier, and that they come between steps."""
        if self.scheduler_side is None:
            return 0, False
        num_tokens = self.scheduler_side.num_external_tokens(request, num_computed_tokens)
        return num_tokens, bool(num_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Have the blocks filled that were allocated for what comes from elsewhere."""
        if self.scheduler_side is not None:
            self.scheduler_side.on_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return what the workers need to know of this step."""
        if self.scheduler_side is None:
            return KvlaneMetadata()
        return self.scheduler_side.begin_step(scheduler_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Note the end of a request; its blocks are free at once, unless they are to be sent or stored."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Note the end of a request; its blocks are free at once, unless they are to be sent or stored."""
        if self.scheduler_side is None:
            return False, None
        return self.scheduler_side.request_finished(request, block_ids)

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Return what the tiers add to the engine's KV events; vLLM asks after each step, which has ended."""
        if self.scheduler_side is not None:
            self.scheduler_side.end_step()
        return self._tiers.take_events() if self._tiers is not None else ()

    def has_pending_push_work(self) -> bool:
        """Whether the engine must go on stepping for stores under way."""
        return self._tiers is not None and self._tiers.has_pending_push_work()

    def reset_cache(self) -> bool | None:
        """Have the tiers drop what nobody uses; None where there are none."""
        return self._tiers.reset() if self._tiers is not None else None

    @property
    def _tiers(self) -> TierScheduler | None:
        return self.scheduler_side.tiers if self.scheduler_side is not None else None

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Learn what the workers tell of a step."""
        if self.scheduler_side is not None:
            self.scheduler_side.update(connector_output)

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Begin to move KV from and to these tensors."""
        if self.worker_side is not None:
            self.worker_side.start(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Finish what reads blocks that this step takes from their requests."""
        if self.worker_side is not None:
            self.worker_side.before_step(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take a step's news; it has not written to any block yet."""
        super().bind_connector_metadata(connector_metadata)
        if self.worker_side is not None:
            self.worker_side.begin_step(connector_metadata)

    def clear_connector_metadata(self) -> None:
        """Forget a step's news."""
        super().clear_connector_metadata()
        if self.worker_side is not None:
            self.worker_side.clear_step()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:  # noqa: ANN401 - upstream's
        """Have blocks filled from tiers; this step does not use them."""
        if self.worker_side is not None:
            self.worker_side.load(forward_context)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: KV is loaded between steps."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,  # noqa: ANN401 - upstream's
    ) -> None:
        """Do nothing: KV is sent and stored when the step is done."""

    def wait_for_save(self) -> None:
        """Let what the step has computed be sent and stored; nothing is waited for."""
        if self.worker_side is not None:
            self.worker_side.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return the requests whose blocks are not needed any more, and those whose blocks were filled."""
        return (
            self.worker_side.take_finished(finished_req_ids) if self.worker_side is not None else (None, None)
        )

    if hasattr(KVConnectorBase_V1, "get_transfer_results"):

        def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
            """Return the same, and the requests of which nothing could be filled."""
            results = super().get_transfer_results(finished_req_ids)
            if self.worker_side is not None:
                results.failed_recving |= self.worker_side.take_failed()
            return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that could not be filled and must be computed here."""
        return self.worker_side.take_missing_blocks() if self.worker_side is not None else set()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Return what the tiers measured since the last call."""
        return self._tier_worker.take_stats() if self._tier_worker is not None else None

    def get_kv_connector_kv_cache_events(self) -> KVConnectorKVEvents | None:
        """Return what the tiers stored and dropped since the last call."""
        return self._tier_worker.take_events() if self._tier_worker is not None else None

    def build_connector_worker_meta(self) -> WorkerReport | None:
        """Return what the scheduler is told of a step."""
        return self.worker_side.take_report() if self.worker_side is not None else None

    @property
    def _tier_worker(self) -> TierWorker | None:
        return self.worker_side.tiers if self.worker_side is not None else None

    # Metrics

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Return the tiers' statistics; only they have any."""
        from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector

        stats: KVConnectorStats | None = LMCacheMPConnector.build_kv_connector_stats(data)
        return stats

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """Return what shows the tiers' statistics in vLLM's metrics; None without tiers."""
        if not worker_config(vllm_config).tiers:
            return None
        from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector

        metrics: KVConnectorPromMetrics | None = LMCacheMPConnector.build_prom_metrics(
            vllm_config, metric_types, labelnames, per_engine_labelvalues
        )
        return metrics
