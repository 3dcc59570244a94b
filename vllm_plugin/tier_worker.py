"""Tiers in a worker's process: LMCache's connector as a child.

Source: LMCache 0.5.6 `lmcache/integration/vllm/lmcache_mp_connector.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog
from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector

from vllm_plugin import compat
from vllm_plugin.compat import KVConnectorRole

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVConnectorKVEvents
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.kv_cache_interface import KVCacheConfig

_log = structlog.get_logger(__name__)


class TierWorker:
    """One rank's loads and stores; all on the worker's thread."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, address: str) -> None:
        child_config = compat.tier_config(vllm_config, kv_cache_config, address)
        self._child: Any = LMCacheMPConnector(child_config, KVConnectorRole.WORKER, kv_cache_config)
        adapter = self._child.worker_adapter
        # The adapter's own loops over the requests of a step call these.
        adapter.submit_store_request = _patient(adapter, adapter.submit_store_request)
        adapter.submit_retrieve_request = _patient(adapter, adapter.submit_retrieve_request)

    def start(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Show the server these tensors."""
        self._child.register_kv_caches(kv_caches)

    def stop(self) -> None:
        """Let go of the server."""
        self._child.shutdown()

    def before_step(self, metadata: Any) -> None:  # noqa: ANN401 - LMCache's
        """Finish what reads blocks that this step takes from their requests."""
        self._child.handle_preemptions(metadata)

    def begin_step(self, metadata: Any) -> None:  # noqa: ANN401 - LMCache's
        """Take a step's news."""
        self._child.bind_connector_metadata(metadata)

    def load(self, context: ForwardContext) -> None:
        """Have blocks filled that the step does not use."""
        self._child.start_load_kv(context)

    def end_step(self) -> None:
        """Have stored what the step has computed."""
        self._child.wait_for_save()

    def clear_step(self) -> None:
        """Forget the step's news."""
        self._child.clear_connector_metadata()

    def take_finished(self, finished_request_ids: set[str]) -> tuple[set[str], set[str]]:
        """Return the ended requests whose blocks are stored, and the requests whose blocks were filled."""
        stored, loaded = self._child.get_finished(finished_request_ids)
        return set(stored or ()), set(loaded or ())

    def take_failed(self) -> set[str]:
        """Return the requests that could not be loaded, of models whose blocks are of several groups."""
        adapter = self._child.worker_adapter
        return set(adapter.get_failed_request_ids()) if self._child._report_request_errors else set()

    def take_missing_blocks(self) -> set[int]:
        """Return the blocks that could not be filled, of the requests that `take_finished` named."""
        return set(self._child.get_block_ids_with_load_errors())

    def take_stats(self) -> KVConnectorStats | None:
        """Return what LMCache measured since the last call."""
        stats: KVConnectorStats | None = self._child.get_kv_connector_stats()
        return stats

    def take_events(self) -> KVConnectorKVEvents | None:
        """Return what LMCache stored and dropped since the last call."""
        events: KVConnectorKVEvents | None = self._child.get_kv_connector_kv_cache_events()
        return events

    def take_worker_metadata(self) -> KVConnectorWorkerMetadata | None:
        """Return what LMCache's scheduler side is to know."""
        metadata: KVConnectorWorkerMetadata | None = self._child.build_connector_worker_meta()
        return metadata


def _patient(adapter: Any, submit: Callable[..., None]) -> Callable[..., None]:  # noqa: ANN401 - LMCache's
    """Return a `submit` that takes a server that does not answer in time for one that is gone.

    LMCache's own raises then, which would end the engine. A server that was killed and is back before the
    adapter's heartbeat has noticed never answers: the heartbeat shows it the caches only after it was gone.

    Args:
        adapter: whose heartbeat it is. While that says the server is gone, nothing is stored, and loads fail.
        submit: `submit_store_request` or `submit_retrieve_request` of the adapter.
    """

    @functools.wraps(submit)
    def submit_or_do_without(request_id: str, *args: Any, **options: Any) -> None:  # noqa: ANN401 - handed on
        try:
            submit(request_id, *args, **options)
        except TimeoutError as error:
            _log.warning("tier_server_silent", request_id=request_id, reason=str(error))
            adapter._health_event.clear()
            submit(request_id, *args, **options)

    return submit_or_do_without
