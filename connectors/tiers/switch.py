"""A tier that fails is left alone for a while, so that nothing waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from connectors.tiers import metrics

_log = structlog.get_logger(__name__)


class Switch:
    """Says whether a tier is in use; any thread may ask and tell.

    The first failure switches it off and is logged. Whatever is tried when the pause is over decides anew, so
    a disk with room again or a bucket that is back needs nobody's hand.

    Args:
        tier: disk or s3.
        place: where it is, for the log.
        pause_s: how long the tier is left alone after a failure.
        clock: seconds, monotonic.
    """

    def __init__(
        self, tier: str, place: str, pause_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = _log.bind(tier=tier, place=place)
        self._failures = metrics.FAILURES.labels(tier)
        self._off = metrics.OFF.labels(tier)
        self._pause_s = pause_s
        self._clock = clock
        self._off_until: float | None = None
        """None while it is in use."""

    @property
    def is_off(self) -> bool:
        """Whether the tier is to be left alone now."""
        return self._off_until is not None and self._clock() < self._off_until

    def failed(self, reason: str) -> None:
        """Switch off: the whole tier failed, not one object."""
        self._failures.inc()
        self._off.set(1)
        if self._off_until is None:
            self._log.error("tier_off", reason=reason, tried_again_after_s=self._pause_s)
        self._off_until = self._clock() + self._pause_s

    def worked(self) -> None:
        """Switch on."""
        if self._off_until is not None:
            self._off_until = None
            self._log.warning("tier_on")
            self._off.set(0)
