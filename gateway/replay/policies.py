"""How others send requests to workers, from their public descriptions.

Each is given more than it has in its own system, where that is simpler: all see first tokens and ends of
their own requests at once, loads as engines report them, and exact prompts.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Sequence

from gateway.profile import num_pairs
from gateway.replay.engine import Job
from gateway.replay.knowledge import History, InFlight, Told
from gateway.replay.simulation import FleetSpec


class PolicyName(enum.StrEnum):
    """What a run is called."""

    KVLANE = "kvlane"
    RANDOM = "random"
    ROUND_ROBIN = "round-robin"
    LEAST_REQUESTS = "least-requests"
    LEAST_TTFT = "least-ttft"
    PREFIX_TREE = "prefix-tree"
    WEIGHTED_SCORERS = "weighted-scorers"
    BLOCK_COST = "block-cost"


class _Tracking:
    """What the policies below share: they count what they sent, and decide when they are asked."""

    def __init__(self, fleet: FleetSpec, told: Told, seed: int) -> None:
        self.fleet = fleet
        self.told = told
        self.random = random.Random(seed)  # noqa: S311 (no secret)
        self.sent = InFlight(fleet.num_workers)
        self.workers = range(fleet.num_workers)

    async def look(self, job: Job, now_ms: float) -> None:
        """See `Policy`."""

    async def choose(self, job: Job, now_ms: float) -> int:
        """See `Policy`."""
        worker = self.pick(job)
        self.sent.sent(job, worker, self.work(job, worker))
        return worker

    def first_token(self, job: Job, now_ms: float) -> None:
        """See `Policy`."""
        self.sent.first_token(job)

    def finished(self, job: Job, now_ms: float) -> None:
        """See `Policy`."""
        self.sent.finished(job)

    def pick(self, job: Job) -> int:
        """Return the worker."""
        raise NotImplementedError

    def work(self, job: Job, worker: int) -> float:
        """Return what is counted as prefill in flight, in the policy's unit."""
        return 0.0

    def lowest(self, costs: Sequence[float]) -> int:
        """Return the worker of the lowest cost, any of several."""
        least = min(costs)
        return self.random.choice([worker for worker in self.workers if costs[worker] == least])


class Random(_Tracking):
    """Any worker."""

    def pick(self, job: Job) -> int:
        """See `_Tracking`."""
        return self.random.randrange(len(self.workers))


class RoundRobin(_Tracking):
    """One worker after the other."""

    def pick(self, job: Job) -> int:
        """See `_Tracking`."""
        return job.number // self.fleet.num_gateways % len(self.workers)


class LeastRequests(_Tracking):
    """The worker with the fewest requests in hand."""

    def pick(self, job: Job) -> int:
        """See `_Tracking`."""
        return self.lowest(self.sent.num_requests)


class LeastTtft(_Tracking):
    """The worker with the least prefill ahead, in time, as if nothing were ever cached."""

    def pick(self, job: Job) -> int:
        """See `_Tracking`."""
        return self.lowest(self.sent.prefill)

    def work(self, job: Job, worker: int) -> float:
        """See `_Tracking`: ms."""
        num_tokens = job.request.num_tokens
        return self.fleet.engine.profile.prefill_ms(num_tokens, num_pairs(num_tokens, 0))


class PrefixTree(_Tracking):
    """The longest prefix sent before, if it is more than half of the prompt; the fewest requests otherwise.

    Fewest requests also where the most loaded worker has over 32 requests and 10 % more than the least
    loaded one.

    Source: SGLang gateway (sgl-router), `cache_aware` policy and its defaults `cache_threshold` 0.5,
    `balance_abs_threshold` 32, `balance_rel_threshold` 1.1.
    """

    def __init__(self, fleet: FleetSpec, told: Told, seed: int) -> None:
        super().__init__(fleet, told, seed)
        self._history = History(fleet.num_workers, fleet.engine.num_blocks)

    def pick(self, job: Job) -> int:
        """See `_Tracking`."""
        requests, blocks = self.sent.num_requests, job.request.blocks
        most, least = max(requests), min(requests)
        worker = self.lowest(requests)
        if not (most - least > 32 and most > 1.1 * least):
            lengths = self._history.num_leading(blocks)
            if max(lengths) * self.fleet.engine.block_size > 0.5 * job.request.num_tokens:
                worker = self.lowest([-length for length in lengths])
        self._history.sent(worker, blocks)
        return worker


class WeightedScorers(_Tracking):
    """The highest sum of scores from 0 to 1: prefix times 3, short queue times 2, free KV cache times 2.

    Source: llm-d inference scheduler (Gateway API Inference Extension), default profile:
    prefix-cache-scorer 3, queue-scorer 2, kv-cache-utilization-scorer 2, max-score-picker. The prefix score
    is the share of the prompt's blocks that were sent there before, the queue's lies between the longest (0)
    and the shortest (1).
    """

    def __init__(self, fleet: FleetSpec, told: Told, seed: int) -> None:
        super().__init__(fleet, told, seed)
        self._history = History(fleet.num_workers, fleet.engine.num_blocks)

    def pick(self, job: Job) -> int:
        """See `_Tracking`."""
        loads, blocks = self.told.loads, job.request.blocks
        queues = [load.waiting_requests for load in loads]
        longest, spread = max(queues), max(queues) - min(queues)
        lengths = self._history.num_leading(blocks)
        scores = [
            3 * (length / len(blocks) if blocks else 0.0)
            + 2 * ((longest - queue) / spread if spread else 1.0)
            + 2 * (1 - load.kv_usage)
            for length, queue, load in zip(lengths, queues, loads, strict=True)
        ]
        worker = self.lowest([-score for score in scores])
        self._history.sent(worker, blocks)
        return worker


class BlockCost(_Tracking):
    """The lowest sum of blocks to prefill, those on their way included, and blocks being decoded.

    Source: NVIDIA Dynamo KV router, cost function at its defaults: overlap credit 1 for blocks on the device,
    prefill load scale 1, temperature 0; blocks from events, loads tracked in the router (prefill until the
    first token, decode until the end).
    """

    def pick(self, job: Job) -> int:
        """See `_Tracking`."""
        self._overlaps = self.told.num_leading(job.request.blocks)
        size, prefill, context = (
            self.fleet.engine.block_size,
            self.sent.prefill,
            self.sent.context_tokens,
        )
        return self.lowest(
            [
                max((prefill[each] + job.request.num_tokens) / size - self._overlaps[each], 0.0)
                + context[each] / size
                for each in self.workers
            ]
        )

    def work(self, job: Job, worker: int) -> float:
        """See `_Tracking`: tokens."""
        return job.request.num_tokens - self._overlaps[worker] * self.fleet.engine.block_size


OTHERS: dict[PolicyName, Callable[[FleetSpec, Told, int], _Tracking]] = {
    PolicyName.RANDOM: Random,
    PolicyName.ROUND_ROBIN: RoundRobin,
    PolicyName.LEAST_REQUESTS: LeastRequests,
    PolicyName.LEAST_TTFT: LeastTtft,
    PolicyName.PREFIX_TREE: PrefixTree,
    PolicyName.WEIGHTED_SCORERS: WeightedScorers,
    PolicyName.BLOCK_COST: BlockCost,
}
