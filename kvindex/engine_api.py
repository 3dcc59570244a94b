"""What a vLLM says of itself over HTTP, for those who stand beside it.

Source: vLLM 0.24 and 0.32 `vllm/v1/metrics/loggers.py` (names and labels of `/metrics`).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Self

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from kvindex.errors import EngineUnavailable
from kvindex.worker import Load, Worker, new_incarnation

_TIMEOUT_S = 2.0


class _ModelCard(msgspec.Struct):
    """A model of `/v1/models`; LoRA adapters have a parent."""

    id: str
    max_model_len: int | None = None
    parent: str | None = None


class _ModelList(msgspec.Struct):
    data: list[_ModelCard]


class EngineApi:
    """Reads one engine rank's API. Blocking; one thread.

    Args:
        endpoint: `ip:port` of the OpenAI server.
        dp_rank: whose figures to read where the server stands before several ranks.
        dp_size: how many ranks there are.
    """

    def __init__(self, endpoint: str, *, dp_rank: int = 0, dp_size: int = 1) -> None:
        self._endpoint = endpoint
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._client = httpx.Client(base_url=f"http://{endpoint}", timeout=_TIMEOUT_S)

    def __enter__(self) -> Self:
        """Return the API itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the connection."""
        self._client.close()

    def read_worker(self, labels: dict[str, str]) -> Worker:
        """Return the engine as it registers, under a new incarnation.

        The bytes of a token and the size of a step are in none of its answers, and stay 0.

        Raises:
            EngineUnavailable: it does not answer, or does not say what is needed.
        """
        try:
            models = msgspec.json.decode(self._get("/v1/models"), type=_ModelList).data
        except msgspec.DecodeError as error:
            raise EngineUnavailable(f"{self._endpoint}/v1/models: {error}") from error
        base = next((card for card in models if card.parent is None), None)
        if base is None or base.max_model_len is None:
            raise EngineUnavailable(f"{self._endpoint}/v1/models names no base model with its max_model_len")
        cache = self._samples().cache
        block_size, num_blocks = cache.get("block_size", ""), cache.get("num_gpu_blocks", "")
        if not block_size.isdigit() or not num_blocks.isdigit():
            raise EngineUnavailable(
                f"{self._endpoint}/metrics has no vllm:cache_config_info with block counts"
            )
        return Worker(
            endpoint=self._endpoint,
            model=base.id,
            block_size=int(block_size),
            num_blocks=int(num_blocks),
            bytes_per_token=0,
            max_model_len=base.max_model_len,
            incarnation=new_incarnation(),
            dp_rank=self._dp_rank,
            dp_size=self._dp_size,
            labels=labels,
            engine="vLLM",
            publisher="external",
        )

    def read_load(self, worker: Worker) -> Load:
        """Return the load; tokens are estimates, as the metrics count requests only.

        A waiting request is taken to need what a finished one had computed on average, and the running
        ones to share the used part of the cache.

        Raises:
            EngineUnavailable: it does not answer.
        """
        values = self._samples().values
        waiting = values.get("vllm:num_requests_waiting", 0)
        usage = values.get("vllm:kv_cache_usage_perc", 0)
        num_finished = values.get("vllm:request_prefill_kv_computed_tokens_count", 0)
        computed_tokens = values.get("vllm:request_prefill_kv_computed_tokens_sum", 0)
        return Load(
            waiting_requests=int(waiting),
            running_requests=int(values.get("vllm:num_requests_running", 0)),
            waiting_prefill_tokens=round(waiting * computed_tokens / num_finished) if num_finished else 0,
            running_tokens=round(usage * worker.num_blocks * worker.block_size),
            kv_usage=round(usage, 4),
        )

    def _samples(self) -> _Samples:
        return _Samples(self._get("/metrics").decode(errors="replace"), str(self._dp_rank))

    def _get(self, path: str) -> bytes:
        try:
            return self._client.get(path).raise_for_status().content
        except httpx.HTTPError as error:
            raise EngineUnavailable(
                f"{self._endpoint}{path}: {str(error) or type(error).__name__}"
            ) from error


def cache_config(metrics: str, *, dp_rank: int = 0) -> dict[str, str]:
    """Return the labels of `vllm:cache_config_info` of one rank, such as `block_size`; empty without it.

    Raises:
        EngineUnavailable: `metrics` is not Prometheus text.
    """
    return _Samples(metrics, str(dp_rank)).cache


class _Samples:
    """One rank's figures out of a Prometheus text."""

    def __init__(self, text: str, rank: str) -> None:
        self.values: dict[str, float] = {}
        self.cache: dict[str, str] = {}
        for name, labels, value in _read(text):
            if labels.get("engine", rank) == rank:
                self.values[name] = value
                if name == "vllm:cache_config_info":
                    self.cache = labels


def _read(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield name, labels and value of every sample.

    Raises:
        EngineUnavailable: this is not Prometheus text.
    """
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value
    except ValueError as error:
        raise EngineUnavailable(f"metrics cannot be read: {error}") from error
