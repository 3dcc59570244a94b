"""Checks of the gateway's view of the fleet, of pools, and of how workers are registered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import msgspec

from gateway.doctor.finding import Finding, ok, problem, warning
from gateway.parity import Parity
from kvindex.blocks import Pool
from kvindex.worker import RegisteredWorker, Worker

UNMATCHED_AFTER = 0.5
"""Share of its lease after which a worker should have spoken again; heartbeats are six to a lease."""


class GatewayWorker(msgspec.Struct):
    """What a gateway's `/fleet` says of a worker."""

    worker_id: str
    worker: Worker
    reachable: bool
    parity: Parity


class GatewayFleet(msgspec.Struct):
    """A gateway's `/fleet`."""

    failure: str | None
    parity_probe: bool
    workers: list[GatewayWorker]

    def parity_of(self, worker: Worker) -> Parity | None:
        """Return the gateway's verdict on this life of `worker`, if it knows it."""
        found = (each.parity for each in self.workers if each.worker.incarnation == worker.incarnation)
        return next(found, None)


def gateway_findings(
    admin: str, fleet: GatewayFleet, registered: Collection[RegisteredWorker]
) -> Iterator[Finding]:
    """Yield what is wrong with the gateway at `admin`, beside its verdicts on workers.

    Args:
        registered: the live workers in the index that this command reads.
    """
    subject = f"gateway {admin}"
    if fleet.failure:
        yield problem(
            subject,
            f"it does not reach the index: {fleet.failure}",
            cost="It routes by load, over the workers that it last knew.",
            cure="Bring Redis back, or give the gateway the right --redis-url.",
        )
        return
    here = {each.worker.incarnation: each.worker.worker_id for each in registered}
    there = {each.worker.incarnation: each.worker_id for each in fleet.workers}
    if here and not here.keys() & there.keys():
        yield problem(
            subject,
            f"it knows {len(there)} workers, and none of the {len(here)} that are registered here",
            cost="It reads another index than the workers write: those workers get no request.",
            cure="Give gateway and workers one KVLANE_REDIS_URL, with one database number.",
        )
    elif missing := sorted(here[name] for name in here.keys() - there.keys()):
        yield warning(
            subject,
            f"it does not know {', '.join(missing)}",
            cost="No request goes there, unless they have joined or left this very moment.",
            cure="Run this again. If it stays, compare KVLANE_REDIS_URL of gateway and workers.",
        )
    if not fleet.parity_probe:
        yield warning(
            subject,
            "it does not check workers that join: parity_probe is off",
            cost="A worker whose blocks never match looks like any other, and its hit rate is zero.",
            cure="Remove `parity_probe: false` from its --config, or KVLANE_PARITY_PROBE.",
        )
    elif here.keys() <= there.keys():
        yield ok(subject, f"it knows the {len(here)} registered workers")


def pool_findings(pools: Collection[Pool]) -> Iterator[Finding]:
    """Yield what pools with live workers have against each other.

    Args:
        pools: those with a live worker.
    """
    if not pools:
        yield problem(
            "fleet",
            "no worker is live: none holds a valid lease",
            cost="Every request is answered 503.",
            cure=(
                "Start one with `kvlane serve MODEL`, or `kvlane publish` beside a vLLM that runs, with this "
                "KVLANE_REDIS_URL. If some run already, look for `the index does not answer` in their logs."
            ),
        )
    by_model: defaultdict[str, list[Pool]] = defaultdict(list)
    for pool in pools:
        by_model[pool.model].append(pool)
    for model, same in sorted(by_model.items()):
        if len({pool.scheme for pool in same}) > 1:
            yield warning(
                f"model {model}",
                f"its workers hash blocks by {len(same)} schemes",
                cost="Workers of the other scheme are never matched: they run another version of kvlane.",
                cure="Install one version of kvlane everywhere and restart the older workers.",
            )
        elif len(same) > 1:
            sizes = " and ".join(
                str(pool.block_size) for pool in sorted(same, key=lambda pool: pool.block_size)
            )
            yield warning(
                f"model {model}",
                f"its workers have blocks of {sizes} tokens",
                cost="Every request is looked up once for each size.",
                cure="Start all its engines with the same --block-size.",
            )


def lease_findings(registered: RegisteredWorker) -> Iterator[Finding]:
    """Yield whether a worker's publisher speaks as often as it should."""
    age_ms = registered.lease_ms - registered.lease_left_ms
    if age_ms > UNMATCHED_AFTER * registered.lease_ms:
        yield warning(
            subject_of(registered.worker),
            f"its last heartbeat is {age_ms / 1000:.1f} s old, its lease {registered.lease_ms / 1000:.1f} s",
            cost="When the lease ends it gets no request until it speaks again.",
            cure=(
                "Find what holds its publisher up (CPU of the engine's process, network to Redis), or set "
                f"KVLANE_LEASE_MS={2 * registered.lease_ms} there."
            ),
        )


def count_findings(registered: RegisteredWorker) -> Iterator[Finding]:
    """Yield whether the index counts more blocks than the worker's cache can hold."""
    num_blocks = registered.worker.num_blocks
    if num_blocks and registered.num_indexed_blocks > num_blocks:
        yield problem(
            subject_of(registered.worker),
            f"the index counts {registered.num_indexed_blocks:,} blocks of it; its cache has {num_blocks:,}",
            cost="Some are phantoms: requests are sent to blocks that it does not hold.",
            cure=_RESTART_PUBLISHER,
        )


def agreement_finding(registered: RegisteredWorker, num_blocks: int, digest: int, sources: str) -> Finding:
    """Return whether the index holds for a worker what its engine's own events amount to.

    Args:
        registered: as the index has it.
        num_blocks: distinct blocks, by the events.
        digest: XOR of their hashes.
        sources: where the events came from.
    """
    subject = subject_of(registered.worker)
    if (registered.num_indexed_blocks, registered.digest) == (num_blocks, f"{digest:016x}"):
        return ok(subject, f"count ({num_blocks:,} blocks) and digest are those of {sources}")
    return problem(
        subject,
        f"the index counts {registered.num_indexed_blocks:,} blocks with digest {registered.digest}; "
        f"{sources} make {num_blocks:,} with {digest:016x}",
        cost="Blocks are matched that it does not hold, or held that are not matched.",
        cure=_RESTART_PUBLISHER,
    )


_RESTART_PUBLISHER = (
    "Restart `kvlane publish`, or the engine if it has the connector: it then sends its whole state."
)


def subject_of(worker: Worker) -> str:
    """Return how findings name a worker."""
    return f"worker {worker.worker_id}"


def sorted_workers(registered: Sequence[RegisteredWorker]) -> list[RegisteredWorker]:
    """Return the workers in the order in which they are shown."""
    return sorted(registered, key=lambda each: (each.worker.model, each.worker.worker_id))
