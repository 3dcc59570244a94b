"""What became of every decision: who was considered, each term, what was chosen, what was measured.

Kept in memory, bounded by count and size. Prompt text and token ids are never in a receipt, hashes of blocks
are.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import Any

import msgspec

from gateway import metrics
from gateway.chains import Chain
from gateway.decision import End, Served
from gateway.plan import Choice
from gateway.service import Verdict
from gateway.split import Split

RECEIPT_BYTES = 2_048
CANDIDATE_BYTES = 1_024
"""What a receipt takes beside its hashes, and each worker in it, measured and rounded up."""

_VIEWED_APART = frozenset({"choices", "chains", "chunk_chains", "split"})


class Receipt(msgspec.Struct, kw_only=True):
    """One decision. Filled by the router on its event loop while the request lives."""

    decision_id: str
    request_id: str
    """x-request-id as the client sent it, or what was generated for it."""
    path: str
    at: float = msgspec.field(default_factory=time.time)
    """Unix time in seconds."""
    tenant: str | None = None
    model: str | None = None
    mode: str = ""
    fallback: str | None = None
    """Why the decision was not made by overlap."""
    inexact: str | None = None
    """Why the tokens may differ from the engine's."""
    streamed: bool = False
    prompt_tokens: int = 0
    max_output_tokens: int | None = None
    chains: tuple[Chain, ...] = ()
    """The prompt that was looked up, in each pool."""
    chunk_chains: tuple[Chain, ...] = ()
    """The same in each pool of chunks, of which tiers keep some."""
    choices: tuple[Choice, ...] = ()
    """Every candidate, best first; empty where the index was not asked."""
    split: Split | None = None
    """The pair of workers, where the request was split; the decode worker is the chosen one."""
    excluded: dict[str, str] = {}
    """Worker id to the reason why it was no candidate."""
    ttft_target_ms: float | None = None
    verdict: Verdict | None = None
    """What the plan meant for the target and the tenant's share; None where neither was looked at."""
    chosen: str | None = None
    """Worker id."""
    destinations: tuple[str, ...] = ()
    replans: int = 0
    steps_ms: dict[str, float] = {}
    """Duration of each step of the decision."""
    end: End | None = None
    served: Served | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        chains = self.chains + self.chunk_chains
        num_hash_bytes = sum(len(chain.hashes) + len(chain.contents) for chain in chains)
        num_workers = len(self.choices) + len(self.excluded)
        num_text_bytes = len(self.request_id) + len(self.path)
        return RECEIPT_BYTES + num_text_bytes + num_hash_bytes + CANDIDATE_BYTES * num_workers

    @property
    def choice(self) -> Choice | None:
        """The chosen candidate, where there was a plan."""
        return self.choices[0] if self.choices else None

    @property
    def matched_tokens(self) -> int:
        """Prompt tokens that the chosen worker held, according to the index."""
        return self.choice.cached_tokens if self.choice else 0

    @property
    def predicted_ttft_ms(self) -> float | None:
        """What the plan said, where there was one."""
        planned = self.split or self.choice
        return planned.terms.ttft_ms if planned else None

    @property
    def ttft_error_ms(self) -> float | None:
        """How much later than predicted the first token came, from the end of the decision on."""
        predicted_ms = self.predicted_ttft_ms
        if predicted_ms is None or self.served is None or self.served.ttft_ms is None:
            return None
        return self.served.ttft_ms - sum(self.steps_ms.values()) - predicted_ms

    def view(self) -> dict[str, Any]:
        """Return the receipt as JSON-ready values."""
        fields: dict[str, Any] = msgspec.to_builtins(
            {name: getattr(self, name) for name in self.__struct_fields__ if name not in _VIEWED_APART}
        )
        fields["matched_tokens"] = self.matched_tokens
        fields["predicted_ttft_ms"] = self.predicted_ttft_ms
        fields["split"] = _view_split(self.split) if self.split else None
        fields["ttft_error_ms"] = self.ttft_error_ms
        fields["candidates"] = [_view_choice(choice) for choice in self.choices]
        return fields


def _view_split(split: Split) -> dict[str, Any]:
    return {
        "prefill": split.prefill.candidate.worker.worker_id,
        "decode": split.decode.candidate.worker.worker_id,
        "sent_from_token": split.sent_from_token,
        "terms": msgspec.to_builtins(split.terms),
        "ttft_ms": split.terms.ttft_ms,
    }


def _view_choice(choice: Choice) -> dict[str, Any]:
    candidate, state = choice.candidate, choice.candidate.state
    return {
        "worker": candidate.worker.worker_id,
        "slot": state.slot,
        "overlap_blocks": candidate.overlap_blocks,
        "degraded": candidate.degraded,
        "cached_tokens": choice.cached_tokens,
        "pending_tokens": choice.pending_tokens,
        "loaded_tokens": choice.loaded_tokens,
        "loads": msgspec.to_builtins(choice.loads),
        "passed_over": msgspec.to_builtins(choice.passed_over),
        "cuts": msgspec.to_builtins(choice.cuts),
        "uncached_tokens": choice.uncached_tokens,
        "backlog_tokens": state.backlog_tokens,
        "running_requests": state.load.running_requests,
        "waiting_requests": state.load.waiting_requests,
        "charged_requests": state.charged_requests,
        "kv_usage": state.load.kv_usage,
        "prefill_tokens_per_s": candidate.profile.prefill_tokens_per_s,
        "terms": msgspec.to_builtins(choice.terms),
        "ttft_ms": choice.terms.ttft_ms,
    }


class Receipts:
    """The latest receipts, by decision id and by the client's request id.

    Args:
        capacity: receipts kept; the oldest go first.
        max_bytes: memory that they may take, about; one is kept in any case.
        sample: share of decisions that stay once they were measured. Those that load decided stay anyway.
    """

    def __init__(self, capacity: int, *, max_bytes: int = 256 << 20, sample: float = 1.0) -> None:
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._sample = sample
        self._by_decision: OrderedDict[str, Receipt] = OrderedDict()
        self._by_request: dict[str, str] = {}

    def add(self, receipt: Receipt) -> None:
        """Keep `receipt`; of several under one request id, the latest is found by it."""
        self._by_decision[receipt.decision_id] = receipt
        self._by_request[receipt.request_id] = receipt.decision_id
        self._num_bytes += receipt.num_bytes
        while len(self._by_decision) > self._capacity or (
            self._num_bytes > self._max_bytes and len(self._by_decision) > 1
        ):
            self._forget(next(iter(self._by_decision.values())))
        metrics.RECEIPT_BYTES.set(self._num_bytes)

    def measured(self, receipt: Receipt) -> None:
        """Note that nothing more will be asked of `receipt` by ourselves: it stays if it is of the sample."""
        # The id is random.
        is_sampled = int(receipt.decision_id[:8], 16) < self._sample * 2**32
        if not is_sampled and receipt.fallback is None and receipt.decision_id in self._by_decision:
            self._forget(receipt)

    def get(self, key: str) -> Receipt | None:
        """Return the receipt of a decision id or a request id."""
        return self._by_decision.get(key) or self._by_decision.get(self._by_request.get(key, ""))

    def _forget(self, receipt: Receipt) -> None:
        del self._by_decision[receipt.decision_id]
        self._num_bytes -= receipt.num_bytes
        if self._by_request.get(receipt.request_id) == receipt.decision_id:
            del self._by_request[receipt.request_id]

    def latest(self, limit: int | None = None) -> Iterable[Receipt]:
        """Return up to `limit` receipts, or all, newest first."""
        return islice(reversed(self._by_decision.values()), limit)
