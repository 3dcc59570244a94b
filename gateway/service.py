"""Service levels: what a target changes about a plan, and who is refused when queues build. Pure.

Source of the rules and what else there was: docs/adr/0007-service-levels.md.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from collections.abc import Iterable

from gateway.plan import TIE_SHARE, Choice

TARGET_WEIGHT = 2.0
"""How many times over a client's time counts against the time of others where its target is at stake. In the
plan it counts once."""


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
    """Return the plan, headed by a worker that meets the target where its own first does not.

    That worker is the first in the plan's order that is predicted to meet the target, and where the request
    costs others no more than `TARGET_WEIGHT` times what it gains. A prediction meets the target if it is
    as far below it as predictions are exact. Without such a worker, and without a target, the plan is as
    it was.
    """
    plan = tuple(choices)
    if target_ms is None or not plan or _meets(plan[0], target_ms):
        return plan
    first = plan[0]
    for choice in plan[1:]:
        gained_ms = first.terms.ttft_ms - choice.terms.ttft_ms
        if _meets(choice, target_ms) and others_ms(choice) - others_ms(first) <= TARGET_WEIGHT * gained_ms:
            return choice, *(each for each in plan if each is not choice)
    return plan


def _meets(choice: Choice, target_ms: float) -> bool:
    return choice.terms.ttft_ms * (1 + TIE_SHARE) <= target_ms


def others_ms(choice: Choice) -> float:
    """Return what the request costs others at this worker."""
    return choice.terms.slowdown_ms + choice.terms.crowding_ms


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
