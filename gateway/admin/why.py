"""Why a worker did not hold more of a prompt: a pure function of receipts and of what the index remembers."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from gateway.chains import Chain, Common, common_blocks, common_contents
from gateway.plan import Choice
from gateway.receipts import Receipt
from kvindex.blocks import BlockHash, format_hash
from kvindex.history import EventKind, PoolEvent, Removal


class Reason(enum.StrEnum):
    """Why the first block that missed was not there."""

    HELD = "held"
    """It held the whole prompt, or the prompt has no full block."""
    NEVER_STORED = "never_stored"
    """No earlier request on record has the block."""
    TOKENS_DIFFER = "tokens_differ"
    """The closest earlier request has other tokens there."""
    OTHER_LORA = "other_lora"
    """The same tokens were stored under another LoRA adapter or base model."""
    OTHER_SALT = "other_salt"
    """The same tokens were stored under another cache salt."""
    ELSEWHERE = "elsewhere"
    """Earlier requests with the block went to other workers only."""
    EVICTED = "evicted"
    CLEARED = "cleared"
    """The engine reset its prefix cache."""
    RESTARTED = "restarted"
    """The worker's process is not the one that stored the block."""
    JOINED = "joined"
    """The worker joined after the requests with the block, which others served."""
    RESYNCED = "resynced"
    """The worker was sending its whole state again."""
    COMPUTING = "computing"
    """The request that stores the block had not been answered yet."""
    BEHIND = "behind"
    """The block was stored before the decision and reached the index after it."""
    GONE = "gone"
    """The worker had the block, and the index does not remember what became of it."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one worker and one prompt."""

    worker: str
    overlap_blocks: int
    num_blocks: int
    """Full blocks of the prompt."""
    reason: Reason
    detail: str
    """One line for people."""
    missed_tokens: tuple[int, int] | None = None
    """First token of the block that missed, and the token before which the miss is certain."""
    block: str | None = None
    """Hash of the block that ends there."""
    at_ms: int | None = None
    """When the index was told of what took the block away."""
    earlier: str | None = None
    """Decision id of the earlier request that the reason leans on."""
    holders_now: tuple[str, ...] = ()
    """Workers that hold the block at this moment."""
    tiers: tuple[str, ...] = ()
    """What stores outside the engine had behind the held blocks, and what was made of it: a line each."""


@dataclass(frozen=True)
class Memory:
    """What is remembered of the time before a decision."""

    earlier: Sequence[Receipt] = ()
    """Newest first."""
    events: Sequence[PoolEvent] = ()
    removals: Sequence[Removal] = ()
    """Of the blocks in question; oldest first."""
    removals_since_ms: int = 0
    """What was removed before is forgotten; 0 if nothing is."""
    holders_now: Mapping[BlockHash, Collection[str]] = field(default_factory=dict)


class Missed(msgspec.Struct, frozen=True):
    """The first block of a chain that a worker did not hold, as exactly as chain and overlap tell it."""

    chain: Chain
    held_blocks: int
    depth_blocks: int
    """The prefix of this many blocks was not held for certain."""

    @property
    def block(self) -> BlockHash:
        """The hash of that prefix."""
        return self.chain.block(self.depth_blocks)

    @property
    def tokens(self) -> tuple[int, int]:
        """The range of tokens within which the miss begins."""
        size = self.chain.pool.block_size
        return self.held_blocks * size, self.depth_blocks * size


def chain_of(receipt: Receipt, choice: Choice) -> Chain | None:
    """Return the chain that was looked up in the candidate's pool."""
    pool = choice.candidate.worker.pool
    return next((chain for chain in receipt.chains if chain.pool == pool), None)


def first_missed(receipt: Receipt, choice: Choice) -> Missed | None:
    """Return the first block that the candidate did not hold; None if it held all that is known."""
    chain, held = chain_of(receipt, choice), choice.candidate.overlap_blocks
    if chain is None or held >= chain.num_blocks:
        return None
    certain = min(held + chain.overlap_stride, chain.num_blocks)
    depth = chain.depth_at_least(certain)
    return None if depth is None else Missed(chain, held, depth)


def subjects(receipt: Receipt, worker: str | None = None) -> dict[str, Choice]:
    """Return the candidates worth explaining: the chosen one, one that held more, and the one asked for."""
    if not receipt.choices:
        return {}
    found = {"chosen": receipt.choices[0]}
    best = max(receipt.choices, key=lambda choice: choice.candidate.overlap_blocks)
    if best.candidate.overlap_blocks > receipt.choices[0].candidate.overlap_blocks:
        found["best_holder"] = best
    for choice in receipt.choices:
        if choice.candidate.worker.worker_id == worker and choice not in found.values():
            found["asked_for"] = choice
    return found


def explain(receipt: Receipt, choice: Choice, memory: Memory) -> Finding:
    """Return why the candidate did not hold more of the prompt at the time of the decision."""
    missed = first_missed(receipt, choice)
    worker, held = choice.candidate.worker.worker_id, choice.candidate.overlap_blocks
    if missed is None:
        chain = chain_of(receipt, choice)
        return Finding(
            worker=worker,
            overlap_blocks=held,
            num_blocks=chain.num_blocks if chain else 0,
            reason=Reason.HELD,
            detail=_all_held(receipt, choice),
            tiers=_tiers(choice),
        )
    cause = _Search(receipt, choice, missed, memory).cause()
    return Finding(
        worker=worker,
        overlap_blocks=held,
        num_blocks=missed.chain.num_blocks,
        reason=cause.reason,
        detail=cause.detail,
        missed_tokens=missed.tokens,
        block=format_hash(missed.block),
        at_ms=cause.at_ms,
        earlier=cause.earlier.decision_id if cause.earlier else None,
        holders_now=tuple(sorted(memory.holders_now.get(missed.block, ()))),
        tiers=_tiers(choice),
    )


def _tiers(choice: Choice) -> tuple[str, ...]:
    computed = "computed, since that was predicted to be faster"
    return tuple(
        f"{load.num_tokens:,} tokens in {load.store} ({load.tier}), {load.ms:,.0f} ms to load: {made}"
        for loads, made in ((choice.loads, "loaded"), (choice.passed_over, computed))
        for load in loads
    )


def _all_held(receipt: Receipt, choice: Choice) -> str:
    chain = chain_of(receipt, choice)
    if chain is None or chain.num_blocks == 0:
        return "the prompt has no full block that could be held"
    if choice.candidate.overlap_blocks >= chain.num_blocks:
        return "it held every full block of the prompt"
    return f"it held all but less than {chain.stride} blocks, which is as exact as the receipt is"


@dataclass(frozen=True)
class _Cause:
    reason: Reason
    detail: str
    at_ms: int | None = None
    earlier: Receipt | None = None


class _Search:
    """Looks for the cause, the most certain evidence first."""

    def __init__(self, receipt: Receipt, choice: Choice, missed: Missed, memory: Memory) -> None:
        self._receipt = receipt
        self._worker = choice.candidate.worker
        self._missed = missed
        self._memory = memory
        self._decided_ms = int(1000 * receipt.at + sum(receipt.steps_ms.values()))

    def cause(self) -> _Cause:
        had = self._last_time_it_had_the_block()
        if had is not None:
            return self._what_took_it(had) or self._why_unknown(had)
        if (removal := self._removal(0)) is not None:
            return self._evicted(removal, None)
        return self._why_it_never_had_it()

    def _last_time_it_had_the_block(self) -> Receipt | None:
        """Return the last earlier decision that sent the block to the worker or saw it there."""
        for earlier in self._sharing():
            if served_by(earlier) == self._worker.worker_id or self._was_seen(earlier):
                return earlier
        return None

    def _sharing(self) -> Iterator[Receipt]:
        """Yield the earlier decisions about prompts with the block."""
        for earlier, chain in self._earlier_chains():
            if common_blocks(self._missed.chain, chain).num_blocks >= self._missed.depth_blocks:
                yield earlier

    def _earlier_chains(self) -> Iterator[tuple[Receipt, Chain]]:
        for earlier in self._memory.earlier:
            for chain in earlier.chains:
                if chain.pool == self._missed.chain.pool:
                    yield earlier, chain

    def _was_seen(self, earlier: Receipt) -> bool:
        choice = self._choice_in(earlier)
        return choice is not None and choice.candidate.overlap_blocks >= self._missed.depth_blocks

    def _choice_in(self, earlier: Receipt) -> Choice | None:
        name = self._worker.worker_id
        return next((each for each in earlier.choices if each.candidate.worker.worker_id == name), None)

    def _what_took_it(self, had: Receipt) -> _Cause | None:
        """Return what the index remembers to have taken the block away since then."""
        since_ms = int(1000 * had.at)
        former = self._choice_in(had)
        if former is not None and former.candidate.worker.incarnation != self._worker.incarnation:
            opened = self._event(since_ms, EventKind.OPENED)
            when = f" at {clock(opened.at_ms)}" if opened else ""
            detail = f"the worker restarted{when}, after {_named(had)} had stored the block there"
            return _Cause(Reason.RESTARTED, detail, opened.at_ms if opened else None, had)
        if (cleared := self._event(since_ms, EventKind.CLEARED)) is not None:
            detail = f"the engine reset its prefix cache at {clock(cleared.at_ms)}, after {_named(had)}"
            return _Cause(Reason.CLEARED, detail, cleared.at_ms, had)
        if (removal := self._removal(since_ms)) is not None:
            return self._evicted(removal, had)
        if (again := self._event(since_ms, EventKind.RESYNC, EventKind.DRIFT)) is not None:
            detail = (
                f"the worker began at {clock(again.at_ms)} to send its whole state again ({again.detail})"
            )
            return _Cause(Reason.RESYNCED, detail, again.at_ms, had)
        return None

    def _why_unknown(self, had: Receipt) -> _Cause:
        """Return why the index did not know of a block that nothing on record took away."""
        is_forgotten = int(1000 * had.at) < self._memory.removals_since_ms
        answered_ms = first_answer_ms(had)
        if not self._was_seen(had):
            if answered_ms is None or answered_ms > self._decided_ms:
                detail = f"{_named(had)} was sent there with the block and had not been answered yet"
                return _Cause(Reason.COMPUTING, detail, answered_ms, had)
            if not is_forgotten:
                detail = (
                    f"{_named(had)} had been answered there {self._decided_ms - answered_ms:,} ms before, "
                    "no eviction is on record: the index was told of the block after the decision"
                )
                return _Cause(Reason.BEHIND, detail, None, had)
        reach = "no eviction is on record"
        if is_forgotten:
            reach = f"evictions are remembered since {clock(self._memory.removals_since_ms)} only"
        return _Cause(Reason.GONE, f"the worker had the block at {_named(had)}; {reach}", None, had)

    def _why_it_never_had_it(self) -> _Cause:
        if (other := next(self._sharing(), None)) is not None:
            detail = f"{_named(other)} with the block went to {served_by(other) or 'another worker'}"
            joined = self._event(int(1000 * other.at), EventKind.OPENED)
            if joined is not None:
                detail = f"the worker joined at {clock(joined.at_ms)}; {detail}"
                return _Cause(Reason.JOINED, detail, joined.at_ms, other)
            return _Cause(Reason.ELSEWHERE, f"{detail}; none on record brought it here", None, other)
        if (twin := self._same_tokens()) is not None:
            return self._other_identity(*twin)
        return self._other_tokens()

    def _same_tokens(self) -> tuple[Receipt, Chain] | None:
        """Return the latest earlier request with these tokens; its hashes are other ones."""
        for earlier, chain in self._earlier_chains():
            if common_contents(self._missed.chain, chain).num_blocks >= self._missed.depth_blocks:
                return earlier, chain
        return None

    def _other_identity(self, twin: Receipt, chain: Chain) -> _Cause:
        detail = f"{_named(twin)} brought the same tokens to {served_by(twin) or 'a worker'}"
        salted = "under another cache salt, or without one"
        if twin.model == self._receipt.model:
            return _Cause(Reason.OTHER_SALT, f"{detail} {salted}", None, twin)
        detail += f" for `{twin.model}`, not `{self._receipt.model}`"
        if chain.salt_mark != self._missed.chain.salt_mark:
            detail += f", and {salted}"
        return _Cause(Reason.OTHER_LORA, detail, None, twin)

    def _other_tokens(self) -> _Cause:
        missed, closest = self._missed, self._closest()
        if closest is None or closest[1].num_blocks == 0:
            return _Cause(
                Reason.NEVER_STORED, f"no earlier request on record{self._since()} begins like this one"
            )
        earlier, common = closest
        size = missed.chain.pool.block_size
        if common.differs_within_blocks is None:
            detail = (
                f"the closest request on record, {_named(earlier)}, ends after the "
                f"{common.num_blocks * size:,} tokens that it shares: what follows is new"
            )
            return _Cause(Reason.NEVER_STORED, detail, None, earlier)
        first, last = common.num_blocks * size, common.differs_within_blocks * size
        detail = (
            f"the closest request on record, {_named(earlier)}, has other tokens "
            f"from somewhere within {first:,} to {last - 1:,}"
        )
        return _Cause(Reason.TOKENS_DIFFER, detail, None, earlier)

    def _closest(self) -> tuple[Receipt, Common] | None:
        """Return the earlier request that shares most, the latest of several."""
        best: tuple[Receipt, Common] | None = None
        for earlier, chain in self._earlier_chains():
            common = common_blocks(self._missed.chain, chain)
            if best is None or common.num_blocks > best[1].num_blocks:
                best = earlier, common
        return best

    def _evicted(self, removal: Removal, had: Receipt | None) -> _Cause:
        age = f", after {_named(had)}" if had else ""
        detail = f"{self._worker.worker_id} evicted it at {clock(removal.at_ms)}{age}"
        return _Cause(Reason.EVICTED, detail, removal.at_ms, had)

    def _removal(self, since_ms: int) -> Removal | None:
        """Return the last time that this process of the worker evicted the block, before the decision."""
        return next(
            (
                each
                for each in reversed(self._memory.removals)
                if since_ms <= each.at_ms <= self._decided_ms
                and each.incarnation == self._worker.incarnation
                and self._missed.block in each.blocks
            ),
            None,
        )

    def _event(self, since_ms: int, *kinds: EventKind) -> PoolEvent | None:
        """Return the worker's last event of these kinds between then and the decision."""
        return next(
            (
                each
                for each in reversed(self._memory.events)
                if since_ms <= each.at_ms <= self._decided_ms
                and each.worker_id == self._worker.worker_id
                and each.kind in kinds
            ),
            None,
        )

    def _since(self) -> str:
        """Say how far the record goes back."""
        return f" since {clock(int(1000 * self._memory.earlier[-1].at))}" if self._memory.earlier else ""


def served_by(receipt: Receipt) -> str | None:
    """Return the worker that a request went to: the chosen one, or who answered in its place."""
    served = receipt.served
    if served is not None and served.worker is not None and served.worker != receipt.destinations[0]:
        return served.worker
    return receipt.chosen


def first_answer_ms(receipt: Receipt) -> int | None:
    """Return when the first byte of the answer came, by which time every block of the prompt was stored."""
    if receipt.served is None or receipt.served.ttft_ms is None:
        return None
    return int(1000 * receipt.at + receipt.served.ttft_ms)


def clock(at_ms: int) -> str:
    """Return a time as people read it, in UTC."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%H:%M:%S.%f")[:-3] + "Z"


def _named(receipt: Receipt) -> str:
    return f"request {receipt.request_id} ({clock(int(1000 * receipt.at))})"
