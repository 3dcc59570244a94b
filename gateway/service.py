"""Service levels: what a target changes about a plan, and who is refused when queues build. Pure.

Source of the rules and what else there was: docs/adr/0007-service-levels.md.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from collections.abc import Iterable

from gateway.plan import TIE_MS, TIE_SHARE, Choice


class Admission(enum.StrEnum):
    """What becomes of requests that are late or over their tenant's share."""

    OFF = "off"
    """They are sent, and not looked for."""
    SHADOW = "shadow"
    """They are sent and counted."""
    ENFORCE = "enforce"
    """They are refused: 429."""


class Verdict(enum.StrEnum):
    """What a plan means for the request."""

    IN_TIME = "in_time"
    LATE = "late"
    """No worker is predicted to begin its answer within the target."""
    OVER_SHARE = "over_share"
    """Every worker has a queue, and the tenant has more of the work in hand than its weight gives it."""


def prefer(choices: Iterable[Choice], target_ms: float | None) -> tuple[Choice, ...]:
    """Return the plan in the order that a target gives it; without a target, as it is.

    Workers that meet the target come first, by what the request would cost the fleet there: whoever
    meets it is soon enough for the client, so the fleet's time decides. Where that is equal, and behind
    the target, the plan's own order stays. A prediction meets the target if it is as far below it as
    predictions are exact.
    """
    plan = tuple(choices)
    if target_ms is None:
        return plan
    meeting = {id(choice) for choice in plan if choice.terms.ttft_ms * (1 + TIE_SHARE) <= target_ms}
    least_ms = min((fleet_ms(choice) for choice in plan if id(choice) in meeting), default=0.0)
    tied_ms = least_ms * (1 + TIE_SHARE) + TIE_MS

    def rank(choice: Choice) -> tuple[bool, float]:
        if id(choice) not in meeting:
            return True, 0.0
        return False, max(fleet_ms(choice), tied_ms)

    return tuple(sorted(plan, key=rank))


def fleet_ms(choice: Choice) -> float:
    """Return what the request takes of the fleet: its prefill and what that costs others, no waiting."""
    return choice.terms.prefill_ms + choice.terms.slowdown_ms + choice.terms.crowding_ms


def soonest_ms(choices: Iterable[Choice]) -> float:
    """Return the lowest predicted time to first token of a plan that is not empty."""
    return min(choice.terms.ttft_ms for choice in choices)


def shortest_queue_ms(choices: Iterable[Choice]) -> float:
    """Return the shortest queue of a plan that is not empty."""
    return min(choice.terms.queue_ms for choice in choices)


class Shares:
    """The predicted prefill that each tenant has in hand at this gateway, against its weight.

    A tenant is over its share if its work for its weight is above the mean of all tenants with work. So the
    one with least for its weight is never over, and neither is one that is alone: somebody may always go
    on, and no worker idles for the sake of fairness. Held to it, no tenant gets further above the mean
    than by one request.
    """

    def __init__(self) -> None:
        self._work_ms: defaultdict[str, float] = defaultdict(float)
        self._num_requests: Counter[str] = Counter()
        self._weights: dict[str, float] = {}

    def add(self, tenant: str, weight: float, work_ms: float) -> None:
        """Count a request that is sent."""
        self._work_ms[tenant] += work_ms
        self._num_requests[tenant] += 1
        self._weights[tenant] = weight

    def remove(self, tenant: str, work_ms: float) -> None:
        """Count a request no more, which was added with this work."""
        self._num_requests[tenant] -= 1
        if self._num_requests[tenant]:
            self._work_ms[tenant] -= work_ms
        else:  # and nothing is left of rounding
            for each in (self._work_ms, self._num_requests, self._weights):
                del each[tenant]

    def is_over(self, tenant: str) -> bool:
        """Say whether the tenant has more in hand than its share."""
        if tenant not in self._weights:
            return False
        mean_ms = sum(self._work_ms.values()) / sum(self._weights.values())
        return self._work_ms[tenant] / self._weights[tenant] > mean_ms * (1 + 1e-9)
