"""Every Redis key of the index, what it holds and how long it lives.

A pool's keys share one hash tag, so that its scripts may touch all of them on a cluster. Scripts get
the directory as KEYS[1] and append the suffixes below, which `lua_names` hands them.

| key                      | type | holds                                           | until             |
|--------------------------|------|-------------------------------------------------|-------------------|
| kvlane:pools             | hash | pool id -> msgpack of the pool                  | never             |
| kvlane:gateways          | zset | gateways that share limits, by expiry           | expired           |
| kvlane:{pool}            | hash | number of buckets, sets of slots, counters      | never             |
| kvlane:{pool}:b:<bucket> | hash | 8-byte block hash -> set of slots               | emptied           |
| kvlane:{pool}:live       | str  | a `LIVE_ROW` a slot: lease, charge, load        | last slot fenced  |
| kvlane:{pool}:s:<slot>   | hash | worker, incarnation, sequence, count, digest,   | slot fenced       |
|                          |      | costs of its steps, or its speed, as JSON       |                   |
| kvlane:{pool}:ids        | hash | worker id -> its slot                           | slot fenced       |
| kvlane:{pool}:roles      | hash | worker id -> role that an operator gave it      | taken back        |
| kvlane:{pool}:drain      | hash | worker ids that are sent no more requests       | taken back        |
| kvlane:{pool}:res        | hash | decision id -> reservation (`RESERVATION`)      | settled, expired  |
| kvlane:{pool}:exp        | zset | decision ids by expiry                          | settled, expired  |
| kvlane:{pool}:pend       | hash | decision id -> what was sent to be computed     | computed, settled |
| kvlane:{pool}:r:<slot>   | zset | the slot's decision ids by creation             | settled or fenced |
| kvlane:{pool}:log        | strm | what happened to slots, the latest `LOG_EVENTS` | a day after all   |
| kvlane:{pool}:gone       | strm | batches of evicted blocks, `LOG_REMOVALS`       | workers have left |

Keys carry no TTL: what a dead worker or gateway leaves is purged by the scripts that others call. Only
the two logs of a pool without workers expire, a day after the sweep of the last one.
Times are milliseconds on the Redis clock. Numbers are little-endian; `<bucket>` is 4 bytes, `<slot>` decimal.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable

from kvindex.blocks import Pool
from kvindex.pending import MOST_PENDING

POOLS = "kvlane:pools"
GATEWAYS = "kvlane:gateways"

ABANDONED_AFTER_LEASES = 10
"""A worker is unmatched once its lease is over, and may resume with all its blocks until it has been
silent for this many leases; then `sweep` fences it."""

LOG_EVENTS = 10_000
"""Events of slots that a pool remembers; about 150 bytes each, so at most 2 MB."""

LOG_REMOVALS = 16_384
"""Batches of evicted blocks that a pool remembers. A batch takes some 40 bytes and 8 for each of its blocks,
which are 128 at most: 18 MB at the very most, 2 to 4 MB where an engine evicts a few blocks at a time."""

LOG_LEFT_S = 86_400
"""How long the logs of a pool without workers are kept."""

_SUFFIXES = {
    "BUCKET": ":b:",
    "LIVE": ":live",
    "SLOT": ":s:",
    "IDS": ":ids",
    "ROLES": ":roles",
    "DRAINING": ":drain",
    "RESERVATIONS": ":res",
    "EXPIRY": ":exp",
    "TAKEN": ":r:",
    "PENDING": ":pend",
    "LOG": ":log",
    "REMOVALS": ":gone",
}

LOAD = struct.Struct("<IIIIddfffff")
"""waiting requests, running requests, waiting prefill tokens, running tokens, KV usage, waiting pairs; GB/s
and ms of transfers, and of loads from tiers; share of prompts in time."""

LIVE_ROW = struct.Struct("<dIIII" + LOAD.format.removeprefix("<"))
"""lease expiry (ms), lease (ms), epoch, charged tokens, charged requests, load; zeros if fenced.

The epoch is the registry version at which the slot was opened: it tells a reservation made against
a former owner of the slot from one made against the present owner.
"""

RESERVATION = struct.Struct("<HII")
"""slot, epoch, prefill tokens."""

PENDING_HEAD = struct.Struct("<HIdB")
"""slot, epoch, expiry (ms), number of samples that follow."""

PENDING_SAMPLE = struct.Struct("<IQ")
"""depth in blocks, hash."""

FLEET_HEAD = struct.Struct("<dI")
"""time (ms), registry version; begins every answer about the fleet."""

STEP = struct.Struct("<HH")
"""number of leading probes, number of bytes of the set that follows: who holds the last of these probes."""

SLOT = struct.Struct("<H")
"""a member of a set of slots of even length; one of odd length is a bitmap (`scripts/prelude.lua`)."""


@functools.lru_cache(maxsize=256)
def directory(pool: Pool) -> str:
    """Return the key that stands for `pool`, KEYS[1] of every script."""
    return f"kvlane:{{{pool.pool_id}}}"


def bucket_key(pool: Pool, bucket: int) -> bytes:
    """Return the key of a bucket."""
    return f"{directory(pool)}{_SUFFIXES['BUCKET']}".encode() + bucket.to_bytes(4, "little")


def log_key(pool: Pool) -> str:
    """Return the key of what happened to slots."""
    return directory(pool) + _SUFFIXES["LOG"]


def removals_key(pool: Pool) -> str:
    """Return the key of the evicted blocks."""
    return directory(pool) + _SUFFIXES["REMOVALS"]


def fixed_keys(pool: Pool, slots: Iterable[int]) -> dict[str, list[str]]:
    """Return the keys that do not grow with the blocks, by what they hold."""
    slots = list(slots)
    base = directory(pool)
    one = {
        "directory": base,
        "worker ids": base + _SUFFIXES["IDS"],
        "roles": base + _SUFFIXES["ROLES"],
        "draining": base + _SUFFIXES["DRAINING"],
        "live rows": base + _SUFFIXES["LIVE"],
    }
    two = {"log of slots": log_key(pool), "log of evictions": removals_key(pool)}
    return {
        **{name: [key] for name, key in one.items()},
        "slots": [f"{base}{_SUFFIXES['SLOT']}{slot}" for slot in slots],
        "reservations": [base + _SUFFIXES[name] for name in ("RESERVATIONS", "EXPIRY", "PENDING")],
        "reservations by slot": [f"{base}{_SUFFIXES['TAKEN']}{slot}" for slot in slots],
        **{name: [key] for name, key in two.items()},
    }


def lua_names() -> str:
    """Return the key names as Lua locals, to be put before every script."""
    lines = ["local DIRECTORY = KEYS[1]"]
    lines += [f"local {name} = DIRECTORY .. '{suffix}'" for name, suffix in _SUFFIXES.items()]
    numbers = {
        "ABANDONED_AFTER_LEASES": ABANDONED_AFTER_LEASES,
        "MOST_PENDING": MOST_PENDING,
        "LOG_EVENTS": LOG_EVENTS,
        "LOG_REMOVALS": LOG_REMOVALS,
        "LOG_LEFT_S": LOG_LEFT_S,
    }
    lines += [f"local {name} = {value}" for name, value in numbers.items()]
    return "\n".join([*lines, ""])
