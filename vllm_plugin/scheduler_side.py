"""The connector's part in the scheduler's process: publishes the rank, and decides where KV comes from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from connectors.pace import Pace
from kvindex import metrics
from kvindex.contents import EngineContents
from kvindex.errors import ConfigError
from kvindex.event_source import ZmqEventSource
from kvindex.publisher import LoadReport, Publisher
from kvindex.redis_index import RedisIndexWriter
from kvindex.worker import Worker, new_incarnation
from vllm_plugin import compat
from vllm_plugin.config import worker_config
from vllm_plugin.holds import Frees
from vllm_plugin.load import LoadTracker
from vllm_plugin.load_times import LoadTimes
from vllm_plugin.metadata import KvlaneMetadata, WorkerReport
from vllm_plugin.step_times import StepTimes
from vllm_plugin.transfer_scheduler import TransferScheduler

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_plugin.tier_scheduler import TierScheduler

WIRE_FORGOTTEN_AFTER_S = 300.0
"""Plans leave a slow wire alone, and then nobody would notice that it is fast again: after so long without a
transfer one is tried, like any wire that nobody has measured (`gateway.split.HOPED_FOR`).
"""


class SchedulerSide:
    """Publishes one engine rank from `start` to `stop`, and composes transfer and tiers; each may be off.

    Everything but `start` and `stop` runs on the engine's thread between two steps, and costs microseconds.

    Raises:
        ConfigError: the engine cannot be published as it is configured; the message says what to change.
    """

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._config = worker_config(vllm_config)
        if not self._config.endpoint:
            raise ConfigError(
                "kvlane does not know where this engine is reached: set kvlane.endpoint in "
                "kv_connector_extra_config, or KVLANE_ENDPOINT, to the ip:port of its OpenAI server"
            )
        self._events, self._replay = compat.event_endpoints(vllm_config)
        self.tiers = self._tiers(vllm_config, kv_cache_config)
        parallel = vllm_config.parallel_config
        self.worker = Worker(
            endpoint=self._config.endpoint,
            model=vllm_config.model_config.served_model_name,
            block_size=compat.block_size(kv_cache_config),
            num_blocks=kv_cache_config.num_blocks,
            bytes_per_token=compat.bytes_per_token(vllm_config, kv_cache_config),
            max_model_len=vllm_config.model_config.max_model_len,
            incarnation=new_incarnation(),
            dp_rank=parallel.data_parallel_index,
            dp_size=parallel.data_parallel_size,
            max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            transfer_address=self._transfer_address(
                parallel.data_parallel_index * parallel.tensor_parallel_size
            ),
            role=self._config.role,
            tp_size=parallel.tensor_parallel_size,
            tiers=self.tiers.access if self.tiers is not None else None,
            labels=self._config.labels,
            engine=compat.ENGINE,
        )
        self._group_index = compat.followed_group(kv_cache_config)
        self.transfer = TransferScheduler() if self._config.transfer_port else None
        self._num_loaded: dict[str, int] = {}
        """Tokens that tiers have promised, of requests that have no blocks yet."""
        self._filled_twice: set[str] = set()
        self._held_twice: set[str] = set()
        self._frees = Frees()
        self._load: LoadTracker | None = None
        self._times = StepTimes()
        self._pace = Pace(forget_after_s=WIRE_FORGOTTEN_AFTER_S)
        self._loads = LoadTimes(self.worker.bytes_per_token)
        self._publisher: Publisher | None = None

    def _tiers(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> TierScheduler | None:
        if not self._config.tiers:
            return None
        from vllm_plugin.tier_scheduler import TierScheduler

        return TierScheduler(vllm_config, kv_cache_config, self._config)

    def _transfer_address(self, first_rank: int) -> str:
        """Return where peers reach this rank's side channel; empty if it has none."""
        if not self._config.transfer_port:
            return ""
        host = self._config.endpoint.rpartition(":")[0]
        return f"{host}:{self._config.transfer_port + first_rank}"

    def start(self, block_pool: BlockPool) -> None:
        """Begin to publish; `block_pool` is the scheduler's, which only its thread may change."""
        count = compat.cached_tokens_counter(block_pool, self.worker.block_size, self._group_index)
        self._load = load = LoadTracker(count, block_pool.get_usage)
        if self._config.metrics_port:
            port = self._config.metrics_port + self.worker.dp_rank
            metrics.serve(self._config.metrics_host, port, self._config.metrics_tls)
        self._publisher = Publisher(
            self.worker,
            self._config,
            RedisIndexWriter(self._config),
            EngineContents(self.worker, ZmqEventSource(self._events, self._replay)),
            lambda: self._with_pace(load.report()),
            costs=self._times.costs,
        )
        self._publisher.start()
        if self.tiers is not None:
            self.tiers.start(block_pool)

    def update(self, output: KVConnectorOutput) -> None:
        """Learn what the workers tell of a step."""
        told = output.kv_connector_worker_meta
        report = told if isinstance(told, WorkerReport) else WorkerReport(())
        for moved in report.moved:
            self._pace.observe(moved)
        if self.tiers is not None:
            self.tiers.update(replace(output, kv_connector_worker_meta=report.tiers))
            sent, loaded = set(output.finished_sending or ()), set(output.finished_recving or ())
            if output.invalid_block_ids:
                self._loads.give_up(*loaded)  # which of them failed, and when, is not said
            self._loads.end(loaded)
            output.finished_sending = self._frees.release(sent, loaded)

    def _with_pace(self, report: LoadReport) -> LoadReport:
        transfers, loads = self._pace.line(), self._loads.line()
        load = msgspec.structs.replace(
            report.load,
            transfer_gb_per_s=round(transfers.gb_per_s, 3),
            transfer_latency_ms=round(transfers.latency_ms, 3),
            tier_gb_per_s=round(loads.gb_per_s, 3),
            tier_latency_ms=round(loads.latency_ms, 3),
        )
        return msgspec.structs.replace(report, load=load)

    def stop(self) -> None:
        """Take the worker out of the index. Idempotent."""
        if self._publisher is not None:
            self._publisher.stop()
        if self.tiers is not None:
            self.tiers.stop()

    def on_new_request(self, request: Request) -> None:
        """Count the request in."""
        compat.report_new_copies_only(request)
        if self.transfer is not None:
            self.transfer.on_new_request(request)
        if self.tiers is not None:
            self.tiers.on_new_request(request, is_received=self._num_received(request, 0) > 0)
        if self._load is not None:
            self._load.add(request)

    def num_external_tokens(self, request: Request, num_computed_tokens: int) -> int | None:
        """Return how many tokens after the first `num_computed_tokens` come from elsewhere; None: ask again.

        Leading tokens from the tiers, as many as they have and the plan allows; the rest of a prompt whose
        other half is computed elsewhere comes from there.
        """
        num_received = self._num_received(request, num_computed_tokens)
        if self.tiers is None:
            return num_received
        num_loaded = self.tiers.num_external_tokens(request, num_computed_tokens)
        if num_loaded is None:
            return None
        self._num_loaded[request.request_id] = num_loaded
        return max(num_received, num_loaded)

    def _num_received(self, request: Request, num_computed_tokens: int) -> int:
        if self.transfer is None:
            return 0
        return self.transfer.num_external_tokens(request, num_computed_tokens)

    def on_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Have the blocks filled that were allocated for what comes from elsewhere."""
        request_id = request.request_id
        num_loaded = min(self._num_loaded.pop(request_id, 0), num_external_tokens)
        num_received = num_external_tokens - num_loaded
        if self.tiers is not None:
            self.tiers.on_alloc(request, blocks, num_loaded)
            if num_external_tokens:
                self._frees.load(request_id)
            if num_loaded and num_received:
                self._filled_twice.add(request_id)
            elif num_loaded:
                self._loads.begin(request_id, num_loaded)
        if self.transfer is not None:
            self.transfer.on_alloc(request, blocks.get_block_ids()[0], num_received)

    def begin_step(self, output: SchedulerOutput) -> KvlaneMetadata:
        """Note what the engine computes next; return what the workers need to know of it."""
        if self._load is not None:
            self._times.begin(self._load.begin_step(output.num_scheduled_tokens))
        metadata = self.transfer.build_metadata(output) if self.transfer is not None else KvlaneMetadata()
        metadata.held_twice, self._held_twice = self._held_twice, set()
        metadata.filled_twice, self._filled_twice = self._filled_twice, set()
        if self.tiers is not None:
            metadata.tiers = self.tiers.build_metadata(output)
        return metadata

    def end_step(self) -> None:
        """Note that what the engine computed first of what it was given is there."""
        self._times.end()

    def request_finished(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Count the request out: finished, aborted or failed.

        Returns:
            Whether its blocks are needed still, and what the client is told in `kv_transfer_params`.
        """
        if self._load is not None:
            self._load.remove(request.request_id)
        self._loads.give_up(request.request_id)
        self._num_loaded.pop(request.request_id, None)
        is_sent = self.transfer is not None and self.transfer.request_finished(request)
        is_stored, params = (
            self.tiers.request_finished(request, block_ids) if self.tiers is not None else (False, None)
        )
        if is_sent and is_stored:
            self._held_twice.add(request.request_id)
        if is_sent or is_stored:
            self._frees.hold(request.request_id)
        return is_sent or is_stored, params
