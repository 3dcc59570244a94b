"""The peer of the index bench: the radix tree in process memory of `ai-dynamo-runtime`, a bench-only install.

Source: ai-dynamo-runtime 1.6 `dynamo.llm.RadixTree`: a stored event is JSON with the parent's hash and, for
each block, its hash and that of its tokens; here both are the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from gateway.bench.index_fleet import PROMPT_BLOCKS, percentile, random_from, random_hashes, the_prompt

NAME = "dynamo RadixTree, in process"
_MASK = (1 << 63) - 1
"""Its hashes are signed in JSON."""


class Tree(Protocol):
    """What is used of the peer."""

    def apply_event(self, worker_id: int, kv_cache_event_bytes: bytes) -> None:
        """Take an event in."""

    def find_matches(self, sequence: Sequence[int]) -> object:
        """Find how far each worker holds the sequence."""


def reference(what: str, measure: Callable[..., float], *arguments: object) -> tuple[str, float | None]:
    """Return what a figure has beside it: `measure(tree, *arguments)`, taken in a process of its own."""
    if importlib.util.find_spec("dynamo") is None:
        return f"absent: {NAME} (pip install --no-deps ai-dynamo-runtime)", None
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return f"{NAME}{what}", process.apply(_with_tree, (measure, *arguments))


def match_p50_ms(
    tree: Tree, depths: Callable[[int], Iterator[int]], num_workers: int, num_calls: int
) -> float:
    """Find the benches' prompt, which each worker holds to its depth."""
    prompt = [block & _MASK for block in the_prompt()]
    for number, depth in enumerate(depths(num_workers)):
        tree.apply_event(number, _stored(number, None, prompt[:depth]))
    took_ms = []
    for _ in range(num_calls):
        began_s = time.perf_counter()
        tree.find_matches(prompt)
        took_ms.append((time.perf_counter() - began_s) * 1_000)
    return percentile(took_ms, 50)


def bytes_per_block(tree: Tree, num_blocks: int) -> float:
    """Store runs of 512 random blocks, each held by two of 8 workers."""
    rng = random_from(0)
    before = _resident_bytes()
    num_runs = -(-num_blocks // 512)
    for number in range(num_runs):
        run = [block & _MASK for block in random_hashes(rng, 512)]
        for holder in rng.sample(range(8), 2):
            tree.apply_event(holder, _stored(number, None, run))
    tree.find_matches([])  # events are taken in by a thread of its own, in order
    return (_resident_bytes() - before) / (512 * num_runs)


def stores_per_s(tree: Tree, num_blocks: int) -> float:
    """Store blocks one by one, events ready made."""
    blocks = [block & _MASK for block in random_hashes(random_from(0), num_blocks)]
    events = [
        _stored(number, blocks[number - 1] if number % PROMPT_BLOCKS else None, [block])
        for number, block in enumerate(blocks)
    ]
    began_s = time.perf_counter()
    for event in events:
        tree.apply_event(0, event)
    tree.find_matches(blocks[:1])
    return num_blocks / (time.perf_counter() - began_s)


def _with_tree(measure: Callable[..., float], *arguments: object) -> float:
    return measure(importlib.import_module("dynamo.llm").RadixTree(), *arguments)


def _stored(number: int, parent: int | None, hashes: Sequence[int]) -> bytes:
    blocks = [{"block_hash": block, "tokens_hash": block} for block in hashes]
    event = {"event_id": number, "data": {"stored": {"parent_hash": parent, "blocks": blocks}}}
    return msgspec.json.encode(event)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
