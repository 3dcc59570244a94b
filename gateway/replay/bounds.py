"""What no placement can beat: with the caches there are, and with every cache one could wish for."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence

from gateway.profile import num_pairs
from gateway.replay.engine import EngineSpec
from gateway.replay.trace import Trace


def pooled_hits(trace: Trace, num_blocks: float) -> list[int]:
    """Return each request's cached tokens if the fleet had one cache of `num_blocks`, LRU.

    Placement can only divide this cache and hold things twice. Answers take room in it, as in a fleet; that
    blocks of running requests cannot be evicted is left out.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    answers = itertools.count(-1, -1)
    hits = []
    for request in trace.requests:
        usable = request.blocks[: (request.num_tokens - 1) // trace.block_size]
        num_cached = next((depth for depth, block in enumerate(usable) if block not in cache), len(usable))
        hits.append(num_cached * trace.block_size)
        num_tokens = request.num_tokens + request.num_output_tokens
        num_answer_blocks = num_tokens // trace.block_size - len(request.blocks) if request.blocks else 0
        for block in (*itertools.islice(answers, num_answer_blocks), *reversed(request.blocks)):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > num_blocks:
            cache.popitem(last=False)
    return hits


def hit_rate(trace: Trace, hits: Sequence[int]) -> float:
    """Return the share of prompt tokens that are in `hits`."""
    return sum(hits) / sum(request.num_tokens for request in trace.requests)


def oracle_ttfts_ms(trace: Trace, engine: EngineSpec) -> list[float]:
    """Return times to first token with one infinite cache and nobody else to wait for."""
    profile = engine.profile
    ttfts_ms = []
    for request, num_cached in zip(trace.requests, pooled_hits(trace, math.inf), strict=True):
        num_tokens = request.num_tokens - num_cached
        num_steps = -(-num_tokens // engine.max_num_batched_tokens)
        prefill_ms = profile.prefill_ms(num_tokens, num_pairs(num_tokens, num_cached))
        ttfts_ms.append(prefill_ms + num_steps * profile.step_ms)
    return ttfts_ms
