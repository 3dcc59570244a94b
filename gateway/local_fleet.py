"""A whole fleet on one machine: an embedded Redis, engines, a gateway and Envoy."""

from __future__ import annotations

import functools
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec

from gateway.envoy import WORKERS, LbPolicy
from gateway.errors import ProcessEnded
from gateway.parity import Parity
from gateway.processes import Processes, child_processes
from kvindex.embedded import embedded_redis

_POLL_S = 0.2
_SLOW_S = 60.0
# Below the range from which Linux takes the ports of outgoing connections: an engine needs half a minute
# before it listens.
_PORTS = range(12_000, 32_000)
# Engines that compute on the gateway's own cores keep it waiting; that is no reason to route blindly.
PATIENCE = {"KVLANE_INDEX_DEADLINE_MS": "1000", "KVLANE_TOKENIZE_DEADLINE_MS": "1000"}

EngineCommand = Callable[[int, str], Sequence[str]]
"""Port and Redis URL to the command line of an engine that listens there and publishes itself."""


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """What to start."""

    engine: EngineCommand
    num_workers: int = 2
    num_gateways: int = 1
    listen: str | None = None
    """`host:port` of Envoy; None: a free port of 127.0.0.1."""
    gateway_env: Callable[[int], Mapping[str, str]] = lambda _: {}
    """Number of a gateway to what its environment has beside ours."""
    start_timeout_s: float = 1800.0
    """Longest wait for everything to be ready; a large model may have to be downloaded first."""


class LocalFleet:
    """A running fleet. `engines` are `ip:port`; the child processes have the names of their parts."""

    def __init__(self, processes: Processes, redis_url: str, options: FleetOptions) -> None:
        num_gateways = options.num_gateways
        ports = free_ports(1 + 2 * num_gateways + options.num_workers)
        self._envoy_admin, *addresses = (f"127.0.0.1:{port}" for port in ports)
        self.redis_url = redis_url
        self.admins = addresses[:num_gateways]
        self._gateways = addresses[num_gateways : 2 * num_gateways]
        self.engines = addresses[2 * num_gateways :]
        self.envoy = options.listen or free_address()
        self.processes = processes
        self.pids: dict[str, int] = {}
        self._options = options

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://{self.envoy}"

    @property
    def admin_url(self) -> str:
        """Health, metrics, fleet and receipts of the first gateway."""
        return f"http://{self.admins[0]}"

    def start(self) -> None:
        """Start every part; none is ready yet."""
        for number in range(len(self._gateways)):
            self.start_gateway(number)
        gateways = [argument for each in self._gateways for argument in ("--gateway", each)]
        self.start_envoy("envoy", self.envoy, self._envoy_admin, *gateways)
        for number in range(len(self.engines)):
            self.start_engine(number)

    def start_gateway(self, number: int = 0) -> None:
        """Start a gateway, or start it again. The first is the child `gateway`, the next `gateway-1`."""
        where = ("--listen", self._gateways[number], "--admin-listen", self.admins[number])
        name = f"gateway-{number}" if number else "gateway"
        env = {**PATIENCE, **self._options.gateway_env(number)}
        self._start(name, kvlane("gateway", *where, "--redis-url", self.redis_url), env=env)

    def start_engine(self, number: int) -> None:
        """Start an engine, or start it again on its old port."""
        port = int(self.engines[number].rpartition(":")[2])
        self._start(f"worker-{number}", self._options.engine(port, self.redis_url))

    def start_envoy(self, name: str, listen: str, admin: str, *arguments: str) -> None:
        """Start an Envoy under a name of its own."""
        self._start(name, kvlane("envoy", "--listen", listen, "--admin", admin, *arguments))

    @contextmanager
    def round_robin(self) -> Iterator[str]:
        """Run a second Envoy over the same engines that takes them in turn; yields its URL."""
        listen, admin = free_address(), free_address()
        fixed = [argument for engine in self.engines for argument in ("--worker", engine)]
        policy = ("--no-ext-proc", "--lb-policy", LbPolicy.ROUND_ROBIN)
        self.start_envoy("envoy-round-robin", listen, admin, *policy, *fixed)
        try:
            self.wait_until(lambda: answers(f"http://{admin}/ready"), "Envoy (round robin)")
            yield f"http://{listen}"
        finally:
            self.processes.stop("envoy-round-robin")

    def wait_until_ready(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Return once a request would find every worker; tell `progress` what has become ready.

        Raises:
            ProcessEnded: a part has ended, or the time is up.
        """
        self.wait_until(lambda: all(answers(f"http://{each}/ready") for each in self.admins), "the gateway")
        progress(f"gateway  {self.admin_url}")
        waiting = list(self.engines)

        def engines_answer() -> bool:
            for engine in [each for each in waiting if answers(f"http://{each}/health")]:
                waiting.remove(engine)
                progress(f"worker   http://{engine}")
            return not waiting

        self.wait_until(engines_answer, "the workers")
        self.wait_until(lambda: self.known_workers() == set(self.engines), "Envoy")
        self.wait_until(self._reads_prompts, "the gateway")
        self.wait_until(self._has_checked, "the gateway's check of the workers")
        progress(f"envoy    {self.url}")

    def known_workers(self) -> set[str]:
        """Return the workers that Envoy knows; they have come through Redis and the gateway."""
        try:
            answer = _http().get(f"http://{self._envoy_admin}/clusters?format=json", timeout=2)
        except httpx.TransportError:
            return set()
        for cluster in msgspec.json.decode(answer.content, type=_Clusters).cluster_statuses:
            if cluster.name == WORKERS:
                sockets = [host.address.socket_address for host in cluster.host_statuses]
                return {f"{each.address}:{each.port_value}" for each in sockets}
        return set()

    def _reads_prompts(self) -> bool:
        """Send a prompt through the gateway alone; the first loads the model's tokenizer."""
        try:
            answer = _http().get(f"{self.admin_url}/fleet", timeout=_SLOW_S)
            workers = msgspec.json.decode(answer.content, type=_Fleet).workers
            for model in {name for worker in workers for name in worker.models}:
                prompt = {"model": model, "text": "kvlane"}
                _http().post(f"{self.admin_url}/prefix", json=prompt, timeout=_SLOW_S)
        except httpx.TransportError:
            return False
        return all(worker.models for worker in workers)

    def _has_checked(self) -> bool:
        """Say whether every worker was checked, however that ended."""
        try:
            answer = _http().get(f"{self.admin_url}/fleet", timeout=_SLOW_S)
        except httpx.TransportError:
            return False
        fleet = msgspec.json.decode(answer.content, type=_Fleet)
        return not fleet.parity_probe or all(each.parity.checked_at is not None for each in fleet.workers)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Return once `condition()` holds.

        Raises:
            ProcessEnded: a part has ended, or the time is up.
        """
        deadline = time.monotonic() + self._options.start_timeout_s
        while not condition():
            self.processes.check()
            if time.monotonic() > deadline:
                raise ProcessEnded(f"{what}: not ready after {self._options.start_timeout_s:.0f} s")
            time.sleep(_POLL_S)

    def _start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.pids[name] = self.processes.start(name, command, env)


class _FleetWorker(msgspec.Struct):
    models: list[str]
    parity: Parity


class _Fleet(msgspec.Struct):
    """The gateway's `/fleet`."""

    parity_probe: bool
    workers: list[_FleetWorker]


class _SocketAddress(msgspec.Struct):
    address: str
    port_value: int


class _Address(msgspec.Struct):
    socket_address: _SocketAddress


class _Host(msgspec.Struct):
    address: _Address


class _Cluster(msgspec.Struct):
    name: str
    host_statuses: list[_Host] = []


class _Clusters(msgspec.Struct):
    """Envoy's `/clusters?format=json`. Source: Envoy 1.40 `envoy/admin/v3/clusters.proto`."""

    cluster_statuses: list[_Cluster] = []


@contextmanager
def local_fleet(options: FleetOptions, logs: Path) -> Iterator[LocalFleet]:
    """Start a fleet and end it with the block; `wait_until_ready` is the caller's to call.

    From the main thread. Every part writes a file in `logs`, Redis excepted.

    Raises:
        ConfigError: a part is not installed.
    """
    with embedded_redis() as redis_url, child_processes(logs) as processes:
        fleet = LocalFleet(processes, redis_url, options)
        fleet.start()
        yield fleet


def kvlane(*arguments: str) -> list[str]:
    """Return the command line of `kvlane ...` in this environment."""
    return [sys.executable, "-m", "kvindex.cli", *arguments]


def serve_command(model: str, *vllm_arguments: str) -> EngineCommand:
    """Return what starts real engines: `kvlane serve`."""

    def command(port: int, redis_url: str) -> Sequence[str]:
        where = ("--host", "127.0.0.1", "--port", str(port))
        return kvlane("serve", model, "--redis-url", redis_url, *where, *vllm_arguments)

    return command


def answers(url: str) -> bool:
    """Whether a GET is answered 200 within a moment."""
    try:
        return _http().get(url, timeout=2).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@functools.cache
def _http() -> httpx.Client:
    """One for all that is asked: each reads the system's certificates, which takes a core 20 to 90 ms."""
    return httpx.Client()


def free_address() -> str:
    """Return a `127.0.0.1:port` that nobody listens on."""
    return f"127.0.0.1:{free_ports(1)[0]}"


def free_ports(count: int) -> list[int]:
    """Return `count` different ports of 127.0.0.1 that nobody listens on."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.choice(_PORTS)  # noqa: S311 - so that two fleets that start together differ
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.add(port)
    return list(ports)
