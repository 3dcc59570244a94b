"""From a prompt to the workers that may serve it: hashes, one call to the index, filters."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from gateway.chains import Chain, make_chain
from gateway.fleet import Fleet, PoolView
from gateway.plan import Candidate, Demand, obstacle
from gateway.profile import Profile
from gateway.rates import SETTINGS, Rates
from gateway.tier_lookup import InTiers, Runs, TierLookup
from gateway.tiers import TierSpeeds
from gateway.tokens.models import ServedModel
from gateway.tokens.request import Prompt, ReadRequest
from kvindex.blocks import BlockHash, Pool, root_hash
from kvindex.index import IndexReader
from kvindex.pending import pending_blocks
from kvindex.worker import RegisteredWorker, WorkerState


@dataclass(frozen=True, slots=True)
class Found:
    """The workers that may serve a request, and why the others may not, by worker id."""

    candidates: tuple[Candidate, ...]
    excluded: dict[str, str]
    chains: tuple[Chain, ...] = ()
    """The prompt that was looked up, in each pool."""
    chunk_chains: tuple[Chain, ...] = ()
    """The same in each pool of chunks, of which tiers keep some."""
    prompts: Mapping[Pool, Sequence[BlockHash]] = field(default_factory=dict)
    """Hashes of its blocks, all of them."""


def longest_prompt(read: ReadRequest) -> Prompt:
    """Return the prompt of a list that decides where the list goes: the one with most to save."""
    return max(read.prompts, key=lambda prompt: prompt.num_comparable_tokens)


def allowed(
    registered: Iterable[RegisteredWorker], demand: Demand, fleet: Fleet
) -> tuple[list[RegisteredWorker], dict[str, str]]:
    """Split workers into those that may serve `demand` and the reasons why the others may not.

    Workers that refuse our connections or do not answer our requests are left out unless no other is
    left: they may still answer Envoy.
    """
    snapshot = fleet.snapshot
    excluded: dict[str, str] = {}
    reachable: list[RegisteredWorker] = []
    doubtful: list[tuple[RegisteredWorker, str]] = []
    for each in registered:
        worker = each.worker
        if reason := obstacle(worker, snapshot.served_names(worker), demand):
            excluded[worker.worker_id] = reason
        elif each.is_draining:
            excluded[worker.worker_id] = "draining"
        elif worker.endpoint in snapshot.unreachable:
            doubtful.append((each, "refuses connections"))
        elif not snapshot.parity_of(worker).answers:
            doubtful.append((each, "answers no request"))
        else:
            reachable.append(each)
    if not reachable:
        return [each for each, _ in doubtful], excluded
    return reachable, excluded | {each.worker.worker_id: reason for each, reason in doubtful}


def registered_state(registered: RegisteredWorker) -> WorkerState:
    """Return a worker's state as of the registry's last answer."""
    return WorkerState(
        slot=registered.slot,
        load=registered.load,
        charged_tokens=registered.charged_tokens,
        charged_requests=registered.charged_requests,
    )


class Lookup:
    """Finds candidates with their overlap. Holds no state of its own."""

    def __init__(
        self, index: IndexReader, fleet: Fleet, rates: Rates, speeds: TierSpeeds, *, max_hashes: int
    ) -> None:
        self._index = index
        self._fleet = fleet
        self._rates = rates
        self._speeds = speeds
        self._tiers = TierLookup(index, fleet, max_hashes=max_hashes)
        self._max_hashes = max_hashes

    async def find(self, demand: Demand, served: ServedModel, read: ReadRequest | None) -> Found:
        """Return the candidates for `demand` in every pool of the base model.

        Args:
            served: the model that the request names.
            read: its prompts; without them every overlap is 0.

        Raises:
            IndexUnavailable: the index does not answer.
        """
        views = self._fleet.snapshot.pools_of(served.base)
        reaching = asyncio.gather(
            *(self._find_in(view.pool, demand, served.lora_name, read) for view in views)
        )
        found, in_tiers = await asyncio.gather(reaching, self._find_in_tiers(views, served.lora_name, read))
        return Found(
            candidates=tuple(
                self._with_tiers(candidate, in_tiers.runs) for each in found for candidate in each.candidates
            ),
            excluded={name: reason for each in found for name, reason in each.excluded.items()},
            chains=tuple(chain for each in found for chain in each.chains),
            chunk_chains=in_tiers.chains,
            prompts={pool: hashes for each in found for pool, hashes in each.prompts.items()},
        )

    async def _find_in_tiers(
        self, views: Iterable[PoolView], lora_name: str | None, read: ReadRequest | None
    ) -> InTiers:
        workers = (each.worker for view in views for each in view.workers.values())
        accesses = {worker.tiers for worker in workers if worker.tiers is not None}
        if read is None or not accesses:
            return InTiers({}, ())
        return await self._tiers.find(accesses, longest_prompt(read), lora_name, read.cache_salt)

    async def _find_in(
        self, pool: Pool, demand: Demand, lora_name: str | None, read: ReadRequest | None
    ) -> Found:
        hashes: Sequence[BlockHash] = ()
        if read is not None:
            prompt = longest_prompt(read)
            root = root_hash(pool.model, lora_name=lora_name, cache_salt=read.cache_salt)
            hashes = prompt.hashes(root, pool.block_size)
        match = await self._index.match(pool, hashes)
        chains: tuple[Chain, ...] = ()
        if read is not None:
            plain = (
                prompt.hashes(root_hash(pool.model), pool.block_size)
                if lora_name or read.cache_salt
                else hashes
            )
            limits = {"max_hashes": self._max_hashes, "overlap_stride": match.stride}
            chains = (make_chain(pool, hashes, plain, read.cache_salt, **limits),)
        # A slot number means nothing under another registry version: it may have a new owner.
        await self._fleet.catch_up(pool, match.registry_version)
        view = self._fleet.snapshot.pools.get(pool)
        registered = view.workers if view else {}
        states = {state.slot: state for state in match.states}
        workers, excluded = allowed(
            [registered[slot] for slot in states if slot in registered], demand, self._fleet
        )
        pending = pending_blocks(match.pending, hashes)
        candidates = tuple(
            self._candidate(
                each,
                states[each.slot],
                self._rates.profile(each.worker, view.basis_of(each) if view else SETTINGS),
                overlap_blocks=match.overlap_blocks.get(each.slot, 0),
                pending_blocks=pending.get(each.slot, 0),
            )
            for each in workers
        )
        return Found(candidates, excluded, chains, prompts={pool: hashes})

    def _candidate(
        self,
        registered: RegisteredWorker,
        state: WorkerState,
        profile: Profile,
        *,
        overlap_blocks: int,
        pending_blocks: int,
    ) -> Candidate:
        worker = registered.worker
        parity = self._fleet.snapshot.parity_of(worker)
        return Candidate(
            worker=worker,
            state=state,
            overlap_blocks=overlap_blocks,
            pending_blocks=pending_blocks,
            role=registered.role,
            degraded=parity.reason if parity.ignores_overlap else None,
            profile=profile,
            # `kvlane publish` may not know the size of the cache.
            cache_fill=registered.num_indexed_blocks / worker.num_blocks if worker.num_blocks else 0.0,
        )

    def _with_tiers(self, candidate: Candidate, runs: Runs) -> Candidate:
        access = candidate.worker.tiers
        found = runs.get(access, ()) if access else ()
        if access is None or not found:
            return candidate
        measured = self._fleet.snapshot.store_speeds
        parts = self._speeds.parts(found, access.server, measured, candidate.state.load)
        return msgspec.structs.replace(candidate, tiers=parts)
