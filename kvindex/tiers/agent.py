"""The coordinator that LMCache servers report to, and through which their stores come into the index.

Source: LMCache 0.5.6 `lmcache/v1/mp_coordinator/` (`registrar.py`, `http_apis/`): a server registers, sends
a heartbeat every few seconds, registers again when it is answered 404, leaves when it is stopped, and posts
its events, which it drops if they are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus

import httpx
import msgspec
import structlog
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kvindex import metrics
from kvindex.config import TierAgentConfig
from kvindex.errors import ConfigError, MalformedEvent, StoreUnavailable
from kvindex.index import IndexWriter
from kvindex.publisher import LoadReport, Publisher
from kvindex.redis_index import RedisIndexWriter
from kvindex.stores import Store, StoreSpeed
from kvindex.tiers.events import CacheEvents, Registration, decode_events, decode_registration
from kvindex.tiers.holdings import ServerHoldings, StoreContents
from kvindex.tiers.server import Place, ServerDescription, describe_server, list_place, read_speeds
from kvindex.worker import Load, new_incarnation

_ASK_AGAIN_S = 1.0
_WATCH_S = 1.0
_MEASURE_S = 5.0
_STOP_PATIENCE_S = 30.0

_log = structlog.get_logger(__name__)

_NO_LOAD = LoadReport(Load())


class _Followed:
    """One LMCache server. Lives on the agent's event loop, from its registration to its end.

    Args:
        writer: makes the index writer of one store's publisher.
    """

    def __init__(
        self, registration: Registration, config: TierAgentConfig, writer: Callable[[], IndexWriter]
    ) -> None:
        self._registration = registration
        self._config = config
        self._writer = writer
        self._client = httpx.Client(timeout=config.server_timeout_s)
        self._events: asyncio.Queue[list[CacheEvents]] = asyncio.Queue()
        self._description: ServerDescription | None = None
        self._holdings: ServerHoldings | None = None
        self._publishers: dict[tuple[Place, str, bool], Publisher] = {}
        self._unlisted: dict[Place, str] = {}
        self._speeds: dict[Place, StoreSpeed] = {}
        self._list_now = asyncio.Event()
        self._tasks = [asyncio.create_task(self._follow())]
        self.heard_at_s = time.monotonic()
        self._log = _log.bind(server=registration.instance_id, url=registration.url)

    def put(self, events: list[CacheEvents]) -> None:
        """Follow these next."""
        self._events.put_nowait(events)

    async def stop(self) -> None:
        """Take the server's stores out of the index."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(asyncio.to_thread(each.stop) for each in self._publishers.values()))
        self._client.close()
        for place in {place for place, _, _ in self._publishers}:
            metrics.STORE_CHUNKS.remove(place.name, place.tier)
            metrics.STORE_BYTES.remove(place.name, place.tier)
        for place, speed in self._speeds.items():
            for part in speed.parts_s():
                metrics.STORE_LOAD_COST.remove(place.name, part)

    async def _follow(self) -> None:
        try:
            description = self._description = await self._describe()
        except ConfigError as error:
            self._log.error("what this LMCache server stores is not indexed", reason=str(error))
            return
        self._holdings = ServerHoldings(description, self._open_store)
        self._log.info(
            "LMCache server joined", chunk_size=description.chunk_size, stores=description.store_names
        )
        if description.places:
            self._tasks.append(asyncio.create_task(self._list_forever(description, self._holdings)))
            self._tasks.append(asyncio.create_task(self._measure_forever(description)))
        while True:
            for events in await self._events.get():
                metrics.STORE_EVENTS.labels(description.instance_id, events.event_type).inc()
                if doubtful := self._holdings.apply(events):
                    metrics.STORE_GAPS.labels(description.instance_id).inc()
                    self._log.warning("events of an LMCache server are missing; starting over")
                    for place in doubtful & self._unlisted.keys():
                        self._holdings.forget(place)
                    self._list_now.set()
            self._count()

    async def _describe(self) -> ServerDescription:
        """Ask until the server answers: it registers while it still starts."""
        while True:
            try:
                return await asyncio.to_thread(describe_server, self._client, self._registration.url)
            except StoreUnavailable as error:
                self._log.info("waiting for an LMCache server", reason=str(error))
                await asyncio.sleep(_ASK_AGAIN_S)

    async def _list_forever(self, description: ServerDescription, holdings: ServerHoldings) -> None:
        while True:
            self._list_now.clear()
            for place in description.places:
                await self._list(place, holdings)
            self._count()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.list_interval_s):
                    await self._list_now.wait()

    async def _measure_forever(self, description: ServerDescription) -> None:
        url = self._registration.url
        while True:
            with contextlib.suppress(StoreUnavailable):  # its silence is noticed by others
                found = await asyncio.to_thread(read_speeds, self._client, url, description)
                self._speeds |= found
                for place, speed in found.items():
                    for part, cost_s in speed.parts_s().items():
                        metrics.STORE_LOAD_COST.labels(place.name, part).set(cost_s)
            await asyncio.sleep(_MEASURE_S)

    async def _list(self, place: Place, holdings: ServerHoldings) -> None:
        """Read what a place holds; of a shared one only if that is ours to tell, or nobody's yet."""
        listings = {at: each for at, each in self._publishers.items() if at[0] == place and at[2]}
        if listings and not any(each.is_registered for each in listings.values()):
            for at in listings:  # whoever takes the slot over reads it anew
                holdings.contents[at].clear()
            holdings.age(place)
            return
        holdings.begin_listing(place)
        try:
            with metrics.STORE_LISTING_SECONDS.labels(place.name).time():
                listed = await asyncio.to_thread(list_place, self._client, self._registration.url, place)
        except StoreUnavailable as error:
            holdings.give_up_listing(place)
            metrics.STORE_LISTING_FAILURES.labels(place.name).inc()
            if place not in self._unlisted:
                self._log.warning(
                    "a store cannot be listed: what it held before is learned as it is read",
                    store=place.name,
                    reason=str(error),
                )
            self._unlisted[place] = str(error)
            return
        if self._unlisted.pop(place, None):
            self._log.info("a store can be listed again", store=place.name)
        holdings.end_listing(place, listed)
        if place.is_shared:
            holdings.age(place)

    def _open_store(self, place: Place, model: str, is_listing: bool) -> StoreContents:
        description = self._description
        assert description is not None  # noqa: S101 (holdings exist only with one)
        contents = StoreContents()
        store = Store(
            name=place.name,
            teller=description.instance_id if place.is_shared and not is_listing else "",
            tier=place.tier,
            model=model,
            chunk_size=description.chunk_size,
            incarnation=new_incarnation(),
        )
        publisher = Publisher(
            store,
            self._config,
            self._writer(),
            contents,
            lambda: _NO_LOAD,
            costs=lambda: self._speeds.get(place),
            stands_by=is_listing,
        )
        self._publishers[place, model, is_listing] = publisher
        publisher.start()
        return contents

    def _count(self) -> None:
        if self._holdings is None:
            return
        contents = self._holdings.contents
        for place in {place for place, _, _ in contents}:
            for is_listing in (True, False):  # of a shared place, what is listed counts if it is ours to tell
                told = [each for at, each in contents.items() if at[0] == place and at[2] == is_listing]
                if num_chunks := sum(each.num_chunks for each in told):
                    break
            metrics.STORE_CHUNKS.labels(place.name, place.tier).set(num_chunks)
            metrics.STORE_BYTES.labels(place.name, place.tier).set(sum(each.num_bytes for each in told))
        for name, capacity_bytes in self._holdings.capacity_bytes.items():
            metrics.STORE_CAPACITY_BYTES.labels(name).set(capacity_bytes)


class TierAgent:
    """Serves LMCache servers as their coordinator, from a thread of its own, and publishes their stores.

    Args:
        config: where it listens, the index, and how it keeps its leases there.
        writer: makes the index writer of one store; None: on Redis.
    """

    def __init__(self, config: TierAgentConfig, *, writer: Callable[[], IndexWriter] | None = None) -> None:
        self._config = config
        self._writer = writer or (lambda: RedisIndexWriter(config))
        self._followed: dict[str, _Followed] = {}
        self._socket: socket.socket | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """What to give a server as `--coordinator-url`, once started."""
        if self._socket is None:
            raise ConfigError("the tier agent has not been started")
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Listen, and serve from a daemon thread.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        host, port = self._config.tier_agent_host, self._config.tier_agent_port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen()
        except OSError as error:
            listening.close()
            raise ConfigError(f"the tier agent cannot listen at {host}:{port}: {error}") from error
        self._socket = listening
        config = uvicorn.Config(self._app(), log_config=None, access_log=False, lifespan="on")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([listening],), name="kvlane-tiers", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Take all stores out of the index and stop serving. Idempotent."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(_STOP_PATIENCE_S)
        if self._socket is not None:
            self._socket.close()

    def _app(self) -> FastAPI:
        app = FastAPI(lifespan=self._lifespan, openapi_url=None)
        app.post("/instances")(self._register)
        app.put("/instances/{instance_id}/heartbeat")(self._heartbeat)
        app.delete("/instances/{instance_id}")(self._deregister)
        app.post("/events")(self._report)
        app.get("/metrics")(_metrics)
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(self._watch())
        yield
        watch.cancel()
        await asyncio.gather(*(self._end(name) for name in list(self._followed)))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            long_ago_s = time.monotonic() - self._config.server_timeout_s
            for name, followed in list(self._followed.items()):
                if followed.heard_at_s < long_ago_s:
                    _log.warning("an LMCache server is silent: its stores are not matched", server=name)
                    await self._end(name)

    async def _end(self, instance_id: str) -> None:
        if (followed := self._followed.pop(instance_id, None)) is not None:
            await followed.stop()

    async def _register(self, request: Request) -> Response:
        """A server that registers has just started, or was not known here."""
        try:
            registration = decode_registration(await request.body())
        except MalformedEvent as error:
            return _refusal(error)
        name = registration.instance_id or registration.url
        is_known = name in self._followed
        await self._end(name)
        self._followed[name] = _Followed(registration, self._config, self._writer)
        return _json({"instance_id": name, "re_registered": is_known})

    async def _heartbeat(self, instance_id: str) -> Response:
        followed = self._followed.get(instance_id)
        if followed is None:
            return _json({"error": f"unknown instance {instance_id}; re-register"}, HTTPStatus.NOT_FOUND)
        followed.heard_at_s = time.monotonic()
        return _json({"instance_id": instance_id})

    async def _deregister(self, instance_id: str) -> Response:
        await self._end(instance_id)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    async def _report(self, request: Request) -> Response:
        try:
            batches = decode_events(await request.body())
        except MalformedEvent as error:
            return _refusal(error)
        num_applied = 0
        for batch in batches:
            followed = self._followed.get(batch.instance_id)
            if followed is not None:
                followed.put([batch])
                num_applied += 1
        return _json({"applied": num_applied, "duplicates": 0, "stale": len(batches) - num_applied})


async def _metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _json(body: dict[str, object], status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def _refusal(error: MalformedEvent) -> Response:
    _log.warning("a message of an LMCache server cannot be read", reason=str(error))
    return _json({"error": str(error)}, HTTPStatus.UNPROCESSABLE_ENTITY)
