"""`KvlaneConnector`, what vLLM loads: a facade that hands each call to the side it belongs to.

Source: vLLM 0.24 and 0.32 `vllm/distributed/kv_transfer/kv_connector/v1/base.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_plugin.compat import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole, SupportsHMA
from vllm_plugin.metadata import KvlaneMetadata, TransferReport
from vllm_plugin.scheduler_side import SchedulerSide
from vllm_plugin.worker_side import WorkerSide

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_plugin.transfer_scheduler import TransferScheduler


class KvlaneConnector(KVConnectorBase_V1, SupportsHMA):
    """Publishes the engine's cache and load to the global index, and moves KV between engines."""

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
    def _transfer(self) -> TransferScheduler | None:
        return self.scheduler_side.transfer if self.scheduler_side is not None else None

    @property
    def requires_kv_delivery(self) -> bool:
        """Whether finished requests may owe their KV to another engine."""
        return self._transfer is not None

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
        """Return how many tokens another engine will send, and that they come between steps."""
        num_tokens = self._transfer.num_external_tokens(request, num_computed_tokens) if self._transfer else 0
        return num_tokens, num_tokens > 0

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Have the blocks filled that were allocated for what another engine sends."""
        if self._transfer is not None:
            self._transfer.on_alloc(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return what the workers need to know of this step."""
        if self.scheduler_side is not None:
            self.scheduler_side.begin_step(scheduler_output)
        return (
            self._transfer.build_metadata(scheduler_output)
            if self._transfer is not None
            else KvlaneMetadata()
        )

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Note that a step has ended: after each, vLLM asks for events of ours, of which there are none."""
        if self.scheduler_side is not None:
            self.scheduler_side.end_step()
        return ()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Note the end of a request; its blocks are free at once, unless another engine waits for them."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Note the end of a request; its blocks are free at once, unless another engine waits for them."""
        if self.scheduler_side is not None:
            self.scheduler_side.request_finished(request)
        return self._transfer is not None and self._transfer.request_finished(request), None

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Learn what the workers tell of a step."""
        report = connector_output.kv_connector_worker_meta
        if self.scheduler_side is not None and isinstance(report, TransferReport):
            self.scheduler_side.on_transfers(report)

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Begin to move KV from and to these tensors."""
        if self.worker_side is not None:
            self.worker_side.start(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take a step's news; it has not written to any block yet."""
        super().bind_connector_metadata(connector_metadata)
        if self.worker_side is not None:
            self.worker_side.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:  # noqa: ANN401 - upstream's
        """Do nothing: KV is loaded between steps."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: KV is loaded between steps."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,  # noqa: ANN401 - upstream's
    ) -> None:
        """Do nothing: KV is sent when the step is done."""

    def wait_for_save(self) -> None:
        """Let what the step has computed be sent; nothing is waited for."""
        if self.worker_side is not None:
            self.worker_side.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return the requests whose blocks are not needed any more, and those whose blocks were filled."""
        return (
            self.worker_side.take_finished(finished_req_ids) if self.worker_side is not None else (None, None)
        )

    def build_connector_worker_meta(self) -> TransferReport | None:
        """Return what the scheduler is told of a step."""
        return self.worker_side.take_report() if self.worker_side is not None else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that could not be filled and must be computed here."""
        return self.worker_side.take_missing_blocks() if self.worker_side is not None else set()
