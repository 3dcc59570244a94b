"""The gateway process: router, the services for Envoy and the admin API, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import AsyncIterator, Iterator

import structlog
import uvicorn
from starlette.types import ASGIApp

from gateway.admin.app import create_app
from gateway.admin.guard import TokenGuard
from gateway.config import GatewayConfig, split_address
from gateway.decide import KvRouter
from gateway.decision import Router
from gateway.envoy_services import cannot_listen, serve_envoy
from gateway.fleet import Fleet
from gateway.parity_probe import ParityProber
from gateway.parity_watch import ParityWatch
from gateway.probe import worker_client
from gateway.rates import Rates
from gateway.readiness import Readiness
from gateway.receipts import Receipts
from gateway.tenants.serve import gated
from gateway.tls import kept_current
from gateway.tokens.reader import PromptReader
from kvindex.errors import ConfigError, IndexUnavailable
from kvindex.redis_index import RedisIndexReader

log = structlog.get_logger(__name__)


async def run(config: GatewayConfig) -> None:
    """Serve until SIGTERM or SIGINT; then requests under way get `config.stop_grace_s` to end.

    Requests are taken as soon as the index has been read; until then only health is told.

    Raises:
        ConfigError: an address cannot be listened on, the Redis URL is none, or an extra is missing.
    """
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with contextlib.AsyncExitStack() as exits:
        # Bound first: a taken port is said at once, and health is answered before Redis is.
        admin_socket = exits.enter_context(_listen(config.admin_listen))
        index = RedisIndexReader(config)
        exits.push_async_callback(index.close)
        client = await exits.enter_async_context(worker_client(config))
        fleet = Fleet(config, index, client)
        reader = PromptReader.configured(config, lambda: fleet.snapshot.models)
        exits.callback(reader.close)
        rates, receipts = (
            Rates(config.default_profile, config.profiles),
            Receipts(config.receipts, max_bytes=config.receipt_bytes, sample=config.receipt_sample),
        )
        router = KvRouter(config, index, fleet, reader, rates=rates, receipts=receipts, client=client)
        exits.push_async_callback(router.stop)
        exits.push_async_callback(fleet.stop)
        watch = ParityWatch(config, fleet, ParityProber(config, index, reader, client), router.silent_workers)
        exits.push_async_callback(watch.stop)
        readiness = Readiness()
        app = create_app(
            router,
            fleet,
            index,
            rates=rates,
            receipts=receipts,
            readiness=readiness,
            salt_secret=config.salt_secret,
        )
        await exits.enter_async_context(_serve_admin(config, app, admin_socket))
        front = await exits.enter_async_context(gated(config, router))
        if config.tracing:
            front = await exits.enter_async_context(_traced(front, receipts))
        port = await exits.enter_async_context(serve_envoy(config, front, fleet, readiness))
        log.info("gateway listens", port=port, admin_port=admin_socket.getsockname()[1])
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(_serve(config, fleet, reader, watch, readiness))
            await stopped.wait()
            log.info("gateway stops")
            serving.cancel()


def _traced(router: Router, receipts: Receipts) -> contextlib.AbstractAsyncContextManager[Router]:
    try:
        from gateway.tracing import traced
    except ModuleNotFoundError as error:
        raise ConfigError(f"tracing needs {error.name}: pip install 'kvlane[otel]'") from error
    return traced(router, receipts)


async def _serve(
    config: GatewayConfig, fleet: Fleet, reader: PromptReader, watch: ParityWatch, readiness: Readiness
) -> None:
    """Let requests come once the fleet is known and its prompts can be read; then keep it so."""
    await _know(fleet, pause_s=config.poll_interval_ms / 1000)
    models = fleet.snapshot.models
    await _prepare(reader)
    if config.parity_probe:
        watch.start()
    await readiness.open()
    log.info("gateway serves")
    while True:
        models = await fleet.models_changed(models)
        await _prepare(reader)


async def _prepare(reader: PromptReader) -> None:
    """Load what is new, and take all that is there by now out of garbage collection.

    Tokenizers bring half a million objects that never go away. A full collection, of which there is one in
    about a thousand requests, would look at each of them, and every request would wait for half a second.
    """
    await reader.prepare()
    gc.collect()
    gc.freeze()


async def _know(fleet: Fleet, *, pause_s: float) -> None:
    """Return after the first read of the index, however long that takes."""
    reason = None
    while True:
        try:
            return await fleet.start()
        except IndexUnavailable as error:
            if str(error) != reason:
                reason = str(error)
                log.error("waiting for the index", reason=reason)
        await asyncio.sleep(pause_s)


class _AdminServer(uvicorn.Server):
    """A uvicorn that leaves the process's signals to `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _serve_admin(config: GatewayConfig, app: ASGIApp, listening: socket.socket) -> AsyncIterator[None]:
    if config.admin_token is not None:
        app = TokenGuard(app, config.admin_token.get_secret_value())
    settings = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    settings.load()
    async with contextlib.AsyncExitStack() as exits:
        if config.admin_tls is not None:
            settings.ssl = config.admin_tls.context()
            await exits.enter_async_context(kept_current(settings.ssl, config.admin_tls, "the admin port"))
        server = _AdminServer(settings)
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield
        finally:
            server.should_exit = True
            await task


def _listen(address: str) -> socket.socket:
    host, port = split_address(address)
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise cannot_listen(address, "--admin-listen") from error
