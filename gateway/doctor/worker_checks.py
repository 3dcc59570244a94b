"""Checks of one worker: does it answer, and are its tokens, hashes and events ours?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gateway.doctor.finding import Finding, Level, ok, problem, warning
from gateway.doctor.fleet_checks import subject_of
from gateway.parity import Parity, Reason, State
from kvindex.worker import Worker

LATE_MS = 1_000.0
"""Blocks that are indexed later than this miss the next turn of a fast conversation."""

_COSTS = {
    Reason.MODEL: "Requests for the registered name are refused by it.",
    Reason.SALT: "One tenant's prompts are promised hits in another's blocks, which the engine then refuses.",
    Reason.LORA: "An adapter's prompts are promised hits in the base model's blocks, and computed in full.",
}
_NO_HITS = "None of its blocks is ever matched: its requests are placed by load and computed in full."


def reachability_findings(worker: Worker) -> Iterator[Finding]:
    """Yield that `worker`, which refuses our connections, cannot be used."""
    yield problem(
        subject_of(worker),
        f"nothing accepts connections at {worker.endpoint}, although its publisher renews the lease",
        cost="Requests for it fail over to others, and its cache is unused.",
        cure=(
            "If the engine is still starting, wait. Else register the address at which Envoy reaches it: "
            "--endpoint IP:PORT of `kvlane serve` or `kvlane publish`, or KVLANE_ENDPOINT there."
        ),
    )


def parity_findings(
    worker: Worker, own: Parity, gateways: Parity | None, *, adapter: str | None
) -> Iterator[Finding]:
    """Yield what a probe has shown, and what the gateway holds of the worker.

    Args:
        worker: what was probed.
        own: our verdict, by the tokenizer that we have here.
        gateways: the verdict of the running gateway, by its own; None where there is none.
        adapter: the LoRA adapter that was probed as well.
    """
    subject = subject_of(worker)
    if gateways is not None and gateways.state is State.DEGRADED and gateways.reason is not own.reason:
        yield problem(
            subject,
            f"the gateway holds it degraded ({gateways.reason}): {gateways.detail}",
            cost=_cost(gateways.reason),
            cure=gateways.cure,
        )
    elif gateways is not None and gateways.state is State.CHECKING and gateways.reason:
        yield warning(
            subject,
            f"the gateway could not check it yet ({gateways.reason}): {gateways.detail}",
            cost="Its overlaps count, right or wrong, until it is checked.",
            cure=gateways.cure,
        )
    yield from _own_findings(worker, own, gateways, adapter)


def _own_findings(
    worker: Worker, own: Parity, gateways: Parity | None, adapter: str | None
) -> Iterator[Finding]:
    subject = subject_of(worker)
    if own.state is State.EXACT:
        isolated = "salts" if adapter is None else f"salts and adapters (`{adapter}`)"
        yield ok(subject, f"exact: tokens and hashes are ours, {isolated} are kept apart")
        yield from _lag(subject, own.lag_ms or 0.0)
    elif own.state is State.CHECKING:
        yield warning(
            subject,
            f"it could not be checked: {own.detail}",
            cost="Whether its blocks are ever matched is not known.",
            cure=own.cure,
        )
    elif own.reason is not Reason.TOKENIZER:
        yield problem(subject, own.detail, cost=_cost(own.reason), cure=own.cure)
    elif gateways is not None and gateways.state is State.EXACT:
        yield ok(subject, "exact: hashes are ours; its tokens are the gateway's, as the gateway says")
    else:
        yield Finding(
            level=Level.PROBLEM if gateways and gateways.reason is Reason.TOKENIZER else Level.WARNING,
            subject=subject,
            what=f"hashes are ours, but its tokens cannot be compared here: {own.detail}",
            cost=_cost(Reason.TOKENIZER),
            cure=own.cure,
        )


def _lag(subject: str, lag_ms: float) -> Iterator[Finding]:
    if lag_ms > LATE_MS:
        yield warning(
            subject,
            f"its blocks were in the index {lag_ms / 1000:.1f} s after they were cached",
            cost="A conversation's next turn may come before, and is then sent by load.",
            cure=(
                "Compare kvlane_publisher_write_lag_seconds (KVLANE_METRICS_PORT) with Redis's latency: the "
                "rest is the engine's, whose process the publisher shares."
            ),
        )


def replay_findings(
    worker: Worker, endpoint: str, *, answered: bool, first: int | None, block_sizes: Sequence[int]
) -> Iterator[Finding]:
    """Yield what an engine's replay endpoint has said.

    Args:
        worker: whose engine it is.
        endpoint: of the replay socket.
        answered: whether the replay came to its end.
        first: number of the oldest message that it still has; None without any.
        block_sizes: tokens a block in its events, each size once.
    """
    subject = subject_of(worker)
    if not answered:
        yield problem(
            subject,
            f"its replay endpoint {endpoint} does not answer",
            cost="After a gap in its events, or a restart of `kvlane publish`, its whole cache is forgotten.",
            cure=(
                'Start the engine with "replay_endpoint": "tcp://*:PORT" in --kv-events-config, and '
                "`kvlane publish` with --replay tcp://HOST:PORT."
            ),
        )
    elif first is None:
        yield warning(
            subject,
            f"its replay endpoint {endpoint} answers, and has no event",
            cost="Nothing was cached since the engine started, or KV events are off: no block is matched.",
            cure='If it serves requests, set "enable_kv_cache_events": true in its --kv-events-config.',
        )
    elif wrong := [size for size in block_sizes if size != worker.block_size]:
        yield problem(
            subject,
            f"its events are about blocks of {wrong[0]} tokens, but it registered with {worker.block_size}",
            cost=_NO_HITS,
            cure="Restart its publisher, so that it registers anew, or give the engine a --block-size.",
        )
    else:
        since = "all events since its start" if first == 0 else f"events from number {first} on"
        yield ok(subject, f"replay answers, with {since}")


def _cost(reason: Reason | None) -> str:
    if reason is Reason.TOKENIZER:
        return "Prompts that come as text or chats are placed by load alone."
    return _COSTS.get(reason, _NO_HITS) if reason else _NO_HITS
