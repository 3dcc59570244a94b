"""Tiers as the scheduler sees them: LMCache's connector as a child, and what it must not be asked.

On the engine's thread, between two steps.

Source: LMCache 0.5.6 `lmcache/integration/vllm/lmcache_mp_connector.py`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import structlog
from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector
from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestState

from kvindex.stores import LOAD_KEY
from kvindex.worker import TierAccess
from vllm_plugin import compat
from vllm_plugin.compat import KVConnectorRole
from vllm_plugin.tier_request import TierRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_plugin.config import WorkerConfig


_log = structlog.get_logger(__name__)


class Ahead:
    """Requests for which the tiers were asked before their turn, until that comes or they end. Pure.

    Args:
        most_tokens: of all of them together.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self._tokens: dict[str, int] = {}

    def begin(self, request_id: str, num_tokens: int) -> bool:
        """Return whether so many more tokens may be asked for; if so they count from now on."""
        if sum(self._tokens.values()) + num_tokens > self._most_tokens:
            return False
        self._tokens[request_id] = num_tokens
        return True

    def end(self, request_id: str) -> None:
        """Count a request no more, if it was."""
        self._tokens.pop(request_id, None)


class TierScheduler:
    """The scheduler's part of loading from and storing to the node's LMCache server."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: WorkerConfig) -> None:
        child_config = compat.tier_config(vllm_config, kv_cache_config, config.tiers)
        self._child: Any = LMCacheMPConnector(child_config, KVConnectorRole.SCHEDULER, kv_cache_config)
        adapter = self._child.scheduler_adapter
        adapter.maybe_submit_lookup_request = self._limited(adapter.maybe_submit_lookup_request)
        self.access = TierAccess(
            model=adapter.model_name,
            chunk_size=adapter.lmcache_tokens_per_chunk,
            world_size=adapter.world_size,
            stores=tuple(config.tier_stores),
            server=config.tier_server,
        )
        self._ahead = Ahead(kv_cache_config.num_blocks * compat.block_size(kv_cache_config))
        self._limits: dict[str, int | None] = {}
        """Leading tokens of a request for which the tiers may be read; None: all."""

    def start(self, block_pool: BlockPool) -> None:
        """Hand over the scheduler's pool of blocks."""
        self._child.bind_gpu_block_pool(block_pool)

    def stop(self) -> None:
        """Let go of the server."""
        self._child.shutdown()

    def reset(self) -> bool:
        """Have the server drop what nobody uses; return whether it did."""
        return bool(self._child.reset_cache())

    def on_new_request(self, request: Request, *, is_received: bool) -> None:
        """Note a request; with `lmcache.mp.eager_prefetch` its chunks come near while it waits.

        They take memory of the server until its turn comes: no more is asked for than the engine itself can
        hold.

        Args:
            request: as vLLM has it.
            is_received: whether a transfer brings what the tiers do not have. The last token it does anyway.
        """
        limit_tokens = load_limit(request.request_id, request.kv_transfer_params)
        if is_received:
            most_tokens = request.num_prompt_tokens - 1
            limit_tokens = most_tokens if limit_tokens is None else min(limit_tokens, most_tokens)
        self._limits[request.request_id] = limit_tokens
        if not self._may_load(request):
            return
        num_tokens = min(request.num_prompt_tokens, limit_tokens or request.num_prompt_tokens)
        if self._ahead.begin(request.request_id, num_tokens):
            self._child.on_new_request(TierRequest(request))

    def num_external_tokens(self, request: Request, num_computed_tokens: int) -> int | None:
        """Return how many tokens after the first `num_computed_tokens` the tiers are to be read for.

        None: ask again.
        """
        request_id = request.request_id
        if (tracker := self._child.request_trackers.get(request_id)) is not None and _has_failed(tracker):
            del self._child.request_trackers[request_id]
        if not self._may_load(request):
            # What it computes is stored all the same.
            self._child._get_or_create_request_tracker(TierRequest(request))
            return 0
        count, _ = self._child.get_num_new_matched_tokens(TierRequest(request), num_computed_tokens)
        if count is None:
            return None
        self._ahead.end(request_id)
        return int(count)

    def on_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Have a request's blocks filled, now that it has them."""
        self._child.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_metadata(self, output: SchedulerOutput) -> Any:  # noqa: ANN401 - LMCache's
        """Return what the workers need to know of a step."""
        for step in compat.scheduled(output):
            tell_computed(self._child.request_trackers[step.request_id], step.num_computed_tokens)
        return self._child.build_connector_meta(output)

    def update(self, output: KVConnectorOutput) -> None:
        """Take what the workers have to say."""
        self._child.update_connector_output(output)

    def request_finished(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Note the end of a request; return whether its blocks are needed, and what the client is told."""
        self._limits.pop(request.request_id, None)
        self._ahead.end(request.request_id)
        if request.request_id not in self._child.request_trackers:
            # It ended before it was ever looked at.
            self._child._get_or_create_request_tracker(TierRequest(request))
        held, params = self._child.request_finished_all_groups(request, block_ids)
        return bool(held), params

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Return what LMCache adds to the engine's KV events."""
        events: Iterable[KVCacheEvent] = self._child.take_events()
        return events

    def has_pending_push_work(self) -> bool:
        """Whether the engine must go on stepping for stores under way."""
        return bool(self._child.has_pending_push_work())

    def _may_load(self, request: Request) -> bool:
        """Return whether the tiers are to be asked for any token of a request."""
        if request.skip_reading_prefix_cache:
            return False
        limit_tokens = self._limits[request.request_id]
        return limit_tokens is None or limit_tokens >= self.access.chunk_size

    def _limited(self, submit: Callable[..., None]) -> Callable[..., None]:
        """Return a `submit` that asks for no more than a request's limit: what is found is read.

        Args:
            submit: `maybe_submit_lookup_request` of LMCache's adapter, which its connector calls.
        """

        @functools.wraps(submit)
        def submit_up_to_limit(request_id: str, token_ids: list[int], **options: Any) -> None:  # noqa: ANN401 - handed on
            submit(request_id, token_ids=token_ids[: self._limits.get(request_id)], **options)

        return submit_up_to_limit


def tell_computed(tracker: Any, num_computed_tokens: int) -> None:  # noqa: ANN401 - LMCache's
    """Have LMCache know how far a request's blocks are filled before a step; it stores no more than that.

    It counts what it was promised as if it had come, and knows nothing of transfers. After a load that was
    refused or failed, a chunk stored by that count would be wrong for everyone after; and what another
    engine has sent would not be stored.
    """
    assumed_tokens = max(tracker.num_vllm_hit_tokens, tracker.num_lmcache_hit_tokens)
    tracker.num_scheduled_tokens = num_computed_tokens - assumed_tokens


def _has_failed(tracker: Any) -> bool:  # noqa: ANN401 - LMCache's
    """Whether a transfer was to fill a request's blocks, and nothing of it is left.

    vLLM asks about such a request anew. LMCache takes that for one it is done with, and would promise what it
    never loads.
    """
    return tracker.state is LMCacheMPRequestState.READY and not tracker.num_lmcache_hit_tokens


def load_limit(request_id: str, params: Mapping[str, Any] | None) -> int | None:
    """Return for how many leading tokens the tiers may be read; None: for all.

    Args:
        request_id: for the log.
        params: the request's `kv_transfer_params`.
    """
    limit_tokens = params.get(LOAD_KEY) if params else None
    if limit_tokens is None:
        return None
    if type(limit_tokens) is not int or limit_tokens < 0:
        _log.warning(
            "load_limit_refused", request_id=request_id, reason=f"{LOAD_KEY} is not a number of tokens"
        )
        return None
    return limit_tokens
