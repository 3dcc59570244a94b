"""The examination of a fleet: Redis, the gateway, every worker; each is asked, then judged by the checks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass

import httpx
import msgspec

from gateway.config import GatewayConfig
from gateway.doctor.finding import Finding, Level, problem, warning
from gateway.doctor.fleet_checks import (
    GatewayFleet,
    agreement_finding,
    count_findings,
    gateway_findings,
    lease_findings,
    pool_findings,
    sorted_workers,
    subject_of,
)
from gateway.doctor.redis_checks import redis_findings
from gateway.doctor.worker_checks import parity_findings, reachability_findings, replay_findings
from gateway.fleet import Fleet
from gateway.parity_probe import ParityProber
from gateway.probe import worker_client
from gateway.tokens.reader import PromptReader
from kvindex import redis_health
from kvindex.block_state import BlockState
from kvindex.config import admin_access
from kvindex.errors import AdminUnavailable, IndexUnavailable, MalformedEvent
from kvindex.event_source import Replay, replay
from kvindex.events import AllBlocksCleared, BlockRemoved, BlockStored, EngineEvent, decode_batch
from kvindex.index import IndexReader
from kvindex.redis_index import RedisIndexReader
from kvindex.worker import RegisteredWorker

ADMIN_TIMEOUT_S = 5.0
REPLAY_TIMEOUT_MS = 3_000
AGREEMENT_TRIES = 5
"""Between a replay and the reading of the index an engine that works goes on."""


async def examine(config: GatewayConfig, *, admin: str, replays: Mapping[str, str]) -> list[Finding]:
    """Look at everything and return what was found; sends a probe request to every worker.

    Args:
        config: the gateway's own settings, so that Redis, tokenizers and keys are those that it uses.
        admin: URL of a gateway's admin API, which need not answer.
        replays: worker id or endpoint to the replay endpoint of its engine, `tcp://host:port`.

    Raises:
        ConfigError: a setting is wrong.
    """
    try:
        health = await redis_health.examine(config)
        found = [*redis_findings(health, deadline_ms=config.index_deadline_ms)]
        async with _examiner(config, replays) as examiner:
            return found + await examiner.examine(admin)
    except IndexUnavailable as error:
        return [
            problem(
                "Redis",
                str(error),
                cost="Nothing is indexed and no worker registers; gateways route by load over who they knew.",
                cure="Start it, or set KVLANE_REDIS_URL (--redis-url) to what workers and gateways use.",
            )
        ]


@contextlib.asynccontextmanager
async def _examiner(config: GatewayConfig, replays: Mapping[str, str]) -> AsyncIterator[_Examiner]:
    index = RedisIndexReader(config)
    async with contextlib.AsyncExitStack() as exits:
        exits.push_async_callback(index.close)
        client = await exits.enter_async_context(worker_client(config))
        fleet = Fleet(config, index, client)
        reader = PromptReader.configured(config, lambda: fleet.snapshot.models)
        exits.callback(reader.close)
        prober = ParityProber(config, index, reader, client)
        yield _Examiner(fleet, index, prober, replays, asyncio.Semaphore(config.parity_concurrency))


@dataclass(frozen=True, slots=True)
class _Examiner:
    fleet: Fleet
    index: IndexReader
    prober: ParityProber
    replays: Mapping[str, str]
    turn: asyncio.Semaphore

    async def examine(self, admin: str) -> list[Finding]:
        await self.fleet.poll()
        await self.fleet.probe()
        workers = sorted_workers(tuple(self.fleet.snapshot.workers()))
        found: list[Finding] = []
        gateway: GatewayFleet | None = None
        try:
            gateway = await _gateway(admin)
            found += gateway_findings(admin, gateway, workers)
        except AdminUnavailable as error:
            found.append(_no_gateway(admin, error))
        found += pool_findings([pool for pool, view in self.fleet.snapshot.pools.items() if view.workers])
        for each in await asyncio.gather(*(self._worker(worker, gateway) for worker in workers)):
            found += each
        return found

    async def _worker(self, registered: RegisteredWorker, gateway: GatewayFleet | None) -> list[Finding]:
        worker, snapshot = registered.worker, self.fleet.snapshot
        found = [*lease_findings(registered), *count_findings(registered)]
        if worker.endpoint in snapshot.unreachable:
            return [*reachability_findings(worker), *found]
        adapter = next(iter(snapshot.adapters(worker)), None)
        async with self.turn:
            own = await self.prober.check(registered, adapter)
        gateways = gateway.parity_of(worker) if gateway else None
        found = [*parity_findings(worker, own, gateways, adapter=adapter), *found]
        endpoint = self.replays.get(worker.worker_id) or self.replays.get(worker.endpoint)
        return found if endpoint is None else found + await self._replay(registered, endpoint)

    async def _replay(self, registered: RegisteredWorker, endpoint: str) -> list[Finding]:
        worker = registered.worker
        found: list[Finding] = []
        for attempt in range(AGREEMENT_TRIES):
            answer = await asyncio.to_thread(replay, endpoint, 0, timeout_ms=REPLAY_TIMEOUT_MS)
            try:
                events = [*_events(answer)]
            except MalformedEvent as error:
                return [_unreadable(registered, endpoint, error)]
            first = answer.messages[0][0] if answer.messages else None
            sizes = {event.block_size: None for event in events if isinstance(event, BlockStored)}
            found = [
                *replay_findings(
                    worker, endpoint, answered=answer.is_whole, first=first, block_sizes=tuple(sizes)
                )
            ]
            if first != 0 or set(sizes) != {worker.block_size}:
                return found
            state = _state(registered, events)
            _, live = await self.index.workers(worker.pool)
            now = next((each for each in live if each.worker == worker), None)
            if now is None:
                return found
            agreement = agreement_finding(now, state.num_blocks, state.digest, f"the events of {endpoint}")
            found.append(agreement)
            if agreement.level is Level.OK:
                return found
            await asyncio.sleep(attempt / 2)
        return found


async def _gateway(admin: str) -> GatewayFleet:
    try:
        options = admin_access().http_options()
        async with httpx.AsyncClient(timeout=ADMIN_TIMEOUT_S, trust_env=False, **options) as client:
            answer = (await client.get(f"{admin.rstrip('/')}/fleet")).raise_for_status()
        return msgspec.json.decode(answer.content, type=GatewayFleet)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise AdminUnavailable(f"no gateway answers there ({error})") from error
    except msgspec.DecodeError as error:
        raise AdminUnavailable(f"what answers there is no gateway of this version ({error})") from error


def _no_gateway(admin: str, error: AdminUnavailable) -> Finding:
    return warning(
        f"gateway {admin}",
        str(error),
        cost="What a gateway elsewhere holds of the workers is not known here; if none runs, nobody routes.",
        cure="Give its address, --admin http://HOST:9003 or KVLANE_ADMIN_URL, or start `kvlane gateway`.",
    )


def _events(answer: Replay) -> Iterator[EngineEvent]:
    for _, payload in answer.messages:
        yield from decode_batch(payload)


def _state(registered: RegisteredWorker, events: list[EngineEvent]) -> BlockState:
    state = BlockState(registered.worker.model, registered.worker.block_size)
    for event in events:
        match event:
            case BlockStored():
                state.store(event)
            case BlockRemoved():
                state.remove(event)
            case AllBlocksCleared():
                state.clear()
    return state


def _unreadable(registered: RegisteredWorker, endpoint: str, error: MalformedEvent) -> Finding:
    return problem(
        subject_of(registered.worker),
        f"the events of {endpoint} cannot be read: {error}",
        cost="None of its blocks is ever matched.",
        cure="Run vLLM 0.24 or newer, and let the endpoint be a vLLM's own replay_endpoint.",
    )
