"""The connector's part in a worker's process: carries out what the scheduler says of transfers and tiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from connectors.kv_cache import KVCache
from connectors.mover import KVMover
from connectors.pace import Moved
from kvindex import metrics
from vllm_plugin import compat
from vllm_plugin.config import worker_config
from vllm_plugin.holds import Holds
from vllm_plugin.metadata import KvlaneMetadata, WorkerReport

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_plugin.tier_worker import TierWorker


class WorkerSide:
    """One tensor-parallel rank's transfers, loads and stores; all on the worker's thread.

    Raises:
        ConfigError: the engine cannot move KV as it is configured; the message says what to change.
    """

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = worker_config(vllm_config)
        self._mover: KVMover | None = None
        self.tiers = self._tiers()
        self._metadata = KvlaneMetadata()
        self._finished: set[str] = set()
        """Requests that have ended, of those that were sent."""
        self._sent: set[str] = set()
        """Requests whose blocks nobody needs any more, but that run still."""
        self._sends: set[str] = set()
        self._missing: set[int] = set()
        self._moved: list[Moved] = []
        self._holds = Holds()
        self._fills = Holds()

    def _tiers(self) -> TierWorker | None:
        if not self._config.tiers:
            return None
        from vllm_plugin.tier_worker import TierWorker

        return TierWorker(self._vllm_config, self._kv_cache_config, self._config.tiers)

    def start(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Begin to move KV from and to these tensors, with other engines and with tiers."""
        if self.tiers is not None:
            self.tiers.start(kv_caches)
        if not self._config.transfer_port:
            return
        compat.check_transfer(self._vllm_config, self._kv_cache_config)
        geometry, layers = compat.cache_geometry(self._vllm_config, self._kv_cache_config, kv_caches)
        first_rank = self._vllm_config.parallel_config.data_parallel_index * geometry.tp_size
        self._mover = KVMover(
            compat.model_identity(self._vllm_config),
            KVCache(layers, geometry),
            self._config.model_copy(update={"transfer_port": self._config.transfer_port + first_rank}),
        )
        self._mover.start()
        if self._config.transfer_metrics_port:
            metrics_port = self._config.transfer_metrics_port + first_rank + geometry.tp_rank
            metrics.serve(self._config.metrics_host, metrics_port, self._config.metrics_tls)

    def stop(self) -> None:
        """End every transfer, load and store. Idempotent."""
        if self.tiers is not None:
            self.tiers.stop()
        if self._mover is not None:
            self._mover.stop()

    def before_step(self, metadata: KvlaneMetadata) -> None:
        """Finish what reads blocks that the step takes from their requests."""
        if self.tiers is not None:
            self.tiers.before_step(metadata.tiers)

    def begin_step(self, metadata: KvlaneMetadata) -> None:
        """Heed a step's news, before the step writes to any block."""
        self._holds.add(metadata.held_twice)
        self._fills.add(metadata.filled_twice)
        if self.tiers is not None:
            self.tiers.begin_step(metadata.tiers)
        if self._mover is None:
            return
        self._metadata = metadata
        for transfer_id in metadata.suspended:
            self._mover.suspend(transfer_id)
        for transfer_id in metadata.aborted:
            self._mover.abort_send(transfer_id)
        for transfer_id in metadata.cancelled:
            self._mover.cancel_receive(transfer_id)
        for send in metadata.sends:
            self._sends.add(send.request_id)
            self._mover.open_send(send.request_id, send.transfer_id, send.num_tokens)
        # With async scheduling the steps before this one may be on the GPU still.
        event = compat.record_event() if metadata.computed else None
        for step in metadata.computed:
            if step.num_tokens_before:
                self._mover.computed(step.transfer_id, step.block_ids, step.num_tokens_before, event)
        for receive in metadata.receives:
            self._mover.receive(
                receive.request_id,
                receive.params,
                receive.block_ids,
                range(receive.first_token, receive.num_tokens),
            )

    def load(self, context: ForwardContext) -> None:
        """Have blocks filled from tiers that the step does not use."""
        if self.tiers is not None:
            self.tiers.load(context)

    def clear_step(self) -> None:
        """Forget the step's news."""
        if self.tiers is not None:
            self.tiers.clear_step()

    def end_step(self) -> None:
        """Let go what the step has computed. On a GPU, what it has enqueued."""
        if self.tiers is not None:
            self.tiers.end_step()
        if self._mover is None or not self._metadata.computed:
            return
        event = compat.record_event()
        for step in self._metadata.computed:
            self._mover.computed(step.transfer_id, step.block_ids, step.num_tokens_after, event)

    def take_finished(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        """Return the requests whose blocks are not needed any more, and those whose blocks were filled.

        Args:
            finished_request_ids: those that ended since the last call. Blocks of others are theirs still.
        """
        sent, received = self._take_transferred(finished_request_ids)
        if self.tiers is None:
            return sent, received
        stored, loaded = self.tiers.take_finished(finished_request_ids)
        return self._holds.release(sent, stored), self._fills.release(received, loaded)

    def _take_transferred(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        if self._mover is None:
            return set(), set()
        self._finished |= finished_request_ids & self._sends
        sends, receives = self._mover.take_ended()
        self._sent |= set(sends)
        sent = self._sent & self._finished
        self._sent -= sent
        self._finished -= sent
        self._sends -= sent
        self._moved += self._mover.take_moved()
        for missing in receives.values():
            self._missing |= missing
        return sent, set(receives)

    def take_failed(self) -> set[str]:
        """Return the requests that no tier could fill, of models whose blocks are of several groups."""
        return self.tiers.take_failed() if self.tiers is not None else set()

    def take_missing_blocks(self) -> set[int]:
        """Return the blocks that could not be filled, of the requests that `take_finished` named."""
        missing, self._missing = self._missing, set()
        return missing | self.tiers.take_missing_blocks() if self.tiers is not None else missing

    def take_report(self) -> WorkerReport | None:
        """Return what is new for the scheduler; None if nothing is."""
        tiers = self.tiers.take_worker_metadata() if self.tiers is not None else None
        if not self._moved and tiers is None:
            return None
        tp_size = self._vllm_config.parallel_config.tensor_parallel_size
        moved, self._moved = self._moved, []
        return WorkerReport(tuple(Moved(each.num_bytes * tp_size, each.seconds) for each in moved), tiers)
