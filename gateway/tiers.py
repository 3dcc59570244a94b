"""What tiers hold of a prompt, and what loading it costs. Pure."""

from __future__ import annotations

import enum
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, NamedTuple, Self

import msgspec
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from kvindex.stores import Store, StoreSpeed
from kvindex.worker import Load, Tier

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

    def then(self, other: Self) -> Self:
        """Return the speed at which KV comes through this and then through `other`."""
        gb_per_s = 1 / (1 / self.gb_per_s + 1 / other.gb_per_s)
        return replace(self, gb_per_s=gb_per_s, latency_ms=self.latency_ms + other.latency_ms)

    def ms(self, num_bytes: float) -> float:
        """Return how long a load takes."""
        return self.latency_ms + num_bytes / (self.gb_per_s * 1e6)


SPEEDS = {
    Tier.CPU: TierSpeed(gb_per_s=10.0, latency_ms=5.0),
    Tier.DISK: TierSpeed(gb_per_s=2.0, latency_ms=10.0),
    Tier.OBJECT: TierSpeed(gb_per_s=0.5, latency_ms=100.0),
}
"""Before any was measured: memory over PCIe 4, one NVMe drive, an object store in the same region."""

Speeds = Mapping[str, Mapping[str, StoreSpeed]]
"""What was measured: by name of the store and the LMCache server that did; empty for whoever lists it."""


class TierRun(NamedTuple):
    """Tokens of a prompt, one behind the other, that a worker would load from one store."""

    store: Store
    first_token: int
    end_token: int


class Source(enum.StrEnum):
    """Whence a speed is, before it is corrected."""

    MEASURED = "measured"
    """By the LMCache server that reads the store, and by the worker that reads its memory."""
    SETTINGS = "settings"


class TierPart(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a prompt, one behind the other, that a worker would load from one store."""

    store: str
    tier: Tier
    first_token: int
    end_token: int
    speed: TierSpeed
    known: TierSpeed
    """The same before it is corrected by first tokens."""
    source: Source = Source.SETTINGS


class TierLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What would be loaded from a store, and how long that would take."""

    store: str
    tier: Tier
    num_tokens: int
    """That need not be computed then."""
    num_bytes: int
    """Read for that; more, where a lookup brings what the worker has cached as well."""
    ms: float
    known: TierSpeed
    """Of the store, before it is corrected by first tokens."""
    source: Source = Source.SETTINGS
    """Whence that is."""


def tier_runs(
    chunks: Iterable[Iterable[Store]], reached: frozenset[str], chunk_size: int
) -> Iterator[TierRun]:
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
            yield TierRun(current, first_token, end_token)
            first_token = end_token
        current = store
        end_token += chunk_size
    if current is not None:
        yield TierRun(current, first_token, end_token)


def tier_cuts(
    parts: Sequence[TierPart], first_token: int, end_token: int, bytes_per_token: int
) -> Iterator[tuple[int, float]]:
    """Yield the ways to read tiers up to a token, shallow ones first: where that is, and how long it takes.

    One for each part that has any of the tokens from `first_token` to `end_token`. To read half of a part is
    never best: to compute a token costs the more the deeper it lies, and to read it does not.
    """
    load_ms, known = 0.0, set[str]()
    for part in parts:
        if num_read := _num_read(part, first_token, end_token, read_from=0):
            load_ms += part.speed.ms(num_read * bytes_per_token)
            load_ms -= part.speed.latency_ms if part.store in known else 0.0
            known.add(part.store)
            if (end := min(part.end_token, end_token)) > first_token:
                yield end, load_ms


def tier_loads(
    parts: Sequence[TierPart],
    first_token: int,
    end_token: int,
    bytes_per_token: int,
    *,
    read_from: int = 0,
) -> tuple[TierLoad, ...]:
    """Return what there is to load of the tokens from `first_token` to `end_token`; one load a store.

    Args:
        read_from: token from which disks and buckets would be read for that.
    """
    if not any(max(part.first_token, first_token) < min(part.end_token, end_token) for part in parts):
        return ()
    tokens: dict[TierPart, tuple[int, int]] = {}
    for part in parts:
        if num_read := _num_read(part, first_token, end_token, read_from=read_from):
            num_new = max(0, min(part.end_token, end_token) - max(part.first_token, first_token))
            kept = next((each for each in tokens if each.store == part.store), part)
            had_new, had_read = tokens.get(kept, (0, 0))
            tokens[kept] = had_new + num_new, had_read + num_read
    return tuple(
        TierLoad(
            store=part.store,
            tier=part.tier,
            num_tokens=num_new,
            num_bytes=num_read * bytes_per_token,
            ms=part.speed.ms(num_read * bytes_per_token),
            known=part.known,
            source=part.source,
        )
        for part, (num_new, num_read) in tokens.items()
    )


def _num_read(part: TierPart, first_token: int, end_token: int, *, read_from: int) -> int:
    """Return how many tokens of a part are read for those from `first_token` to `end_token`.

    A lookup brings into memory whatever disks and buckets have up to `end_token`, also what the engine has
    cached, as LMCache cannot be asked for less. From memory only what is missing is read.
    """
    first = max(part.first_token, first_token if part.tier is Tier.CPU else read_from)
    return max(0, min(part.end_token, end_token) - first)


def store_speed(measured: Speeds, store: str, server: str) -> StoreSpeed | None:
    """Return how fast a server reads a store; where it has not measured that, how fast another does."""
    by_server = measured.get(store, {})
    return by_server.get(server) or by_server.get("") or next(iter(by_server.values()), None)


# Every plan asks for the same ones, and a speed is checked when it is made.
@functools.lru_cache(maxsize=1024)
def _speed(gb_per_s: float, latency_ms: float) -> TierSpeed:
    return TierSpeed(gb_per_s=gb_per_s, latency_ms=latency_ms)


@functools.lru_cache(maxsize=1024)
def _through(measured: StoreSpeed, memory: TierSpeed) -> TierSpeed:
    return _speed(measured.gb_per_s, measured.latency_ms).then(memory)


class _Correction(NamedTuple):
    """By how much longer loads from a store took than its known speed says."""

    log_factor: float
    at_s: float
    known: TierSpeed
    """What was known then."""
    num_bytes: int
    """Of the load that told."""


class TierSpeeds:
    """How fast each store is: what was measured of it, or its tier's settings, corrected by first tokens.

    LMCache servers measure how KV comes into their memory, workers how it comes from there. What the access
    log tells beside that corrects it, and stands in for it where nobody measures.

    Args:
        given: by tier, from a store into an engine; `SPEEDS` for those that are not in it.
        clock: seconds.
    """

    def __init__(
        self, given: Mapping[Tier, TierSpeed] | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._given = SPEEDS | dict(given or {})
        self._clock = clock
        self._corrections: dict[tuple[str, Source], _Correction] = {}

    def known(self, tier: Tier, measured: StoreSpeed | None, load: Load | None) -> tuple[TierSpeed, Source]:
        """Return the speed from a store into an engine, uncorrected, and whence that is known.

        Args:
            measured: how KV comes from the store into a server's memory; of no use for memory itself.
            load: what the worker says of itself, how KV comes from there as well.
        """
        memory = None
        if load is not None and load.tier_gb_per_s > 0:
            memory = _speed(load.tier_gb_per_s, load.tier_latency_ms)
        if tier is Tier.CPU:
            return (memory, Source.MEASURED) if memory else (self._given[tier], Source.SETTINGS)
        if measured is None:
            return self._given[tier], Source.SETTINGS
        return _through(measured, memory or self._given[Tier.CPU]), Source.MEASURED

    def factor(self, store: str, known: TierSpeed, source: Source) -> float:
        """Return how many times as long as what is known says a load from a store is expected to take."""
        found = self._corrections.get((store, source))
        if found is None:
            return 1.0
        log_factor = found.log_factor * math.pow(0.5, (self._clock() - found.at_s) / HALF_LIFE_S)
        # What was found out by measuring since is not to be corrected as well.
        learned = math.log(known.ms(found.num_bytes) / found.known.ms(found.num_bytes))
        low, high = sorted((0.0, log_factor))
        return math.exp(log_factor - max(low, min(learned, high)))

    def parts(
        self,
        runs: Iterable[TierRun],
        server: str = "",
        measured: Speeds | None = None,
        load: Load | None = None,
    ) -> tuple[TierPart, ...]:
        """Return what a worker would load of a prompt, at the speeds of now.

        Args:
            runs: of `tier_runs`, for the worker.
            server: the LMCache server that it loads through.
            measured: by all servers.
            load: what the worker says of itself.
        """
        parts = []
        for store, first_token, end_token in runs:
            found = store_speed(measured or {}, store.name, server)
            known, source = self.known(store.tier, found, load)
            factor = self.factor(store.name, known, source)
            parts.append(
                TierPart(
                    store=store.name,
                    tier=store.tier,
                    first_token=first_token,
                    end_token=end_token,
                    speed=known.slower(factor) if factor != 1 else known,
                    known=known,
                    source=source,
                )
            )
        return tuple(parts)

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
            now = (load.store, load.source)
            # The prediction had the correction of then, which is that of now but for a few requests.
            factor = self.factor(load.store, load.known, load.source)
            moved = math.log(factor) + STEP * weight * surprise * load.ms / load_ms
            log_factor = max(-BOUND, min(moved, BOUND))
            self._corrections[now] = _Correction(log_factor, self._clock(), load.known, load.num_bytes)
