"""The connector's part in the scheduler's process: publishes what this engine rank holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from connectors.pace import Pace
from kvindex import metrics
from kvindex.config import connector_config
from kvindex.contents import EngineContents
from kvindex.errors import ConfigError
from kvindex.event_source import ZmqEventSource
from kvindex.publisher import LoadReport, Publisher
from kvindex.redis_index import RedisIndexWriter
from kvindex.worker import Worker, new_incarnation
from vllm_plugin import compat
from vllm_plugin.config import WorkerConfig
from vllm_plugin.load import LoadTracker
from vllm_plugin.metadata import TransferReport
from vllm_plugin.step_times import StepTimes
from vllm_plugin.transfer_scheduler import TransferScheduler

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class SchedulerSide:
    """Publishes one engine rank from `start` to `stop`.

    Everything but `start` and `stop` runs on the engine's thread between two steps, and costs microseconds.

    Raises:
        ConfigError: the engine cannot be published as it is configured; the message says what to change.
    """

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._config = connector_config(
            WorkerConfig, vllm_config.kv_transfer_config.kv_connector_extra_config
        )
        if not self._config.endpoint:
            raise ConfigError(
                "kvlane does not know where this engine is reached: set kvlane.endpoint in "
                "kv_connector_extra_config, or KVLANE_ENDPOINT, to the ip:port of its OpenAI server"
            )
        self._events, self._replay = compat.event_endpoints(vllm_config)
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
            labels=self._config.labels,
            engine=compat.ENGINE,
        )
        self._group_index = compat.followed_group(kv_cache_config)
        self.transfer = TransferScheduler() if self._config.transfer_port else None
        self._load: LoadTracker | None = None
        self._times = StepTimes()
        self._pace = Pace()
        self._publisher: Publisher | None = None

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

    def on_transfers(self, report: TransferReport) -> None:
        """Learn from transfers that are complete."""
        for moved in report.moved:
            self._pace.observe(moved)

    def _with_pace(self, report: LoadReport) -> LoadReport:
        load = msgspec.structs.replace(
            report.load,
            transfer_gb_per_s=round(self._pace.gb_per_s, 3),
            transfer_latency_ms=round(self._pace.latency_ms, 3),
        )
        return msgspec.structs.replace(report, load=load)

    def stop(self) -> None:
        """Take the worker out of the index. Idempotent."""
        if self._publisher is not None:
            self._publisher.stop()

    def on_new_request(self, request: Request) -> None:
        """Count the request in."""
        compat.report_new_copies_only(request)
        if self.transfer is not None:
            self.transfer.on_new_request(request)
        if self._load is not None:
            self._load.add(request)

    def begin_step(self, output: SchedulerOutput) -> None:
        """Note what the engine computes next."""
        if self._load is not None:
            self._times.begin(self._load.begin_step(output.num_scheduled_tokens))

    def end_step(self) -> None:
        """Note that what the engine computed first of what it was given is there."""
        self._times.end()

    def request_finished(self, request: Request) -> None:
        """Count the request out: finished, aborted or failed."""
        if self._load is not None:
            self._load.remove(request.request_id)
