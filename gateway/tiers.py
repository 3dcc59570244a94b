"""What tiers hold of a prompt, and what loading it costs. Pure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Self

import msgspec
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvindex.stores import Store
from kvindex.worker import Tier, TierAccess

TELLING_SHARE = 0.2
"""Where loading is a smaller part of what was predicted and measured, a first token tells nothing of it."""

STEP = 0.5
"""Share of the way to a full sample that one sample moves a store's speed, on a logarithmic scale."""

MOST_SURPRISE = math.log(8)
"""One sample counts as at most so many times the time: a load that stalled once is no slow store."""

BOUND = math.log(1000)
"""A store's speed stays within this distance of its settings."""

HALF_LIFE_S = 300.0
"""Time in which a store without samples loses half of its distance: a slow one is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TierSpeed:
    """How fast KV comes from a store into an engine."""

    gb_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    latency_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Of a load, whatever its size."""

    def slower(self, factor: float) -> Self:
        """Return the speed at which a load takes `factor` of the time."""
        return replace(self, gb_per_s=self.gb_per_s / factor, latency_ms=self.latency_ms * factor)


SPEEDS = {
    Tier.CPU: TierSpeed(gb_per_s=10.0, latency_ms=5.0),
    Tier.DISK: TierSpeed(gb_per_s=2.0, latency_ms=10.0),
    Tier.OBJECT: TierSpeed(gb_per_s=0.5, latency_ms=100.0),
}
"""Before any was measured: memory over PCIe 4, one NVMe drive, an object store in the same region."""


class TierPart(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a prompt, one behind the other, that a worker would load from one store."""

    store: str
    tier: Tier
    first_token: int
    end_token: int
    speed: TierSpeed


class TierLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What would be loaded from a store, and how long that would take."""

    store: str
    tier: Tier
    num_tokens: int
    ms: float


def tier_runs(
    chunks: Iterable[Iterable[Store]], reached: frozenset[str], chunk_size: int
) -> Iterator[tuple[Store, int, int]]:
    """Yield the stores that a worker would load from, each with the tokens that it would give.

    LMCache loads the leading chunks that any tier has, each from the fastest; the first that is nowhere ends
    it.

    Args:
        chunks: who holds each chunk of the prompt, in order.
        reached: names of the stores that the worker reaches.
        chunk_size: tokens per chunk.
    """
    order = list(Tier)
    current: Store | None = None
    first_token = end_token = 0
    for holders in chunks:
        within = [store for store in holders if store.name in reached]
        if not within:
            break
        store = min(within, key=lambda each: (order.index(each.tier), each.name))
        if current is not None and store.name != current.name:
            yield current, first_token, end_token
            first_token = end_token
        current = store
        end_token += chunk_size
    if current is not None:
        yield current, first_token, end_token


def tier_cuts(
    parts: Sequence[TierPart], first_token: int, end_token: int, bytes_per_token: int
) -> Iterator[tuple[int, float]]:
    """Yield the ways to read tiers up to a token, shallow ones first: where that is, and how long it takes.

    One for each part that has any of the tokens from `first_token` to `end_token`. To read half of a part is
    never best: to compute a token costs the more the deeper it lies, and to read it does not.
    """
    load_ms, known = 0.0, set[str]()
    for part in parts:
        first, end = max(part.first_token, first_token), min(part.end_token, end_token)
        if first < end:
            load_ms += (end - first) * bytes_per_token / (part.speed.gb_per_s * 1e6)
            load_ms += 0.0 if part.store in known else part.speed.latency_ms
            known.add(part.store)
            yield end, load_ms


def tier_loads(
    parts: Sequence[TierPart], first_token: int, end_token: int, bytes_per_token: int
) -> tuple[TierLoad, ...]:
    """Return what there is to load of the tokens from `first_token` to `end_token`; one load a store."""
    tokens: dict[TierPart, int] = {}
    for part in parts:
        num_tokens = min(part.end_token, end_token) - max(part.first_token, first_token)
        if num_tokens > 0:
            kept = next((each for each in tokens if each.store == part.store), part)
            tokens[kept] = tokens.get(kept, 0) + num_tokens
    return tuple(
        TierLoad(
            store=part.store,
            tier=part.tier,
            num_tokens=num_tokens,
            ms=part.speed.latency_ms + num_tokens * bytes_per_token / (part.speed.gb_per_s * 1e6),
        )
        for part, num_tokens in tokens.items()
    )


class TierSpeeds:
    """How fast each store is: starts from its tier's settings and follows what is measured.

    A store that is much slower than expected is soon not worth its load, and nothing is loaded from it; then
    nothing is measured either, and it slowly comes back.

    Args:
        given: by tier; `SPEEDS` for those that are not in it.
        clock: seconds.
    """

    def __init__(
        self, given: Mapping[Tier, TierSpeed] | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._given = SPEEDS | dict(given or {})
        self._clock = clock
        self._factors: dict[str, tuple[float, float]] = {}

    def speed(self, store: str, tier: Tier) -> TierSpeed:
        """Return a store's speed, as corrected by now."""
        log_factor = self._log_factor(store)
        return self._given[tier].slower(math.exp(log_factor)) if log_factor else self._given[tier]

    def parts(self, access: TierAccess, holders: Iterable[Iterable[Store]]) -> tuple[TierPart, ...]:
        """Return what a worker would load of a prompt, at the speeds of now.

        Args:
            access: which stores the worker reaches.
            holders: who holds each chunk of the prompt, in order.
        """
        return tuple(
            TierPart(
                store=store.name,
                tier=store.tier,
                first_token=first_token,
                end_token=end_token,
                speed=self.speed(store.name, store.tier),
            )
            for store, first_token, end_token in tier_runs(
                holders, frozenset(access.stores), access.chunk_size
            )
        )

    def observe(
        self, loads: Sequence[TierLoad], *, predicted_ms: float, queue_ms: float, ttft_ms: float
    ) -> None:
        """Correct the stores' speeds by a first token that was predicted with these loads.

        Args:
            predicted_ms: when it was expected, the loads included.
            queue_ms: the part of it that was others' work: the larger, the less the sample tells.
            ttft_ms: when it came, after the decision.
        """
        load_ms = sum(load.ms for load in loads)
        if load_ms <= 0:
            return
        took_ms = max(load_ms + ttft_ms - predicted_ms, load_ms * math.exp(-MOST_SURPRISE))
        share = max(load_ms, took_ms) / max(predicted_ms, ttft_ms)
        if share < TELLING_SHARE:
            return
        weight = share * (1 - queue_ms / predicted_ms)
        surprise = min(math.log(took_ms / load_ms), MOST_SURPRISE)
        for load in loads:
            log_factor = self._log_factor(load.store)
            # The prediction had the correction of then, which is that of now but for a few requests.
            moved = log_factor + STEP * weight * surprise * load.ms / load_ms
            self._factors[load.store] = (max(-BOUND, min(moved, BOUND)), self._clock())

    def _log_factor(self, store: str) -> float:
        log_factor, at_s = self._factors.get(store, (0.0, 0.0))
        return log_factor * math.pow(0.5, (self._clock() - at_s) / HALF_LIFE_S) if log_factor else 0.0
