"""What a step's scheduler and its workers tell each other of transfers and tiers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from connectors.pace import Moved
from connectors.params import TransferParams
from vllm_plugin.compat import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass(frozen=True, slots=True)
class Send:
    """A request whose blocks others will ask for."""

    request_id: str
    transfer_id: str
    num_tokens: int
    """Of its prompt."""


@dataclass(frozen=True, slots=True)
class Computed:
    """How far a sent request's blocks are filled."""

    transfer_id: str
    block_ids: list[int]
    """All of its physical blocks, from position 0 on."""
    num_tokens_before: int
    """Leading tokens that are in the blocks when the step begins; 0 if the step before has said so."""
    num_tokens_after: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Blocks that are to be filled from another engine."""

    request_id: str
    params: TransferParams
    block_ids: list[int]
    first_token: int
    num_tokens: int
    """Of the prompt."""


@dataclass
class KvlaneMetadata(KVConnectorMetadata):
    """A step's news, in the order in which they are to be heeded."""

    suspended: list[str] = field(default_factory=list)
    """Transfers whose request lost its blocks: they must not be read when the step begins."""
    aborted: list[str] = field(default_factory=list)
    """Transfers whose sending request has ended early."""
    cancelled: list[str] = field(default_factory=list)
    """Transfers whose receiving request has ended."""
    sends: list[Send] = field(default_factory=list)
    computed: list[Computed] = field(default_factory=list)
    receives: list[Receive] = field(default_factory=list)
    held_twice: set[str] = field(default_factory=set)
    """Requests that have ended and whose blocks both a transfer and a tier need still."""
    filled_twice: set[str] = field(default_factory=set)
    """Requests whose blocks both a transfer and a tier fill."""
    tiers: Any = None
    """LMCache's own; None without tiers."""


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """What workers tell of a step."""

    moved: tuple[Moved, ...]
    """Complete transfers, by every rank; each counts the bytes of all ranks, which move at the same time."""
    tiers: KVConnectorWorkerMetadata | None = None
    """LMCache's own; None where it has nothing to tell."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        """Return both reports as one."""
        theirs = cast("WorkerReport", other)
        tiers = self.tiers or theirs.tiers
        if self.tiers is not None and theirs.tiers is not None:
            tiers = self.tiers.aggregate(theirs.tiers)
        return WorkerReport(self.moved + theirs.moved, tiers)
