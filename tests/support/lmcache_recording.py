"""What real LMCache servers told a coordinator, in tests/data."""

import functools
import json
from collections.abc import Iterator
from typing import Any

from tests.support.recordings import DATA


@functools.cache
def recorded_lines() -> tuple[dict[str, Any], ...]:
    """Return every request (t, m, p, b), and lines with `mark` that say what was being done."""
    lines = (DATA / "lmcache_0.5.6_coordinator.jsonl").read_text().splitlines()
    return tuple(map(json.loads, lines))


def recorded_entries() -> Iterator[dict[str, Any]]:
    """Yield the entries of all events."""
    for line in recorded_lines():
        for batch in (line.get("b") or {}).get("batches", ()):
            yield from batch["entries"]
