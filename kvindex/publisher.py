"""Tells the index what one holder has, and how busy it is."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence, Set

import msgspec
import structlog

from kvindex import metrics
from kvindex.blocks import Pool, format_hash
from kvindex.config import LeaseConfig
from kvindex.contents import Change, Contents
from kvindex.errors import EventsLost, IndexUnavailable, SlotLost, WorkerConflict
from kvindex.history import EventKind, Opening
from kvindex.index import FIRST_OPENING, MAX_BATCH, Costs, Holder, IndexWriter
from kvindex.outbox import Outbox
from kvindex.worker import Batch, Load, SlotPart, SlotState, StepCosts

LOAD_INTERVAL_S = 0.1
COSTS_INTERVAL_S = 5.0
_WRITE_SLICE_S = 0.05
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 2.0
_MOST_ACCEPTED = 10_000
_STOP_PATIENCE_S = 5.0
_READ_BACK_S = 0.5
_MOST_NAMED = 5
_NEVER_S = -math.inf

_KINDS = {"cleared": EventKind.CLEARED, "drift": EventKind.DRIFT}

_log = structlog.get_logger(__name__)


class LoadReport(msgspec.Struct, frozen=True):
    """An engine's load, and the decision ids that it contains for the first time."""

    load: Load
    accepted: tuple[str, ...] = ()


class _Drifted(SlotLost):
    """The index holds something else for the slot than it was told."""

    def __init__(self, message: str, *, lost: Set[int], added: Set[int], read: str) -> None:
        super().__init__(message)
        self.lost = lost
        self.added = added
        self.read = read
        """How much of the slot was read back to find these."""


class Publisher:
    """Keeps the index equal to one holder, an engine rank or a store, from a daemon thread of its own.

    The thread ends with the process, and the lease soon after. It never makes the holder wait: events
    are read from a queue that drops rather than blocks, and whatever is lost, here or in the index, leads to
    a fresh slot with the whole known state.

    Args:
        holder: as it registers.
        config: lease, heartbeat and flush times.
        writer: owned from now on; closed by `stop`.
        contents: what it has; owned from now on, used by the thread alone.
        load: called by the thread, every 100 ms and after each write; must not block.
        costs: what the engine's steps cost, or how fast the store is, None while that is not known; called by
            the thread, every 5 s.
        settle_older_than_ms: for a `load` that cannot name decisions, see `IndexWriter.heartbeat`.
        stands_by: others may publish under the same id, and take turns.
    """

    def __init__(
        self,
        holder: Holder,
        config: LeaseConfig,
        writer: IndexWriter,
        contents: Contents,
        load: Callable[[], LoadReport],
        *,
        costs: Callable[[], Costs | None] = lambda: None,
        settle_older_than_ms: int | None = None,
        stands_by: bool = False,
    ) -> None:
        self._holder = holder
        self._config = config
        self._writer = writer
        self._contents = contents
        self._load = load
        self._costs = costs
        self._settle_older_than_ms = settle_older_than_ms
        self._stands_by = stands_by
        self._outbox = Outbox()
        self._ahead: deque[Change | EventsLost] = deque()
        """Read and not yet taken, in order."""
        self._slot: int | None = None
        self._opening = FIRST_OPENING
        self._accepted: deque[str] = deque(maxlen=_MOST_ACCEPTED)
        self._reported: Load | None = None
        self._reported_costs: Costs | None = None
        self._unwritten_since_s: float | None = None
        self._wrote_at_s = self._looked_at_s = self._beat_at_s = self._audit_at_s = self._retry_at_s = (
            _NEVER_S
        )
        self._costs_at_s = _NEVER_S
        self._turn = 0
        self._backoff_s = _FIRST_BACKOFF_S
        self._failing_with: type[IndexUnavailable] | None = None
        self._num_conflicts = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvlane-publisher", daemon=True)
        self._num_stored = metrics.BLOCKS_STORED.labels(holder.holder_id)
        self._num_removed = metrics.BLOCKS_REMOVED.labels(holder.holder_id)
        self._num_unwritten = metrics.UNWRITTEN_CHANGES.labels(holder.holder_id)
        self._num_indexed = metrics.INDEXED_BLOCKS.labels(holder.holder_id)
        self._write_lag = metrics.WRITE_LAG.labels(holder.holder_id)
        self._log = _log.bind(worker=holder.holder_id, incarnation=holder.incarnation)

    @property
    def is_registered(self) -> bool:
        """Whether the holder has a slot, as far as is known here. To be asked from any thread."""
        return self._slot is not None

    def start(self) -> None:
        """Begin to follow the holder; it is registered as soon as the index answers."""
        self._thread.start()

    def stop(self) -> None:
        """Take the holder out of the index and end the thread; waits a few seconds at most. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_PATIENCE_S)

    def _run(self) -> None:
        self._contents.open()
        try:
            while not self._stopping.is_set():
                self._follow()
                if time.monotonic() >= self._retry_at_s:
                    self._publish()
        finally:
            if self._slot is not None:
                with contextlib.suppress(IndexUnavailable):
                    self._writer.close_slot(self._holder.pool, self._slot, self._holder.incarnation)
            self._writer.close()
            self._contents.close()

    def _follow(self) -> None:
        """Wait for the holder or for the next thing to do, whichever is first."""
        patience_s = self._patience_s()
        if self._unwritten_since_s is not None and self._failing_with is None:
            # What the engine says until then is written with it: to wake up for that is most of the cost.
            self._stopping.wait(patience_s)
            patience_s = 0.0
        if not self._ahead:
            self._read(patience_s)
        while self._ahead:
            self._take(self._ahead.popleft())
        if self._outbox and self._unwritten_since_s is None:
            self._unwritten_since_s = time.monotonic()

    def _read(self, patience_s: float) -> None:
        try:
            self._ahead.extend(self._contents.poll(patience_s))
        except EventsLost as error:
            self._ahead.append(error)

    def _read_on(self) -> None:
        """Follow the holder while the index applies a write; what ends the slot waits until that is done."""
        if not self._ahead:
            self._read(0.0)
        while self._ahead and isinstance(ahead := self._ahead[0], Change) and not ahead.is_cleared:
            self._take(self._ahead.popleft())

    def _take(self, change: Change | EventsLost) -> None:
        if isinstance(change, EventsLost):
            self._log.warning("KV events lost; starting over", reason=str(change))
            self._forget("events_lost", str(change))
            return
        if change.is_cleared:
            self._forget("cleared")
        self._outbox.change(stored=change.stored, removed=change.removed)
        self._num_stored.inc(len(change.stored))
        self._num_removed.inc(len(change.removed))

    def _patience_s(self) -> float:
        """Return how long nothing needs doing unless the holder says something."""
        now_s = time.monotonic()
        if now_s < self._retry_at_s:
            return min(self._retry_at_s - now_s, LOAD_INTERVAL_S)
        return max(0.0, min(self._look_at_s(), self._write_at_s()) - now_s)

    def _write_at_s(self) -> float:
        """Return when the unwritten changes are due: at once, unless others were written just now."""
        if len(self._outbox) >= MAX_BATCH or self._outbox.is_repeating:
            return 0.0
        if self._unwritten_since_s is None:
            return float("inf")
        return self._wrote_at_s + self._config.flush_ms / 1000

    def _look_at_s(self) -> float:
        """Return when the load is due: soon after blocks were written, for their prompt is no backlog now."""
        wrote_since = self._wrote_at_s > self._looked_at_s
        return self._looked_at_s + (self._config.flush_ms / 1000 if wrote_since else LOAD_INTERVAL_S)

    def _publish(self) -> None:
        """Bring the index up to date, as far as it lets us."""
        try:
            if self._slot is None:
                self._open()
            self._write()
            self._report_costs()
            self._audit()
        except IndexUnavailable as error:
            self._back_off(error)
        except WorkerConflict as error:
            self._num_conflicts += 1
            if self._stands_by:
                self._log.debug("standing by", holder=str(error))
            elif self._num_conflicts == 1:
                self._log.info("waiting for the lease of the process before to end", holder=str(error))
            elif self._num_conflicts == 2:
                self._log.error(
                    "another live process publishes under this endpoint; waiting for its lease to end. "
                    "If both are meant to run, give each its own endpoint (kvlane.endpoint).",
                    holder=str(error),
                )
            self._retry_at_s = time.monotonic() + self._config.lease_ms / 1000
        except _Drifted as error:
            self._log.warning(
                "the index holds something else than it was told; sending the whole state",
                reason=str(error),
                num_lost=len(error.lost),
                num_added=len(error.added),
                lost=_first_of(error.lost),
                added=_first_of(error.added),
                read=error.read,
            )
            differs = f"{len(error.lost)} blocks lost, {len(error.added)} added in {error.read} read back"
            self._start_over("drift", f"{error}; {differs}")
        except SlotLost as error:
            self._log.warning("the index lost track; sending the whole state", reason=str(error))
            self._start_over("slot_lost", str(error))
        else:
            if self._failing_with is not None:
                self._log.info("the index answers again")
            self._failing_with = None
            self._backoff_s = _FIRST_BACKOFF_S

    def _open(self) -> None:
        self._slot = self._writer.open_slot(
            self._holder, lease_ms=self._config.lease_ms, because=self._opening
        )
        self._outbox = Outbox(self._contents.hashes)
        # Due at once: a state that was known before has nothing to wait for.
        self._unwritten_since_s = time.monotonic() - self._config.flush_ms / 1000 if self._outbox else None
        self._num_conflicts = 0
        self._reported = self._reported_costs = None
        self._looked_at_s = self._costs_at_s = _NEVER_S
        self._log.info("registered", slot=self._slot, num_blocks=len(self._contents.hashes))

    def _forget(self, reason: str, detail: str = "") -> None:
        """Drop every block; a fresh slot does that in the index at once, however many there were."""
        if self._outbox.is_fresh:
            self._outbox = Outbox()
        else:
            self._start_over(reason, detail)

    def _start_over(self, reason: str, detail: str = "") -> None:
        """Give up the slot; the whole state goes into a fresh one."""
        self._slot = None
        self._opening = Opening(_KINDS.get(reason, EventKind.RESYNC), detail)
        self._outbox = Outbox()
        self._looked_at_s = _NEVER_S
        metrics.RESYNCS.labels(self._holder.holder_id, reason).inc()

    def _write(self) -> None:
        """Send what is due, for a short while at most, so that events do not wait.

        Raises:
            IndexFull: the blocks were refused; lease and load were not, if they were due.
        """
        give_up_s = time.monotonic() + _WRITE_SLICE_S
        while (now_s := time.monotonic()) < give_up_s:
            report = self._due_report(now_s)
            # Blocks that could wait go along with a load that cannot.
            is_due = report is not None or now_s >= self._write_at_s()
            batches = self._outbox.next_batches() if is_due else ()
            if report is not None:
                answer = self._beat(report, batches)
            elif batches:
                answer = self._writer.apply(*self._place, *batches, meanwhile=self._read_on)
            else:
                return
            if batches:
                self._outbox.confirm()
                self._wrote_at_s = time.monotonic()
                self._write_lag.set(self._wrote_at_s - (self._unwritten_since_s or now_s))
                self._unwritten_since_s = self._wrote_at_s if self._outbox else None
            self._compare(answer)

    def _due_report(self, now_s: float) -> LoadReport | None:
        """Return the load if it is time to look and it has changed, and at every heartbeat."""
        if now_s < self._look_at_s():
            return None
        self._looked_at_s = now_s
        report = self._load()
        self._accepted += report.accepted
        is_old_news = not self._accepted and report.load == self._reported and now_s < self._beat_at_s
        return None if is_old_news else report

    def _beat(self, report: LoadReport, batches: Sequence[Batch]) -> SlotState:
        answer = self._writer.heartbeat(
            *self._place,
            report.load,
            lease_ms=self._config.lease_ms,
            batches=batches,
            accepted=tuple(self._accepted),
            settle_older_than_ms=self._settle_older_than_ms,
        )
        self._accepted.clear()
        self._reported = report.load
        self._beat_at_s = self._looked_at_s + self._config.heartbeat_ms / 1000
        self._num_unwritten.set(len(self._outbox))
        self._num_indexed.set(answer.num_blocks)
        return answer

    @property
    def _place(self) -> tuple[Pool, int, str]:
        """Pool, slot and incarnation."""
        if self._slot is None:
            raise SlotLost("no slot is open")
        return self._holder.pool, self._slot, self._holder.incarnation

    def _compare(self, answer: SlotState) -> None:
        """Check count and digest of the slot.

        Raises:
            _Drifted: they are not those of the blocks that the index was told.
        """
        told = self._outbox.told
        if answer != told:
            lost, added, read = self._read_back()
            raise _Drifted(
                f"the index counts {answer.num_blocks} blocks with digest {answer.digest:016x}, "
                f"it was told {told.num_blocks} with {told.digest:016x}",
                lost=lost,
                added=added,
                read=read,
            )

    def _report_costs(self) -> None:
        """Every few seconds, say what was measured, if there is something new to say."""
        now_s = time.monotonic()
        if now_s < self._costs_at_s:
            return
        self._costs_at_s = now_s + COSTS_INTERVAL_S
        costs = self._costs()
        if costs is not None and costs != self._reported_costs:
            self._writer.report_costs(*self._place, costs)
            self._reported_costs = costs
            if isinstance(costs, StepCosts):
                for part, cost_s in costs.parts_s().items():
                    metrics.STEP_COST.labels(self._holder.holder_id, part).set(cost_s)

    def _audit(self) -> None:
        """Once a heartbeat, check one part of the slot's entries, which count and digest say nothing about.

        Raises:
            _Drifted: they are not what the index was told.
        """
        now_s = time.monotonic()
        if now_s < self._audit_at_s:
            return
        self._audit_at_s = now_s + self._config.heartbeat_ms / 1000
        found = self._read_part(self._turn)
        self._turn += 1
        lost, added = self._outbox.differences(found)
        if lost or added:
            read = f"part {found.part} of {found.num_parts}"
            raise _Drifted("entries were changed behind the index's back", lost=lost, added=added, read=read)

    def _read_part(self, turn: int) -> SlotPart:
        return self._writer.blocks_of(*self._place, turn=turn)

    def _read_back(self) -> tuple[set[int], set[int], str]:
        """Return what the slot has lost and was never told of, as far as a short while allows to read it."""
        lost, added = set[int](), set[int]()
        num_read, num_parts = 0, 1
        give_up_s = time.monotonic() + _READ_BACK_S
        with contextlib.suppress(IndexUnavailable, SlotLost):
            while num_read < num_parts and time.monotonic() < give_up_s:
                found = self._read_part(num_read)
                num_parts = found.num_parts
                num_read += 1
                lost_here, added_here = self._outbox.differences(found)
                lost |= lost_here
                added |= added_here
        return lost, added, f"{num_read} of {num_parts} parts"

    def _back_off(self, error: IndexUnavailable) -> None:
        metrics.INDEX_FAILURES.labels(self._holder.holder_id).inc()
        if type(error) is not self._failing_with:
            self._log.warning(
                "the index does not do as asked; keeping the state and trying on", reason=str(error)
            )
        self._failing_with = type(error)
        self._reported, self._looked_at_s = None, _NEVER_S  # the next try asks the index for certain
        # Jitter, so that a fleet does not return to a restarted Redis in step.
        self._retry_at_s = time.monotonic() + self._backoff_s * random.uniform(0.5, 1.0)  # noqa: S311
        # Half a lease, since one that is only full keeps the lease at each try.
        longest_s = min(_LONGEST_BACKOFF_S, self._config.lease_ms / 2000)
        self._backoff_s = min(2 * self._backoff_s, longest_s)


def _first_of(blocks: Set[int]) -> list[str]:
    return [format_hash(block) for block in sorted(blocks)[:_MOST_NAMED]]
