"""Whether a worker's tokens and hashes are the gateway's: what is compared, and the verdict. Pure.

A worker whose hashes differ from ours never matches a prompt, and nothing else would show it.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from kvindex.worker import Worker


class State(enum.StrEnum):
    """What the gateway knows of a worker or a pool."""

    CHECKING = "checking"
    """No check has come to an end; until then overlaps count."""
    EXACT = "exact"
    DEGRADED = "degraded"


class Reason(enum.StrEnum):
    """Why a worker is degraded, or why its check has not come to an end."""

    TOKENIZER = "tokenizer"
    TOKENS = "tokens"
    MODEL = "model"
    PREFIX_CACHING = "prefix_caching"
    BLOCK_SIZE = "block_size"
    NO_BLOCKS = "no_blocks"
    HASHES = "hashes"
    SALT = "salt"
    LORA = "lora"

    NO_ANSWER = "no_answer"
    REFUSED = "refused"
    INDEX = "index"


CURES: Mapping[Reason, str] = {
    Reason.TOKENIZER: (
        "Give the gateway the model's files: `tokenizers: {MODEL: DIRECTORY}` in its --config. Chats that "
        "the engine writes in code have no cure."
    ),
    Reason.TOKENS: (
        "Give the gateway what the engine runs with: in the gateway's --config `tokenizers` for its "
        "--tokenizer and `chat_templates` for its --chat-template; drop --default-chat-template-kwargs "
        "from the engine."
    ),
    Reason.MODEL: (
        "Restart the worker. Beside `kvlane publish`, check that --endpoint is the engine whose --events "
        "it follows."
    ),
    Reason.PREFIX_CACHING: "Remove --no-enable-prefix-caching from the engine's command.",
    Reason.BLOCK_SIZE: (
        "Restart the worker (the engine, or `kvlane publish`), so that it registers anew. If it stays, "
        "give the engine an explicit --block-size."
    ),
    Reason.HASHES: (
        "Check that the events are this engine's own (`kvlane publish`: --events and --endpoint of one "
        "engine, no two engines on one port), that engine and gateway run the same version of kvlane, and "
        "that the engine runs without --default-chat-template-kwargs."
    ),
    Reason.SALT: "Upgrade the engine to vLLM 0.24 or newer: its KV events must carry extra_keys.",
    Reason.LORA: "Upgrade the engine to vLLM 0.24 or newer: its KV events must carry lora_name.",
    Reason.NO_ANSWER: "None if it is only busy: the check is made again. Else read the worker's log.",
    Reason.REFUSED: (
        "If it wants an API key, set worker_api_key in the gateway's --config, or KVLANE_WORKER_API_KEY. "
        "Else read the worker's log."
    ),
    Reason.INDEX: "None but for Redis or the worker's publisher: the check is made again.",
}
"""What to do, by reason; `cure` knows the rest."""

_NO_BLOCKS_CURES: Mapping[str, str] = {
    "connector": (
        'Start the engine with `kvlane serve`, or add --kv-events-config \'{"enable_kv_cache_events": '
        'true, "endpoint": "inproc://kvlane"}\'. Then look for `not indexed` in its log.'
    ),
    "external": (
        'Start the engine with --kv-events-config \'{"enable_kv_cache_events": true, "publisher": "zmq", '
        '"endpoint": "tcp://*:PORT"}\' and `kvlane publish` with --events tcp://HOST:PORT. Then look for '
        "`not indexed` in the log of `kvlane publish`."
    ),
}


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on one worker."""

    state: State = State.CHECKING
    reason: Reason | None = None
    detail: str = ""
    """What was seen, for people."""
    cure: str = ""
    lag_ms: float | None = None
    """From the engine's answer until all its blocks were in the index; None unless they came."""
    answers: bool = True
    """Whether the last check's request was answered at all."""
    checked_at: float | None = None
    """Unix time in seconds at which the last check ended, however it ended."""

    @property
    def ignores_overlap(self) -> bool:
        """Whether what the index says of this worker's blocks must not count.

        Without a tokenizer here, prompts that come as token ids still match.
        """
        return self.state is State.DEGRADED and self.reason is not Reason.TOKENIZER


@dataclass(frozen=True, slots=True)
class Trial:
    """What one probe request left in the index, for the worker that answered it."""

    model: str
    """The name that was asked for: the base model or an adapter."""
    num_blocks: int
    """Full blocks of its prompt."""
    num_held_blocks: int
    """Leading ones that the index holds under the right hashes."""
    num_other_blocks: int
    """Blocks by which the worker's slot has grown beside them; other requests' are among them."""
    found_without: Collection[Reason] = ()
    """SALT, LORA: the first block is found by a hash that lacks it."""
    waited_s: float = 0.0
    """From the answer until all were found, or until the wait was given up."""

    @property
    def is_exact(self) -> bool:
        """Whether every block is where it should be and nowhere else."""
        return self.num_held_blocks == self.num_blocks and not self.found_without


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that a check has seen of a worker."""

    trials: Sequence[Trial] = ()
    """Of the base model, then of an adapter where one is served."""
    tokens_here: Sequence[int] = ()
    tokens_there: Sequence[int] | None = None
    """What the engine's `/tokenize` makes of the probe; None where it was not asked or has none."""
    tokenizer_failure: str | None = None
    """Why the probe had to be sent as token ids or not as a chat."""
    missing_model: str | None = None
    """The name that the worker registered and does not serve."""
    engine_block_size: int | None = None
    """As its metrics say; None where they were not read or do not say."""
    prefix_caching: bool | None = None


def judge(worker: Worker, seen: Evidence) -> Parity:
    """Return the verdict on `worker`; the first reason of the likeliest cause wins."""
    if seen.missing_model is not None:
        return degraded(
            worker, Reason.MODEL, f"it registered as `{seen.missing_model}` and does not serve it"
        )
    if seen.tokens_there is not None and list(seen.tokens_there) != list(seen.tokens_here):
        return degraded(worker, Reason.TOKENS, difference(seen.tokens_here, seen.tokens_there))
    for trial in seen.trials:
        if not trial.is_exact:
            return degraded(worker, *_why(worker, seen, trial))
    if seen.tokenizer_failure is not None:
        return degraded(worker, Reason.TOKENIZER, seen.tokenizer_failure)
    return Parity(state=State.EXACT, lag_ms=1000 * max(trial.waited_s for trial in seen.trials))


def degraded(worker: Worker, reason: Reason, detail: str) -> Parity:
    """Return the verdict that `worker` differs."""
    return Parity(state=State.DEGRADED, reason=reason, detail=detail, cure=cure(worker, reason))


def unverified(worker: Worker, reason: Reason, detail: str) -> Parity:
    """Return that a check of `worker` has not come to an end."""
    answers = reason is not Reason.NO_ANSWER
    return Parity(reason=reason, detail=detail, cure=cure(worker, reason), answers=answers)


def cure(worker: Worker, reason: Reason) -> str:
    """Return what to do about `reason`."""
    return _NO_BLOCKS_CURES[worker.publisher] if reason is Reason.NO_BLOCKS else CURES[reason]


def pool_state(parities: Iterable[Parity]) -> State:
    """Return the state of a pool: that of its worst worker; EXACT only if all are."""
    states = {parity.state for parity in parities}
    for state in (State.DEGRADED, State.CHECKING):
        if state in states:
            return state
    return State.EXACT if states else State.CHECKING


def difference(here: Sequence[int], there: Sequence[int]) -> str:
    """Say where two lists of tokens part."""
    first = next(
        (at for at, (ours, theirs) in enumerate(zip(here, there, strict=False)) if ours != theirs),
        min(len(here), len(there)),
    )
    return (
        f"the engine makes {len(there)} tokens of the probe, kvlane {len(here)}; "
        f"they differ from token {first} on"
    )


def _why(worker: Worker, seen: Evidence, trial: Trial) -> tuple[Reason, str]:
    if Reason.LORA in trial.found_without:
        return Reason.LORA, f"blocks of the adapter `{trial.model}` are indexed as the base model's"
    if Reason.SALT in trial.found_without:
        return Reason.SALT, "blocks of a request with a cache_salt are indexed as if it had none"
    if not trial.num_held_blocks and (cause := _setting(worker, seen)):
        return cause
    others = f"{trial.num_other_blocks} others" if trial.num_other_blocks else "no other"
    detail = (
        f"{trial.waited_s:.0f} s after the engine answered a probe for `{trial.model}` the index holds "
        f"{trial.num_held_blocks} of its {trial.num_blocks} blocks; {others} arrived meanwhile"
    )
    arrived = trial.num_held_blocks or trial.num_other_blocks
    return Reason.HASHES if arrived else Reason.NO_BLOCKS, detail


def _setting(worker: Worker, seen: Evidence) -> tuple[Reason, str] | None:
    """Return what in the engine's own settings keeps every block out of the index."""
    if seen.prefix_caching is False:
        return Reason.PREFIX_CACHING, "its engine runs without prefix caching, so it keeps no block to match"
    if seen.engine_block_size not in (None, worker.block_size):
        return Reason.BLOCK_SIZE, (
            f"its engine's blocks hold {seen.engine_block_size} tokens, but it registered with "
            f"{worker.block_size}: no event fits"
        )
    return None
