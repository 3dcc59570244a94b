"""`KvlaneConnector`, what vLLM loads: a facade that hands each call to the side it belongs to.

Source: vLLM 0.24 and 0.32 `vllm/distributed/kv_transfer/kv_connector/v1/base.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_plugin.compat import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole, SupportsHMA
from vllm_plugin.scheduler_side import SchedulerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class KvlaneMetadata(KVConnectorMetadata):
    """What a step's scheduler tells its workers: nothing, while no KV is moved."""


class KvlaneConnector(KVConnectorBase_V1, SupportsHMA):
    """Publishes the engine's cache and load to the global index. It moves no KV."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.scheduler_side = (
            SchedulerSide(vllm_config, kv_cache_config) if role is KVConnectorRole.SCHEDULER else None
        )

    @property
    def requires_kv_delivery(self) -> bool:
        """Whether finished requests owe their KV to another engine."""
        return False

    # Scheduler side

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Begin to publish: the scheduler is complete."""
        if self.scheduler_side is not None:
            self.scheduler_side.start(gpu_block_pool)

    def shutdown(self) -> None:
        """Stop publishing."""
        if self.scheduler_side is not None:
            self.scheduler_side.stop()

    def on_new_request(self, request: Request) -> None:
        """Note a request that the engine has taken."""
        if self.scheduler_side is not None:
            self.scheduler_side.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return that nothing can be loaded from elsewhere."""
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Do nothing: no blocks are to be filled."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return what the workers need to know of this step."""
        return KvlaneMetadata()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Note the end of a request; its blocks are free at once."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Note the end of a request; its blocks are free at once."""
        if self.scheduler_side is not None:
            self.scheduler_side.request_finished(request)
        return False, None

    # Worker side

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:  # noqa: ANN401 - upstream's
        """Do nothing: no KV is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: no KV is loaded."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,  # noqa: ANN401 - upstream's
    ) -> None:
        """Do nothing: no KV is saved."""

    def wait_for_save(self) -> None:
        """Do nothing: no KV is saved."""
