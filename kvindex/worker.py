"""Workers, their load, and what the index says of them: plain values without I/O."""

from __future__ import annotations

import enum
import secrets

import msgspec

from kvindex.blocks import BlockHash, Pool
from kvindex.pending import Pending

LABEL_NAME = r"[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?"
"""A worker's label, and its value unless that is empty: what selectors can write."""


class Tier(enum.StrEnum):
    """Where a holder keeps its blocks, fastest first."""

    DEVICE = "device"
    CPU = "cpu"
    DISK = "disk"
    OBJECT = "object"


class Role(enum.StrEnum):
    """What a worker is asked to do. A label: every worker is able to do both."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class TierAccess(msgspec.Struct, frozen=True, kw_only=True):
    """Which stores outside the engine a worker loads KV from, and how its chunks are named there."""

    model: str
    """As LMCache knows it: the engine's model, not its served name."""
    chunk_size: int
    """Tokens per chunk."""
    world_size: int = 1
    """Ranks that each have an object of their own for a chunk (`chunks.ChunkKey`)."""
    stores: tuple[str, ...]
    """Names of the stores (`stores.Store.name`)."""
    server: str = ""
    """The LMCache server through which they are reached (`stores.Store.teller`)."""


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """One data-parallel rank of an engine, as it registers itself.

    `incarnation` is new at every start, so that nothing a dead process left behind is mistaken
    for the state of its successor.
    """

    endpoint: str
    """`ip:port` of the OpenAI server, reachable by Envoy and the gateway."""
    model: str
    """Name the engine serves its base model under."""
    block_size: int
    num_blocks: int
    """KV cache size in blocks."""
    bytes_per_token: int
    """KV bytes of one token over all layers and tensor-parallel ranks."""
    max_model_len: int
    incarnation: str
    dp_rank: int = 0
    dp_size: int = 1
    max_num_batched_tokens: int = 0
    """Most tokens the engine computes in one step; 0 where unknown."""
    transfer_address: str = ""
    """`host:port` at which the first tensor-parallel rank sends KV; the others listen at the next ports."""
    tp_size: int = 1
    """Tensor-parallel ranks."""
    tiers: TierAccess | None = None
    """None where it loads from no store."""
    role: Role = Role.BOTH
    """As started; an operator may have given it another since (`RegisteredWorker.role`)."""
    labels: dict[str, str] = {}
    """What requests may select workers by."""
    engine: str = ""
    """Engine name and version, for people."""
    publisher: str = "connector"
    """`connector` inside the engine, `external` for `kvlane publish`."""

    @property
    def worker_id(self) -> str:
        """Stable across restarts: the endpoint, and the rank where there are several."""
        return self.endpoint if self.dp_size == 1 else f"{self.endpoint}/dp{self.dp_rank}"

    @property
    def holder_id(self) -> str:
        """Its name among the holders of its pool."""
        return self.worker_id

    @property
    def pool(self) -> Pool:
        """The pool in which this worker's block hashes can be compared."""
        return Pool(self.model, self.block_size)


def new_incarnation() -> str:
    """Return 16 random hex digits."""
    return secrets.token_hex(8)


class Load(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What an engine last said of itself."""

    waiting_requests: int = 0
    running_requests: int = 0
    waiting_prefill_tokens: int = 0
    """Prompt tokens not computed yet, of waiting requests and of prompts being computed in chunks."""
    running_tokens: int = 0
    """Context tokens of the requests that are decoding."""
    kv_usage: float = 0.0
    """Share of the KV cache in use by live requests, 0 to 1."""
    waiting_prefill_pairs: float = 0.0
    """Pairs of a waiting prompt token and one before it: what attention has still to compute."""
    transfer_gb_per_s: float = 0.0
    """How fast KV came from other engines lately; 0 where none did."""
    transfer_latency_ms: float = 0.0
    """What a transfer took beside that, whatever its size."""
    tier_gb_per_s: float = 0.0
    """How fast KV came from the memory of its LMCache server lately; 0 where none did."""
    tier_latency_ms: float = 0.0
    """What such a load took beside that, whatever its size."""
    prefill_share: float = 0.0
    """Share of the last ten seconds or so spent in steps with prompts in them, 0 to 1."""


class StepCosts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the steps of an engine cost, as it measured them while it served. 0 is not told apart from others.

    A step's time is the sum: `step_ms`, each prompt token and each pair of one and a token before it, each
    decoding request and each token of its context.
    """

    num_steps: int
    """Measured since the engine's start."""
    prefill_tokens_per_s: float | None
    """Of prompts so short that attention costs nothing; None until enough prompts were computed."""
    attention_ns_per_pair: float = 0.0
    step_ms: float = 0.0
    decode_us_per_request: float = 0.0
    decode_ns_per_token: float = 0.0

    def parts_s(self) -> dict[str, float]:
        """Return the costs in seconds by name, without those that are not known."""
        parts = {
            "step": self.step_ms / 1e3,
            "prompt_pair": self.attention_ns_per_pair / 1e9,
            "decoding_request": self.decode_us_per_request / 1e6,
            "context_token": self.decode_ns_per_token / 1e9,
        }
        if self.prefill_tokens_per_s is not None:
            parts["prompt_token"] = 1 / self.prefill_tokens_per_s
        return parts


class WorkerState(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A live worker at the moment of a `match` or a failed `reserve`."""

    slot: int
    load: Load
    charged_tokens: int
    """Prefill tokens reserved by gateways and not yet reported by the engine."""
    charged_requests: int

    @property
    def backlog_tokens(self) -> int:
        """Prefill tokens ahead of a request that arrives now."""
        return self.load.waiting_prefill_tokens + self.charged_tokens


class Match(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Answer of the index to one prompt. Every live worker is in it, with or without overlap."""

    states: tuple[WorkerState, ...]
    overlap_blocks: dict[int, int]
    """Slot to leading blocks present; slots without any are left out."""
    stride: int
    """Blocks per probe: the overlap is exact to within `stride - 1` blocks, never above the truth
    while prefixes have no holes. With holes it is never a stride or more below the truth either, and
    above it only at the end of a later run: the probed block is held, the next probe is not."""
    registry_version: int
    """Changes whenever a worker joins, leaves or is replaced."""
    pending: tuple[Pending, ...] = ()
    """What live workers have been asked to compute, in no order."""


class Reservation(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Outcome of `reserve`: charged, or the fresh states to plan again with."""

    charged: bool
    states: tuple[WorkerState, ...] = ()
    pending: tuple[Pending, ...] = ()


class RegisteredWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker with its place in the index."""

    worker: Worker
    slot: int
    role: Role
    """What it is asked to do now."""
    is_draining: bool = False
    """Whether it is to get no more requests; those that it has go on."""
    lease_ms: int
    """As granted; what is gone of it is the age of the last heartbeat."""
    lease_left_ms: int
    num_indexed_blocks: int
    digest: str
    """Order-independent digest of the indexed blocks, 16 hex digits."""
    load: Load
    charged_tokens: int
    charged_requests: int
    step_costs: StepCosts | None = None
    """As it measured them; None where it has not, or not yet."""

    @property
    def holder(self) -> Worker:
        """The worker, as what has the slot."""
        return self.worker


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One sequenced write of a publisher. A hash is in `stored` or in `removed`, never in both."""

    sequence: int
    """Starts at 1 in a fresh slot and grows by one."""
    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()


class Entries(msgspec.Struct, frozen=True, kw_only=True):
    """A slice of everything that the index holds of a pool."""

    holders: dict[BlockHash, tuple[int, ...]]
    """Block to the live slots that hold it, ascending; blocks of dead slots alone are left out."""
    next_bucket: int | None
    """Where the next slice begins, None behind the last one."""
    num_buckets: int
    """Of the whole pool, at the moment of the read."""


class SlotPart(msgspec.Struct, frozen=True, kw_only=True):
    """The blocks that the index holds for a slot and whose hash is `part` modulo `num_parts`."""

    part: int
    num_parts: int
    """A power of two that follows the size of the pool."""
    blocks: frozenset[BlockHash]


class SlotState(msgspec.Struct, frozen=True, kw_only=True):
    """What the index believes a slot holds; the publisher compares it with its own."""

    num_blocks: int
    digest: int
