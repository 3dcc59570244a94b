"""A simulated engine: continuous batching, chunked prefill, a block cache, and a clock made of steps.

Source: vLLM 0.32 `vllm/v1/core/sched/scheduler.py`, schedule: every running request first, one token for each
that decodes, then as much of the waiting prompts as the step's token budget and the cache allow, first come
first served. Simplified: an answer's blocks are held from the start, so that nothing is ever preempted.

Of a split request one engine computes the prompt and keeps its blocks until they have been sent; the other
takes room for them, lets those behind it pass while they come, and computes the last token again.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from dataclasses import dataclass, field, replace

from gateway.profile import Profile, num_pairs
from gateway.replay.block_cache import Allocation, BlockCache
from gateway.replay.trace import TraceRequest
from gateway.replay.wire import Transfer
from kvindex.recent import RecentShare
from kvindex.worker import Load

GAP_MS = 0.01
"""How finely times between tokens are told apart."""


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way, or its prefill half, and what became of it. Times in ms of simulated time."""

    number: int
    request: TraceRequest
    arrived_ms: float
    worker: int = -1
    decision_id: str = ""
    cached_tokens: int = 0
    computed_tokens: int = 0
    loaded_blocks: int = 0
    """Leading blocks that are there once the tiers have been read; 0 where they are not."""
    load_limit_tokens: int | None = None
    """Leading tokens that the engine reads tiers for; None: all that they hold."""
    loaded_tokens: int = 0
    """Of the cached ones, those that came from tiers."""
    step_tokens: int = 0
    """Of the computed ones, those of the step under way."""
    first_token_ms: float = math.nan
    finished_ms: float = math.nan
    allocation: Allocation | None = None
    prefill: Job | None = None
    """The half of it that another worker has."""
    transfer: Transfer | None = None
    """Of a split request's halves, the same for both."""
    is_prefill: bool = False
    """Whether it is such a half; its blocks are held until `Engine.release`."""
    awaits_kv: bool = False
    """Whether another worker computes its prompt, and has not sent all of it."""

    def split(self, worker: int, decision_id: str, load_limit_tokens: int | None = None) -> None:
        """Have the prompt computed by `worker`, under a decision of its own."""
        self.prefill = Job(
            self.number,
            replace(self.request, num_output_tokens=1),
            self.arrived_ms,
            worker=worker,
            decision_id=decision_id,
            load_limit_tokens=load_limit_tokens,
            is_prefill=True,
        )
        self.awaits_kv, self.load_limit_tokens = True, 0

    @property
    def num_hit_tokens(self) -> int:
        """Prompt tokens that nobody had to compute."""
        return (self.prefill or self).cached_tokens

    @property
    def num_loaded_tokens(self) -> int:
        """Of these, those that came from tiers."""
        return (self.prefill or self).loaded_tokens

    @property
    def ttft_ms(self) -> float:
        """Time to first token."""
        return self.first_token_ms - self.arrived_ms

    @property
    def e2e_ms(self) -> float:
        """Time to last token."""
        return self.finished_ms - self.arrived_ms


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What every engine of a simulated fleet is like."""

    profile: Profile
    num_blocks: int
    block_size: int
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    bytes_per_token: int = 1
    """KV of a token, which is what tiers move."""


@dataclass(slots=True)
class Ended:
    """What a step brought to an end."""

    first_tokens: list[Job] = field(default_factory=list)
    finished: list[Job] = field(default_factory=list)
    computed: list[tuple[Job, int]] = field(default_factory=list)
    """Prefill halves, and how many tokens of their prompts are computed now."""


class Engine:
    """One worker. `submit` and `wake` move it on; `wake_ms` says when it wants to be woken next."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.cache = BlockCache(spec.num_blocks)
        self.wake_ms = math.inf
        self.busy_ms = 0.0
        self.num_gaps: Counter[int] = Counter()
        """Tokens by the time since the one before in the same answer, in `GAP_MS`."""
        self.waiting: deque[Job] = deque()
        self.asking: list[Job] = []
        """Requests that have room for their KV now; whoever reads them takes them away."""
        self._receiving: set[Job] = set()
        self._sending: list[tuple[Job, int]] = []
        self._prefilling: list[Job] = []
        self._decoding: list[tuple[int, int, Job]] = []
        self._context_tokens = 0
        self._decoded_steps = 0
        self._began_ms = 0.0
        self._prefilling_time = RecentShare()
        self._num_steps = 0
        self._is_prefill = False
        self._prefilled: list[Job] = []

    @property
    def is_busy(self) -> bool:
        """Whether a step is under way."""
        return self.wake_ms != math.inf

    def submit(self, job: Job, now_ms: float) -> None:
        """Take `job` in; it is looked at when the present step is over."""
        job.cached_tokens = max(self.usable_blocks(job), job.loaded_blocks) * self.spec.block_size
        self.waiting.append(job)
        self._look(now_ms)

    def received(self, job: Job, now_ms: float) -> None:
        """Go on with a request whose KV has come."""
        self._receiving.remove(job)
        job.awaits_kv = False
        job.computed_tokens = job.request.num_tokens - 1
        if job.allocation is not None:
            full = job.request.num_tokens // self.spec.block_size
            self.cache.fill(job.allocation, job.request.blocks[len(job.allocation.blocks) : full])
        self.waiting.appendleft(job)
        self._look(now_ms)

    def release(self, job: Job, now_ms: float) -> None:
        """Let go of the blocks of a prefill half."""
        if job.allocation is not None:
            self.cache.free(job.allocation, 0)
            job.allocation = None
        if self.waiting:
            self._look(now_ms)

    def _look(self, now_ms: float) -> None:
        """Look at what waits as soon as the present step is over."""
        if self.wake_ms == math.inf:
            self._begin(now_ms)
        elif not self._is_prefill:
            self._cut_short(now_ms)

    def wake(self, now_ms: float) -> Ended:
        """End the present steps and begin the next."""
        ended = self._end(now_ms)
        self._begin(now_ms)
        return ended

    def load(self, now_ms: float) -> Load:
        """Return what the engine would report now."""
        running = [*self._prefilling, *self._prefilled]
        waiting = [*self.waiting, *running]
        return Load(
            waiting_requests=len(self.waiting) + len(self._receiving),
            running_requests=len(running) + len(self._decoding),
            waiting_prefill_tokens=sum(job.request.num_tokens - _done_tokens(job) for job in waiting)
            + len(self._receiving),
            running_tokens=self._context_tokens,
            kv_usage=self.cache.num_used_blocks / self.cache.num_blocks,
            waiting_prefill_pairs=sum(_pairs_left(job) for job in waiting),
            prefill_share=round(16 * self._prefilling_time.at(now_ms / 1e3)) / 16,
        )

    def _end(self, now_ms: float) -> Ended:
        ended = Ended(computed=self._sending)
        self._sending = []
        self.busy_ms += now_ms - self._began_ms
        if self._is_prefill:
            self._prefilling_time.add(self._began_ms / 1e3, now_ms / 1e3)
        if self._decoding:
            gap = round((now_ms - self._began_ms) / self._num_steps / GAP_MS)
            num_tokens = self._num_steps * len(self._decoding)
            self.num_gaps[gap] = self.num_gaps.get(gap, 0) + num_tokens
        self._decoded_steps += self._num_steps
        self._context_tokens += self._num_steps * len(self._decoding)
        for job in self._prefilled:
            job.first_token_ms = now_ms
            ended.first_tokens.append(job)
            last = self._decoded_steps + job.request.num_output_tokens - 1
            heapq.heappush(self._decoding, (last, job.number, job))
            self._context_tokens += job.request.num_tokens + 1
        self._prefilled = []
        while self._decoding and self._decoding[0][0] <= self._decoded_steps:
            job = heapq.heappop(self._decoding)[2]
            self._finish(job, now_ms)
            ended.finished.append(job)
        return ended

    def _finish(self, job: Job, now_ms: float) -> None:
        num_tokens = job.request.num_tokens + job.request.num_output_tokens
        self._context_tokens -= num_tokens
        job.finished_ms = now_ms
        if job.allocation is not None and not job.is_prefill:
            num_full = num_tokens // self.spec.block_size
            num_generated = max(0, num_full - len(job.allocation.blocks))
            self.cache.free(job.allocation, num_generated)
            job.allocation = None

    def _begin(self, now_ms: float) -> None:
        profile = self.spec.profile
        self._began_ms = now_ms
        num_decoding = len(self._decoding)
        prefill_ms = self._schedule_prefill(self.spec.max_num_batched_tokens - num_decoding)
        self._is_prefill = bool(prefill_ms)
        step_ms = profile.shared_step_ms(num_decoding, self._context_tokens)
        if self._is_prefill:
            self._num_steps = 1
            self.wake_ms = now_ms + step_ms + prefill_ms
        elif num_decoding:
            self._num_steps = self._decoding[0][0] - self._decoded_steps
            self.wake_ms = now_ms + self._stretch_ms(self._num_steps)
        else:
            self._num_steps = 0
            self.wake_ms = math.inf

    def _schedule_prefill(self, budget: int) -> float:
        """Give the budget to prompts; return what they add to the step."""
        prefill_ms = 0.0
        going_on: list[Job] = []
        for job in self._prefilling:
            prefill_ms += self._compute(job, budget)
            budget -= self._computed
            (self._prefilled if job.computed_tokens == job.request.num_tokens else going_on).append(job)
        num_running = len(self._decoding) + len(self._prefilled) + len(going_on)
        while budget > 0 and self.waiting and num_running < self.spec.max_num_seqs:
            job = self.waiting[0]
            if job.allocation is None and not self._admit(job):
                break
            self.waiting.popleft()
            if job.awaits_kv:
                self._receiving.add(job)
                self.asking.append(job)
                continue
            num_running += 1
            prefill_ms += self._compute(job, budget)
            budget -= self._computed
            (self._prefilled if job.computed_tokens == job.request.num_tokens else going_on).append(job)
        self._prefilling = going_on
        return prefill_ms

    def _admit(self, job: Job) -> bool:
        request, block_size = job.request, self.spec.block_size
        num_cached = self.usable_blocks(job)
        num_blocks = -(-(request.num_tokens + request.num_output_tokens) // block_size)
        job.allocation = self.cache.allocate(request.blocks[:num_cached], num_blocks - num_cached)
        if job.allocation is None:
            return False
        num_found = max(num_cached, job.loaded_blocks)
        self.cache.fill(job.allocation, request.blocks[num_cached:num_found])
        job.loaded_tokens = (num_found - num_cached) * block_size
        job.cached_tokens = job.computed_tokens = num_found * block_size
        return True

    def usable_blocks(self, job: Job) -> int:
        """Return the leading blocks that are cached and leave at least one token to compute."""
        usable = (job.request.num_tokens - 1) // self.spec.block_size
        return self.cache.num_leading(job.request.blocks[:usable])

    def _compute(self, job: Job, budget: int) -> float:
        """Compute the next chunk of a prompt; its blocks can be found from now on."""
        num_tokens = min(budget, job.request.num_tokens - job.computed_tokens)
        self._computed = num_tokens
        if num_tokens <= 0:
            return 0.0
        pairs = num_pairs(num_tokens, job.computed_tokens)
        job.computed_tokens += num_tokens
        job.step_tokens = num_tokens
        if job.is_prefill:
            self._sending.append((job, job.computed_tokens))
        allocation = job.allocation
        if allocation is not None and job.request.blocks:
            full = job.computed_tokens // self.spec.block_size
            self.cache.fill(allocation, job.request.blocks[len(allocation.blocks) : full])
        return self.spec.profile.prefill_ms(num_tokens, pairs)

    def _stretch_ms(self, num_steps: int) -> float:
        """Return the time of so many steps in which nothing but decoding happens."""
        linear, square = self._stretch()
        return num_steps * linear + num_steps * num_steps * square

    def _stretch(self) -> tuple[float, float]:
        profile, num_decoding = self.spec.profile, len(self._decoding)
        square = num_decoding * profile.decode_ns_per_token / 2e6
        return profile.shared_step_ms(num_decoding, self._context_tokens) - square, square

    def _cut_short(self, now_ms: float) -> None:
        """End a stretch of decoding with the step that is under way."""
        linear, square = self._stretch()
        passed_ms = now_ms - self._began_ms
        if square:
            root = math.sqrt(linear * linear + 4 * square * passed_ms)
            num_steps = math.ceil((root - linear) / (2 * square))
        else:
            num_steps = math.ceil(passed_ms / linear) if linear else 1
        num_steps = max(1, num_steps)
        if num_steps < self._num_steps:
            self._num_steps = num_steps
            self.wake_ms = max(now_ms, self._began_ms + self._stretch_ms(num_steps))


def _done_tokens(job: Job) -> int:
    """Return the tokens that the engine reports as computed: half of the step under way is over, it assumes.

    Source: `vllm_plugin/load.py`.
    """
    return (job.computed_tokens - job.step_tokens // 2) or job.cached_tokens


def _pairs_left(job: Job) -> float:
    done_tokens = _done_tokens(job)
    return num_pairs(job.request.num_tokens - done_tokens, done_tokens)
