"""The fleet as this gateway last saw it: live workers, what they serve, whether they can be reached.

Three loops keep it: the index is polled for workers, workers are asked for their models, and what
dead workers left in the index is swept.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import structlog

from gateway import metrics
from gateway.config import GatewayConfig
from gateway.parity import Parity, State, pool_state
from gateway.probe import ModelCard, Unreachable, served_models
from gateway.rates import SETTINGS, Basis, Source, basis_of, typical_costs
from gateway.tiers import Speeds
from gateway.tokens.models import Models, ServedModel
from kvindex.blocks import Pool
from kvindex.errors import IndexUnavailable
from kvindex.index import IndexReader
from kvindex.stores import Store, StoreSpeed
from kvindex.worker import RegisteredWorker, StepCosts, Tier, Worker

log = structlog.get_logger(__name__)

SWEEP_INTERVAL_S = 1.0
SWEEP_PAUSE_S = 0.02
SWEEP_BUCKETS = 8
"""Buckets of one slice: well under 5 ms of the Redis core that everyone shares."""

PROBE_AGAIN_AFTER_S = 1.0
"""Requests for unknown models or that went astray make the workers be asked at most this often."""


_UNCHECKED = Parity()


@dataclass(frozen=True, slots=True)
class PoolView:
    """The live workers of a pool, by slot, as of `registry_version`."""

    pool: Pool
    registry_version: int
    workers: Mapping[int, RegisteredWorker]
    typical_costs: StepCosts | None = None
    """What the steps of a worker in the middle of the pool cost; None until one has measured them."""

    def basis_of(self, registered: RegisteredWorker) -> Basis:
        """Return what is known of the steps of one of the workers."""
        return basis_of(registered, self.typical_costs)


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """Everything known of the fleet at one moment; never changed, only replaced."""

    pools: Mapping[Pool, PoolView] = field(default_factory=dict)
    cards: Mapping[str, tuple[ModelCard, ...]] = field(default_factory=dict)
    """Endpoint to the models it said it serves."""
    unreachable: frozenset[str] = frozenset()
    """Endpoints that refused our last connection."""
    models: Models = field(default_factory=Models)
    """What requests may ask for."""
    stores: Mapping[Pool, Mapping[int, Store]] = field(default_factory=dict)
    """The live stores of each pool of chunks, by slot."""
    store_speeds: Speeds = field(default_factory=dict)
    """What LMCache servers have measured of their stores."""
    parity: Mapping[str, Parity] = field(default_factory=dict)
    """Incarnation to the verdict on it; see `parity_of`."""

    def workers(self) -> Iterable[RegisteredWorker]:
        """Yield every live worker."""
        for view in self.pools.values():
            yield from view.workers.values()

    def endpoints(self) -> tuple[str, ...]:
        """Return every live endpoint once, sorted."""
        return tuple(sorted({registered.worker.endpoint for registered in self.workers()}))

    def served_names(self, worker: Worker) -> frozenset[str]:
        """Return the names by which requests may ask for what `worker` serves."""
        return frozenset({worker.model, *(card.id for card in self.cards.get(worker.endpoint, ()))})

    def adapters(self, worker: Worker) -> tuple[str, ...]:
        """Return the LoRA adapters that `worker` said it serves, sorted."""
        cards = self.cards.get(worker.endpoint, ())
        return tuple(sorted(card.id for card in cards if card.parent is not None))

    def is_live(self, worker: Worker) -> bool:
        """Say whether this life of `worker` has a valid lease."""
        return self._registered(worker) is not None

    def basis_of(self, worker: Worker) -> Basis:
        """Return what is known of the steps of `worker`."""
        registered = self._registered(worker)
        return self.pools[worker.pool].basis_of(registered) if registered else SETTINGS

    def _registered(self, worker: Worker) -> RegisteredWorker | None:
        view = self.pools.get(worker.pool)
        live = view.workers.values() if view else ()
        return next((each for each in live if each.worker.incarnation == worker.incarnation), None)

    def accepts_connections(self, worker: Worker) -> bool:
        """Say whether `worker` was asked for its models and did not refuse."""
        return worker.endpoint in self.cards and worker.endpoint not in self.unreachable

    def parity_of(self, worker: Worker) -> Parity:
        """Return the verdict on `worker`; CHECKING while there is none."""
        return self.parity.get(worker.incarnation, _UNCHECKED)

    def pool_state(self, pool: Pool) -> State:
        """Return the state of the worst of the pool's workers."""
        return pool_state(self.parity_of(each.worker) for each in self.pools[pool].workers.values())

    def pools_of(self, base: str) -> list[PoolView]:
        """Return the pools of a base model that have live workers: one for each block size."""
        return [view for pool, view in self.pools.items() if pool.model == base and view.workers]


def _served(snapshot: FleetSnapshot, config: GatewayConfig) -> Iterator[ServedModel]:
    """Yield every name of every live worker; the longest context of a name first."""
    workers = [registered.worker for registered in snapshot.workers()]
    for worker in sorted(workers, key=lambda worker: -worker.max_model_len):
        cards = snapshot.cards.get(worker.endpoint, ())
        roots = (card.root for card in cards if card.parent is None and card.root)
        tokenizer = config.tokenizers.get(worker.model) or next(roots, worker.model)
        adapters = {card.id for card in cards if card.parent is not None}
        for name in sorted(snapshot.served_names(worker)):
            yield ServedModel(
                name=name,
                base=worker.model,
                tokenizer=tokenizer,
                lora_name=name if name in adapters else None,
                max_model_len_tokens=worker.max_model_len,
                chat_template=config.chat_templates.get(worker.model),
            )


def _with_missing(found: Mapping[Pool, PoolView], former: Mapping[Pool, PoolView]) -> dict[Pool, PoolView]:
    """Return the pools with the workers that were known before and are in none of them now."""
    pools = dict(found)
    known = {each.worker.worker_id for view in pools.values() for each in view.workers.values()}
    for pool, view in former.items():
        missing = {slot: each for slot, each in view.workers.items() if each.worker.worker_id not in known}
        if missing:
            now = pools.get(pool, PoolView(pool, view.registry_version, {}))
            # A slot that has a new owner is the new owner's.
            pools[pool] = replace(now, workers={**missing, **now.workers})
    return pools


class Fleet:
    """Follows the fleet on one event loop and implements `Endpoints`.

    Args:
        index: read and swept, not closed.
        client: HTTP client for the workers, not closed.
    """

    def __init__(self, config: GatewayConfig, index: IndexReader, client: httpx.AsyncClient) -> None:
        self._config = config
        self._index = index
        self._client = client
        self._snapshot = FleetSnapshot()
        self._failure: str | None = "the index has not been read yet"
        self._version = 0
        self._changed = asyncio.Event()
        self._polling = asyncio.Lock()
        self._probing = asyncio.Lock()
        self._probe_now = asyncio.Event()
        self._probed_at = 0.0
        self._recovered_at: float | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def snapshot(self) -> FleetSnapshot:
        """The latest state."""
        return self._snapshot

    @property
    def failure(self) -> str | None:
        """Why the snapshot may be old; None while the index answers."""
        return self._failure

    @property
    def is_recovering(self) -> bool:
        """Whether the index came back just now: workers that it does not know may not have told it yet."""
        if self._recovered_at is None:
            return False
        return time.monotonic() - self._recovered_at < self._config.recovery_grace_s

    @property
    def checks_parity(self) -> bool:
        """Whether workers are checked when they join; if not, all stay CHECKING."""
        return self._config.parity_probe

    @property
    def version(self) -> int:
        """See `Endpoints`. 0 until the index has been read."""
        return self._version

    @property
    def addresses(self) -> tuple[str, ...]:
        """See `Endpoints`. What refuses us may still answer Envoy, so it stays in."""
        return self._snapshot.endpoints()

    @property
    def draining(self) -> frozenset[str]:
        """See `Endpoints`. Of several ranks at an address all must drain."""
        getting = {each.worker.endpoint for each in self._snapshot.workers() if not each.is_draining}
        return frozenset(self._snapshot.endpoints()) - getting

    async def changed(self, seen: int) -> None:
        """See `Endpoints`."""
        while self._version == seen:
            await self._changed.wait()

    async def models_changed(self, seen: Models) -> Models:
        """Return the served models as soon as they are not `seen`."""
        while self._snapshot.models is seen:
            await self._changed.wait()
        return self._snapshot.models

    async def start(self) -> None:
        """Read the index, ask the workers for their models, then follow both until `stop`.

        Raises:
            IndexUnavailable: the index cannot be read; nothing was started.
        """
        await self.poll()
        await self.probe()
        loops = (self._poll_forever, self._probe_forever, self._sweep_forever)
        self._tasks = [asyncio.create_task(loop()) for loop in loops]

    async def stop(self) -> None:
        """Stop following. The last snapshot stays."""
        while self._tasks:
            # On Python 3.11 asyncio.wait_for may swallow a cancellation; the next one arrives.
            for task in self._tasks:
                task.cancel()
            _, pending = await asyncio.wait(self._tasks, timeout=0.5)
            self._tasks = list(pending)

    async def poll(self) -> None:
        """Read pools and workers from the index now.

        Raises:
            IndexUnavailable: the last snapshot stays and `failure` says why.
        """
        async with self._polling:
            await self._poll()

    async def catch_up(self, pool: Pool, registry_version: int) -> None:
        """Read the index again unless the snapshot of `pool` is of `registry_version`.

        Raises:
            IndexUnavailable: as `poll`.
        """
        async with self._polling:
            view = self._snapshot.pools.get(pool)
            if view is None or view.registry_version != registry_version:
                await self._poll()

    async def probe(self) -> None:
        """Ask every endpoint for its models now."""
        async with self._probing:
            self._probe_now.clear()
            self._probed_at = time.monotonic()
            endpoints = self.addresses
            answers = await asyncio.gather(*map(self._ask, endpoints))
            refusing = frozenset(e for e, cards in zip(endpoints, answers, strict=True) if cards is None)
            for endpoint in sorted(refusing ^ self._snapshot.unreachable):
                log.warning(
                    "worker reachable" if endpoint not in refusing else "worker refuses connections",
                    endpoint=endpoint,
                )
            known = self._snapshot.cards
            cards = {
                endpoint: known.get(endpoint, ()) if answer is None else answer
                for endpoint, answer in zip(endpoints, answers, strict=True)
            }
            self._replace(cards=cards, unreachable=refusing)
            metrics.UNREACHABLE_ENDPOINTS.set(len(refusing))

    async def look_again(self) -> None:
        """Ask the workers once more: a name that nobody served a moment ago may be a new adapter."""
        if time.monotonic() - self._probed_at >= PROBE_AGAIN_AFTER_S:
            await self.probe()

    def note_parity(self, worker: Worker, parity: Parity) -> None:
        """Keep the verdict on this life of `worker`, if it still lives."""
        if self._snapshot.is_live(worker):
            self._replace(parity={**self._snapshot.parity, worker.incarnation: parity})
            self._count_workers()

    def suspect(self) -> None:
        """Have the workers probed soon: a request did not get where it was sent."""
        if time.monotonic() - self._probed_at >= PROBE_AGAIN_AFTER_S:
            self._probe_now.set()

    async def _poll(self) -> None:
        try:
            views = await asyncio.gather(*map(self._view, await self._index.pools()))
            chunk_pools = await self._index.chunk_pools()
            told = await asyncio.gather(*map(self._index.stores, chunk_pools))
        except IndexUnavailable as error:
            self._note(str(error))
            raise
        if self._failure is not None and self._version > 0:
            self._recovered_at = time.monotonic()
        self._note(None)
        former = self.addresses, self.draining
        pools = {view.pool: view for view in views}
        if self.is_recovering:
            pools = _with_missing(pools, self._snapshot.pools)
        live = {each.worker.incarnation for view in pools.values() for each in view.workers.values()}
        parity = {name: parity for name, parity in self._snapshot.parity.items() if name in live}
        stores = {
            pool: {each.slot: each.store for each in found}
            for pool, (_, found) in zip(chunk_pools, told, strict=True)
        }
        speeds: dict[str, dict[str, StoreSpeed]] = {}
        for each in (each for _, found in told for each in found):
            if each.speed is not None:
                speeds.setdefault(each.store.name, {})[each.store.teller] = each.speed
        self._replace(pools=pools, stores=stores, store_speeds=speeds, parity=parity)
        self._count_workers()
        if not set(self.addresses) <= self._snapshot.cards.keys():
            self._probe_now.set()
        if (self.addresses, self.draining) != former or self._version == 0:
            self._version += 1
            self._wake()

    async def _view(self, pool: Pool) -> PoolView:
        registry_version, workers = await self._index.workers(pool)
        by_slot = {registered.slot: registered for registered in workers}
        return PoolView(pool, registry_version, by_slot, typical_costs(workers))

    async def _ask(self, endpoint: str) -> tuple[ModelCard, ...] | None:
        try:
            cards = await served_models(self._client, endpoint)
        except Unreachable:
            return None
        return self._snapshot.cards.get(endpoint, ()) if cards is None else cards

    def _replace(self, **fields: Any) -> None:  # noqa: ANN401 (fields of the snapshot)
        snapshot = replace(self._snapshot, **fields)
        models = Models(_served(snapshot, self._config))
        if list(models) != list(snapshot.models):
            snapshot = replace(snapshot, models=models)
            self._wake()
        self._snapshot = snapshot

    def _count_workers(self) -> None:
        snapshot = self._snapshot
        states = Counter(snapshot.parity_of(each.worker).state for each in snapshot.workers())
        metrics.LIVE_WORKERS.set(states.total())
        for state in State:
            metrics.WORKERS.labels(state).set(states[state])
        tiers = Counter(store.tier for stores in snapshot.stores.values() for store in stores.values())
        for tier in Tier:
            if tier is not Tier.DEVICE:
                metrics.STORES.labels(tier).set(tiers[tier])
        sources = Counter(
            view.basis_of(each).source for view in snapshot.pools.values() for each in view.workers.values()
        )
        for source in Source:
            metrics.RATES.labels(source).set(sources[source])
        metrics.POOL_EXACT.clear()
        for pool, view in snapshot.pools.items():
            if view.workers:
                is_exact = snapshot.pool_state(pool) is State.EXACT
                metrics.POOL_EXACT.labels(pool.model, pool.block_size).set(is_exact)

    def _wake(self) -> None:
        self._changed.set()
        self._changed.clear()

    def _note(self, failure: str | None) -> None:
        if failure and not self._failure:
            log.error("index unavailable: going on with the last known fleet", reason=failure)
        elif self._failure and not failure:
            log.info("index available")
        self._failure = failure
        metrics.INDEX_AVAILABLE.set(failure is None)

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.poll_interval_ms / 1000)
            with contextlib.suppress(IndexUnavailable):
                await self.poll()

    async def _probe_forever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.probe_interval_s):
                    await self._probe_now.wait()
            await self.probe()

    async def _sweep_forever(self) -> None:
        pause_s = SWEEP_INTERVAL_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s = SWEEP_INTERVAL_S
            for pool in (*self._snapshot.pools, *self._snapshot.stores):
                with contextlib.suppress(IndexUnavailable):
                    if await self._index.sweep(pool, max_buckets=SWEEP_BUCKETS):
                        pause_s = SWEEP_PAUSE_S
                    num_expired = await self._index.expired_reservations(pool)
                    metrics.EXPIRED_RESERVATIONS.labels(pool.model, pool.block_size).set(num_expired)
