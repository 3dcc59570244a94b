"""Tiers in a simulation: what nodes and an object store keep of what was computed, and what reading it takes.

Every block that an engine has computed is kept in all tiers at once, as LMCache does by default; the least
recently used goes first. A worker reads one load at a time from each tier.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gateway.tiers import TierSpeed
from kvindex.errors import ConfigError
from kvindex.worker import Tier

_FORM = "cpu=SIZE@GB_PER_S[@LATENCY_MS], and disk and object alike: cpu=500GB@20@5"
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
_TIER = re.compile(r"(cpu|disk|object)=([0-9.]+)([MGTP]B)@([0-9.]+)(?:@([0-9.]+))?")


@dataclass(frozen=True, slots=True)
class TierSpec:
    """One tier of every worker; an object store is one for all."""

    tier: Tier
    capacity_bytes: int
    speed: TierSpeed


def parse_tier(text: str) -> TierSpec:
    """Read what `--tier` says.

    Raises:
        ConfigError: it cannot be read.
    """
    found = _TIER.fullmatch(text)
    if found is None:
        raise ConfigError(f"--tier {text}: write {_FORM}")
    tier, size, unit, gb_per_s, latency_ms = found.groups()
    try:
        capacity_bytes = int(float(size) * _UNITS[unit])
        speed = TierSpeed(gb_per_s=float(gb_per_s), latency_ms=float(latency_ms or 0))
    except ValueError as error:
        raise ConfigError(f"--tier {text}: write {_FORM}") from error
    return TierSpec(Tier(tier), capacity_bytes, speed)


def read_tiers(texts: Iterable[str]) -> tuple[TierSpec, ...]:
    """Read every `--tier`; return the tiers, fastest first.

    Raises:
        ConfigError: one cannot be read, or is named twice.
    """
    tiers = sorted(map(parse_tier, texts), key=lambda each: list(Tier).index(each.tier))
    if len({each.tier for each in tiers}) < len(tiers):
        raise ConfigError("--tier: each of cpu, disk and object may be named once")
    return tuple(tiers)


def store_specs(tiers: Sequence[TierSpec], num_workers: int) -> Iterator[tuple[str, TierSpec]]:
    """Yield the fleet's stores by name: each worker's in turn, then those that all share."""
    for worker in range(num_workers):
        for spec in tiers:
            if spec.tier is not Tier.OBJECT:
                yield f"{worker}/{spec.tier}", spec
    for spec in tiers:
        if spec.tier is Tier.OBJECT:
            yield spec.tier, spec


def reached_by(tiers: Sequence[TierSpec], worker: int) -> tuple[str, ...]:
    """Return the names of the stores that a worker reads, in the order of `tiers`."""
    return tuple(spec.tier if spec.tier is Tier.OBJECT else f"{worker}/{spec.tier}" for spec in tiers)


class _Store:
    def __init__(self, spec: TierSpec, block_bytes: int) -> None:
        self.spec = spec
        self.num_blocks = spec.capacity_bytes // block_bytes
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def keep(self, blocks: Sequence[int]) -> dict[int, bool]:
        changes: dict[int, bool] = {}
        for block in blocks:
            if block not in self.blocks:
                changes[block] = True
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.num_blocks:
            evicted, _ = self.blocks.popitem(last=False)
            if changes.pop(evicted, None) is None:
                changes[evicted] = False
        return changes


class SimulatedTiers:
    """All stores of a fleet.

    Args:
        block_bytes: KV of one block.
    """

    def __init__(self, tiers: Sequence[TierSpec], num_workers: int, block_bytes: int) -> None:
        named = list(store_specs(tiers, num_workers))
        places = {name: place for place, (name, _) in enumerate(named)}
        self._stores = [_Store(spec, block_bytes) for _, spec in named]
        self._reached = [
            [places[name] for name in reached_by(tiers, worker)] for worker in range(num_workers)
        ]
        self._free_ms: dict[tuple[int, int], float] = {}
        self._block_bytes = block_bytes

    def keep(self, worker: int, blocks: Sequence[int]) -> Iterator[tuple[int, dict[int, bool]]]:
        """Keep what a worker has computed; yield what changed, by the place of the store."""
        for place in self._reached[worker] if blocks else ():
            if changes := self._stores[place].keep(blocks):
                yield place, changes

    def load(self, worker: int, blocks: Sequence[int], num_cached: int, now_ms: float) -> tuple[int, float]:
        """Read what tiers have of a prompt behind its cached blocks; from disk and object store, all of it.

        Returns:
            How many leading blocks the worker has then, 0 if nothing was read, and when it has them.
        """
        num_blocks: dict[int, int] = {}
        has_more = False
        end = 0
        for end, block in enumerate(blocks):
            place = next((each for each in self._reached[worker] if block in self._stores[each].blocks), None)
            if place is None:
                break
            self._stores[place].blocks.move_to_end(block)
            if end >= num_cached or self._stores[place].spec.tier is not Tier.CPU:
                num_blocks[place] = num_blocks.get(place, 0) + 1
            has_more |= end >= num_cached
        else:
            end = len(blocks)
        if not has_more:
            return 0, now_ms
        ready_ms = now_ms
        for place, count in num_blocks.items():
            speed = self._stores[place].spec.speed
            began_ms = max(ready_ms, self._free_ms.get((worker, place), 0.0))
            ready_ms = began_ms + speed.latency_ms + count * self._block_bytes / (speed.gb_per_s * 1e6)
            self._free_ms[worker, place] = ready_ms
        return end, ready_ms
