"""Admission at one gateway: judges plans by target and share, and counts what tenants have in hand."""

from __future__ import annotations

import math

from gateway import metrics
from gateway.config import GatewayConfig
from gateway.decision import Caller
from gateway.errors import RequestError
from gateway.receipts import Receipt
from gateway.service import Admission, Shares, Verdict, shortest_queue_ms, soonest_ms

TTFT_TARGET_HEADER = "x-kvlane-ttft-target-ms"

NO_TENANT = "-"
"""In metrics, where tenants are not told apart."""


class AdmissionDesk:
    """Lets requests pass or refuses them, by their receipts; for one event loop."""

    def __init__(self, config: GatewayConfig) -> None:
        self._mode = config.admission
        self._congested_ms = config.fair_share_queue_ms
        self._retry_after_s = config.retry_after_s
        self._shares = Shares()
        self._in_hand: dict[str, float] = {}

    def judge(self, receipt: Receipt) -> Verdict | None:
        """Return what the receipt's plan means for the request; None where there is nothing to judge.

        Raises:
            RequestError: 429, it is refused.
        """
        if self._mode is Admission.OFF or (receipt.ttft_target_ms is None and receipt.tenant is None):
            return None
        verdict = self._verdict(receipt)
        metrics.ADMISSIONS.labels(receipt.tenant or NO_TENANT, verdict).inc()
        if self._mode is Admission.ENFORCE and verdict is not Verdict.IN_TIME:
            raise self._refusal(receipt, verdict)
        return verdict

    def take(self, caller: Caller | None, receipt: Receipt) -> None:
        """Count a request that is sent, until `give_back`."""
        if caller is not None and receipt.choice is not None:
            work_ms = receipt.choice.terms.prefill_ms
            self._in_hand[receipt.decision_id] = work_ms
            self._shares.add(caller.tenant, caller.weight, work_ms)

    def give_back(self, receipt: Receipt) -> None:
        """Count a request no more. Idempotent."""
        work_ms = self._in_hand.pop(receipt.decision_id, None)
        if work_ms is not None and receipt.tenant is not None:
            self._shares.remove(receipt.tenant, work_ms)

    def measure(self, receipt: Receipt) -> None:
        """Count whether a request that has been served met its target."""
        served, target_ms = receipt.served, receipt.ttft_target_ms
        if target_ms is None or served is None or served.ttft_ms is None or not receipt.streamed:
            return
        outcome = "met" if served.ttft_ms <= target_ms else "missed"
        metrics.TTFT_TARGETS.labels(receipt.tenant or NO_TENANT, outcome).inc()

    def _verdict(self, receipt: Receipt) -> Verdict:
        target_ms = receipt.ttft_target_ms
        if target_ms is not None and soonest_ms(receipt.choices) > target_ms:
            return Verdict.LATE
        is_congested = shortest_queue_ms(receipt.choices) >= self._congested_ms
        if receipt.tenant is not None and is_congested and self._shares.is_over(receipt.tenant):
            return Verdict.OVER_SHARE
        return Verdict.IN_TIME

    def _refusal(self, receipt: Receipt, verdict: Verdict) -> RequestError:
        predicted_ms = soonest_ms(receipt.choices)
        over_ms = shortest_queue_ms(receipt.choices) - self._congested_ms
        if verdict is Verdict.LATE and receipt.ttft_target_ms is not None:
            over_ms = predicted_ms - receipt.ttft_target_ms
            what = f"No worker can begin to answer within {receipt.ttft_target_ms:g} ms"
        else:
            what = f"Tenant `{receipt.tenant}` has more than its share of a busy fleet"
        return RequestError(
            429,
            f"{what}; the predicted time to first token is {predicted_ms:.0f} ms. "
            "Send the request again after the time in Retry-After.",
            kind="RateLimitError",
            retry_after_s=max(math.ceil(over_ms / 1000), self._retry_after_s),
        )
