"""How busy an engine is, from the requests it is working on. Pure."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from kvindex.publisher import LoadReport
from kvindex.worker import Load
from vllm_plugin.step_times import StepWork

_MOST_ACCEPTED = 10_000
# The gateway ends its request ids with this; vLLM puts a prefix and a suffix around them.
_DECISION_ID = re.compile(r".*-kv([0-9a-f]{16})(?![0-9a-f])")


class Status(Protocol):
    """Where a request stands; vLLM's RequestStatus."""

    @property
    def name(self) -> str:
        """`RUNNING` for a request that has its blocks."""


class EngineRequest(Protocol):
    """What is read of a vLLM request. The engine changes it in place; reading it is harmless at any time."""

    request_id: str
    status: Status
    num_prompt_tokens: int
    num_computed_tokens: int

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""


class LoadTracker:
    """Knows an engine's live requests, and so its load at any moment.

    Requests come and go on the engine's thread, reports are made on the publisher's; every operation that
    they share is atomic. Nothing is counted incrementally, so nothing can be left behind by an abort or
    a preemption: a request counts as what it is when the report is made.

    Args:
        num_cached_tokens: prompt tokens of a new request that the engine has in its cache.
        kv_usage: share of the KV cache in use, 0 to 1.
    """

    def __init__(
        self, num_cached_tokens: Callable[[EngineRequest], int], kv_usage: Callable[[], float]
    ) -> None:
        self._num_cached_tokens = num_cached_tokens
        self._kv_usage = kv_usage
        self._live: dict[str, tuple[EngineRequest, int]] = {}
        self._accepted: deque[str] = deque(maxlen=_MOST_ACCEPTED)
        self._under_way: Mapping[str, int] = {}

    def begin_step(self, num_scheduled_tokens: Mapping[str, int]) -> StepWork:
        """Note what the next step computes, by request, and return it in sum. On the engine's thread.

        The engine counts these tokens as computed from now on; whoever is behind them waits all the same.
        """
        self._under_way = num_scheduled_tokens
        prefill_tokens = decode_requests = decode_tokens = 0
        prefill_pairs = 0.0
        for request_id, num_tokens in num_scheduled_tokens.items():
            if (live := self._live.get(request_id)) is None:
                continue
            request = live[0]
            num_before = request.num_computed_tokens
            # A request that was preempted computes its output again, which is no decoding.
            if num_before + 1 >= request.num_tokens:
                decode_requests += 1
                decode_tokens += num_before
            else:
                prefill_tokens += num_tokens
                prefill_pairs += num_tokens * (num_before + num_tokens / 2)
        return StepWork(prefill_tokens, prefill_pairs, decode_requests, decode_tokens)

    def add(self, request: EngineRequest) -> None:
        """Count a request in. On the engine's thread."""
        self._live[request.request_id] = (request, self._num_cached_tokens(request))
        if decision := _DECISION_ID.match(request.request_id):
            self._accepted.append(decision.group(1))

    def remove(self, request_id: str) -> None:
        """Count a request out, whatever it ended of. On the engine's thread."""
        self._live.pop(request_id, None)

    def report(self) -> LoadReport:
        """Return the load, and the decisions among it that were in no report before. On any one thread."""
        # Ids first: whatever is named is then in the load, or over already.
        accepted: dict[str, None] = {}
        while self._accepted:
            accepted[self._accepted.popleft()] = None
        num_running = waiting_prefill_tokens = running_tokens = 0
        waiting_prefill_pairs = 0.0
        under_way = self._under_way
        live = list(self._live.values())
        for request, num_cached_tokens in live:
            num_scheduled_tokens = request.num_computed_tokens
            is_running = request.status.name == "RUNNING"
            num_running += is_running
            num_step_tokens = under_way.get(request.request_id, 0) if is_running else 0
            if is_running and num_scheduled_tokens - num_step_tokens >= request.num_prompt_tokens:
                running_tokens += num_scheduled_tokens
            else:
                # On the average, half of the step is over.
                num_computed_tokens = num_scheduled_tokens - num_step_tokens // 2
                # A preempted request computes its output again as well, and at least one token is computed.
                done_tokens = num_computed_tokens or num_cached_tokens
                num_left = max(1, request.num_tokens - done_tokens)
                waiting_prefill_tokens += num_left
                waiting_prefill_pairs += num_left * (done_tokens + num_left / 2)
        load = Load(
            waiting_requests=len(live) - num_running,
            running_requests=num_running,
            waiting_prefill_tokens=waiting_prefill_tokens,
            running_tokens=running_tokens,
            kv_usage=round(self._kv_usage(), 4),
            waiting_prefill_pairs=waiting_prefill_pairs,
        )
        return LoadReport(load, tuple(accepted))
