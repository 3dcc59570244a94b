"""How much each tenant may ask for: requests and prompt tokens a second, requests at a time.

Every gateway keeps its part of each limit by itself, `limit / gateways`. Envoy deals requests out evenly,
so the parts add up to the limit, no request waits for a shared counter, and limits hold while Redis is
away. What that costs is in docs/security.md.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

from gateway.tenants.buckets import TokenBucket
from gateway.tenants.roster import Tenant

BURST_S = 1.0
"""A tenant that was silent may ask at once for what its rate gives in this time."""


class Limiter:
    """Counts what this gateway lets through, for one event loop.

    Args:
        num_gateways: how many share every limit now.
        clock: seconds.
    """

    def __init__(
        self, num_gateways: Callable[[], int] = lambda: 1, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_gateways = num_gateways
        self._clock = clock
        self._requests: dict[str, TokenBucket] = {}
        self._tokens: dict[str, TokenBucket] = {}
        self.running: Counter[str] = Counter()
        """Requests under way, by tenant."""

    def request_wait_s(self, tenant: Tenant) -> float:
        """Take one request, or return how long the tenant has to wait for it."""
        if tenant.requests_per_s is None:
            return 0.0
        rate = tenant.requests_per_s / self._num_gateways()
        # A rate below one in all that time must let a request through now and then.
        return self._take(self._requests, tenant, 1, rate=rate, capacity=max(rate * BURST_S, 1.0))

    def tokens_wait_s(self, tenant: Tenant, num_tokens: int) -> float:
        """Take prompt tokens, or return how long the tenant has to wait for them."""
        if tenant.prompt_tokens_per_s is None:
            return 0.0
        rate = tenant.prompt_tokens_per_s / self._num_gateways()
        return self._take(self._tokens, tenant, num_tokens, rate=rate, capacity=rate * BURST_S)

    def correct_tokens(self, tenant: Tenant, num_tokens: int) -> None:
        """Take what an estimate fell short of; a negative number is given back."""
        if bucket := self._tokens.get(tenant.name):
            bucket.take(num_tokens)

    def has_room(self, tenant: Tenant) -> bool:
        """Say whether one more request may run; its tenant's `running` is the caller's to keep."""
        if tenant.max_concurrent is None:
            return True
        return self.running[tenant.name] < math.ceil(tenant.max_concurrent / self._num_gateways())

    def _take(
        self,
        buckets: dict[str, TokenBucket],
        tenant: Tenant,
        amount: float,
        *,
        rate: float,
        capacity: float,
    ) -> float:
        now_s = self._clock()
        bucket = buckets.setdefault(tenant.name, TokenBucket(capacity, now_s))
        wait_s = bucket.wait_s(amount, now_s, rate=rate, capacity=capacity)
        if wait_s == 0:
            bucket.take(amount)
        return wait_s
