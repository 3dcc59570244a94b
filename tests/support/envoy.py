"""A real Envoy and what stands around it in tests: scripted router, known endpoints, small upstreams."""

import asyncio
import contextlib
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from connectors.bench.ports import free_ports
from gateway.config import GatewayConfig
from gateway.decision import Decision, End, HttpRequest, Served
from gateway.envoy import EnvoyOptions, bootstrap, to_yaml
from gateway.envoy_services import serve_envoy
from gateway.errors import RequestError
from gateway.readiness import Readiness
from kvindex.tls import ServerTls
from tests.support.waiting import eventually

ENVOY = Path(sys.executable).with_name("envoy")
METHODS = ["GET", "POST"]


class ScriptedRouter:
    """Sends every request to `destinations`, or does what `script` does, and remembers everything."""

    def __init__(self, destinations: tuple[str, ...] = ()) -> None:
        self.destinations = destinations
        self.body: bytes | None = None
        self.num_prompt_tokens = 0
        self.script: Callable[[HttpRequest], Awaitable[None]] | None = None
        self.refusal: RequestError | None = None
        self.requests: list[HttpRequest] = []
        self.finished: list[tuple[str, End]] = []
        self.served: list[Served] = []

    def admit(self, head: HttpRequest) -> None:
        assert head.body == b""
        if self.refusal is not None:
            raise self.refusal

    async def decide(self, request: HttpRequest) -> Decision:
        self.requests.append(request)
        if self.script is not None:
            await self.script(request)
        decision_id = f"{len(self.requests):016x}"
        return Decision(
            decision_id=decision_id,
            destinations=self.destinations,
            request_headers={"x-request-id": f"id-kv{decision_id}"},
            response_headers={"x-kvlane-decision": decision_id, "x-kvlane-worker": self.destinations[0]},
            removed_headers=("authorization",),
            body=self.body,
            num_prompt_tokens=self.num_prompt_tokens,
        )

    async def finish(self, decision_id: str, end: End) -> None:
        self.finished.append((decision_id, end))

    def record(self, served: Served) -> None:
        self.served.append(served)


class KnownEndpoints:
    """Endpoints that a test sets; unknown until it does."""

    def __init__(self, *addresses: str) -> None:
        self.version = 0
        self.addresses: tuple[str, ...] = ()
        self.draining: frozenset[str] = frozenset()
        self._condition = asyncio.Condition()
        if addresses:
            self.version, self.addresses = 1, addresses

    async def set(self, *addresses: str, draining: frozenset[str] = frozenset()) -> None:
        async with self._condition:
            self.version += 1
            self.addresses, self.draining = addresses, draining
            self._condition.notify_all()

    async def changed(self, seen: int) -> None:
        async with self._condition:
            await self._condition.wait_for(lambda: self.version != seen)


@contextlib.asynccontextmanager
async def serve(
    endpoint: Callable[[Request], Awaitable[Response]], context: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Run an HTTP server (over TLS, given a context) where `endpoint` answers all; yield its `ip:port`."""
    (port,) = free_ports(1)
    app = Starlette(routes=[Route("/{path:path}", endpoint, methods=METHODS)])
    config = uvicorn.Config(app, port=port, log_config=None, timeout_graceful_shutdown=1)
    config.load()
    config.ssl = context
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


@contextlib.contextmanager
def run_envoy(config: str, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run Envoy with this bootstrap; its log lies in `directory`."""
    file = directory / "envoy.yaml"
    file.write_text(config)
    with (directory / "envoy.log").open("wb") as log:
        command = [ENVOY, "-c", file, "--disable-hot-restart", "--concurrency", "1", "-l", "info"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


class Stack:
    """A gateway with a scripted router, and a real Envoy in front of it."""

    def __init__(self, directory: Path, router: ScriptedRouter, endpoints: KnownEndpoints) -> None:
        self.directory = directory
        self.router = router
        self.endpoints = endpoints
        self.readiness = Readiness()
        self.opens = True
        self.gateway_tls: ServerTls | None = None
        envoy_port, admin_port, self.gateway_port = free_ports(3)
        self.url = f"http://127.0.0.1:{envoy_port}"
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        self.options = EnvoyOptions(
            listen=f"127.0.0.1:{envoy_port}",
            admin=f"127.0.0.1:{admin_port}",
            gateways=(f"127.0.0.1:{self.gateway_port}",),
        )

    @contextlib.asynccontextmanager
    async def serve_gateway(self) -> AsyncIterator[int]:
        gateway = GatewayConfig(
            listen=f"127.0.0.1:{self.gateway_port}",
            max_body_bytes=self.options.max_body_bytes,
            tls=self.gateway_tls,
            stop_grace_s=0,
        )
        async with serve_envoy(gateway, self.router, self.endpoints, self.readiness) as port:
            if self.opens:
                await self.readiness.open()
            yield port

    async def stop_gateway(self) -> None:
        await self._gateway.aclose()

    async def stat(self, name: str) -> int:
        """Return one of Envoy's counters."""
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"{self.admin_url}/stats?filter=^{name}$")).text
        return int(text.partition(": ")[2])

    async def known_hosts(self) -> set[str]:
        """Return the workers that Envoy knows."""
        return set(await self._health())

    async def is_known_to_drain(self, address: str) -> bool:
        """Return whether Envoy sends nothing new to the worker."""
        return (await self._health())[address] == "DRAINING"

    async def _health(self) -> dict[str, str]:
        """Return what Envoy was told of each worker's health."""
        async with httpx.AsyncClient() as client:
            status = (await client.get(f"{self.admin_url}/clusters?format=json")).json()
        workers = next(each for each in status["cluster_statuses"] if each["name"] == "kvlane_workers")
        found = {}
        for host in workers.get("host_statuses", []):
            socket = host["address"]["socket_address"]
            health = host["health_status"].get("eds_health_status", "")
            found[f"{socket['address']}:{socket['port_value']}"] = health
        return found

    async def until_hosts(self, *addresses: str) -> None:
        async def known() -> bool:
            return await self.known_hosts() == set(addresses)

        await eventually(known)

    @contextlib.asynccontextmanager
    async def run(
        self, change: Callable[[dict[str, object]], None] = lambda _: None, **options: object
    ) -> AsyncIterator["Stack"]:
        """Start gateway and Envoy with these options; `change` edits the bootstrap in place."""
        self.options = replace(self.options, **options)
        config = bootstrap(self.options)
        change(config)
        async with contextlib.AsyncExitStack() as self._gateway:
            await self._gateway.enter_async_context(self.serve_gateway())
            with run_envoy(to_yaml(config), self.directory):
                await eventually(self._is_ready, 30)
                yield self

    async def _is_ready(self) -> bool:
        async with httpx.AsyncClient() as client:
            with contextlib.suppress(httpx.TransportError):
                return (await client.get(f"{self.admin_url}/ready")).status_code == 200
        return False
