"""What a gateway of another system knows: what it sent itself, what engines tell."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from gateway.replay.engine import Job
from kvindex.worker import Load


class InFlight:
    """What one gateway has sent and not seen the end of, by worker."""

    def __init__(self, num_workers: int) -> None:
        self.num_requests = [0] * num_workers
        self.prefill = [0.0] * num_workers
        """Work before the first tokens that are still to come, in the policy's own unit."""
        self.context_tokens = [0] * num_workers
        """Prompts of the requests in hand."""
        self._work: dict[int, float] = {}

    def sent(self, job: Job, worker: int, work: float = 0.0) -> None:
        """Add a request."""
        self.num_requests[worker] += 1
        self.prefill[worker] += work
        self.context_tokens[worker] += job.request.num_tokens
        self._work[job.number] = work

    def first_token(self, job: Job) -> None:
        """Take off its prefill."""
        self.prefill[job.worker] -= self._work.pop(job.number, 0.0)

    def finished(self, job: Job) -> None:
        """Take off the rest of it."""
        self.num_requests[job.worker] -= 1
        self.context_tokens[job.worker] -= job.request.num_tokens


class History:
    """Which prefixes went where: a guess at what workers hold, known at once and never corrected.

    Args:
        num_blocks: what a worker is taken to hold; the least recently sent goes first.
    """

    def __init__(self, num_workers: int, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._sent: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_workers)]

    def num_leading(self, blocks: Sequence[int]) -> list[int]:
        """Return how many of the leading `blocks` went to each worker."""
        return [_num_leading(blocks, sent) for sent in self._sent]

    def sent(self, worker: int, blocks: Sequence[int]) -> None:
        """Remember that a prompt went there."""
        sent = self._sent[worker]
        for block in reversed(blocks):
            sent[block] = None
            sent.move_to_end(block)
        while len(sent) > self._num_blocks:
            sent.popitem(last=False)


class Told:
    """What engines have told by now: their blocks and their load. Implements `Surroundings`."""

    def __init__(self, num_workers: int) -> None:
        self.loads = [Load()] * num_workers
        self._blocks: list[set[int]] = [set() for _ in range(num_workers)]

    def num_leading(self, blocks: Sequence[int]) -> list[int]:
        """Return how many of the leading `blocks` each worker holds."""
        return [_num_leading(blocks, held) for held in self._blocks]

    def changed(self, worker: int, changes: Mapping[int, bool], now_ms: float) -> None:
        """See `Surroundings`."""
        held = self._blocks[worker]
        for block, is_stored in changes.items():
            (held.add if is_stored else held.discard)(block)

    def kept(self, store: int, changes: Mapping[int, bool], now_ms: float) -> None:
        """See `Surroundings`. No other system's router is told of them."""

    def reported(self, worker: int, load: Load, accepted: Sequence[str], now_ms: float) -> None:
        """See `Surroundings`."""
        self.loads[worker] = load


def _num_leading(blocks: Sequence[int], held: set[int] | OrderedDict[int, None]) -> int:
    for depth, block in enumerate(blocks):
        if block not in held:
            return depth
    return len(blocks)
