"""Real Redis servers, Sentinels and clusters on loopback, to be killed, paused and failed over."""

from __future__ import annotations

import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from connectors.bench.ports import free_ports
from kvindex import embedded
from kvindex.embedded import redis_server_binary

SERVICE = "kvlane"
NUM_SLOTS = 16384
_PATIENCE_S = 30.0
_BUS_OFFSET = 10_000  # of a node's cluster port; Redis 6.2 knows no other
_EMPTY = ("--save", "", "--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for a condition that may raise while servers are starting or failing over."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            if condition():
                return
            problem = "it is false"
        except redis.RedisError as error:
            problem = str(error)
        assert time.monotonic() < deadline, f"the condition did not hold within {_PATIENCE_S} s: {problem}"
        time.sleep(0.02)


class RedisProcess:
    """One server, on a port that stays its own through any number of lives."""

    def __init__(self, *options: str, port: int | None = None, binary: Path | None = None) -> None:
        self.port = port or free_ports(1)[0]
        self._folder = tempfile.TemporaryDirectory(prefix="kvlane-test-redis-")
        self.folder = Path(self._folder.name)
        self.binary = binary
        self._command = [str(binary or redis_server_binary()), *options, "--port", str(self.port)]
        self._command += ["--bind", "127.0.0.1", "--dir", str(self.folder), "--logfile", "redis.log"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, decode_responses=True, socket_timeout=_PATIENCE_S)

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, preexec_fn=embedded._die_with_parent)  # noqa: PLW1509

    def wait_until_ready(self) -> None:
        with self.client() as client:
            wait_until(client.ping)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> RedisProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()


@contextmanager
def server(*options: str, binary: Path | None = None) -> Iterator[RedisProcess]:
    """Run a server that keeps nothing on disk."""
    with RedisProcess(*_EMPTY, *options, binary=binary) as made:
        made.wait_until_ready()
        yield made


@dataclass
class Sentinels:
    """A master and its replica under three Sentinels."""

    master: RedisProcess
    replica: RedisProcess
    url: str
    ports: list[int]

    def fail_over(self) -> None:
        """Have the Sentinels swap the two, both alive."""
        with redis.Redis(port=self.ports[0], decode_responses=True) as client:
            client.execute_command("SENTINEL", "FAILOVER", SERVICE)

    def cut_replication(self) -> None:
        """Let the replica lose every write from now on, and still be fit to be promoted."""
        with self.replica.client() as replica, self.master.client() as master:
            replica.config_set("masteruser", "nobody")
            replica.config_set("masterauth", "wrong")
            master.client_kill_filter(_type="slave")  # its name in every redis-py
            wait_until(lambda: master.info("replication")["connected_slaves"] == 0)

    def wait_until_replicated(self) -> None:
        """Return when the replica has everything that was written so far."""
        with self.master.client() as client:
            # The first write marks the offset to wait for.
            wait_until(lambda: client.set("synced", 1) and client.wait(1, 1000) == 1)


@contextmanager
def sentinels(binary: Path | None = None) -> Iterator[Sentinels]:
    """Run a master, a replica and three Sentinels, which take a second to notice a death."""
    with ExitStack() as stack:
        master = stack.enter_context(server(binary=binary))
        behind = ("--replicaof", "127.0.0.1", str(master.port))
        replica = stack.enter_context(server(*behind, binary=binary))
        with replica.client() as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up")
        ports = free_ports(3)
        for port in ports:
            stack.enter_context(sentinel(port, master.port, binary=binary))
        for port in ports:
            with redis.Redis(port=port, decode_responses=True) as client:
                wait_until(lambda client=client: _knows_all(client))
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        yield Sentinels(master, replica, f"redis+sentinel://{hosts}/{SERVICE}", ports)


def _knows_all(client: redis.Redis) -> bool:
    known = client.info("sentinel")["master0"]
    return (known["slaves"], known["sentinels"]) == (1, 3)


@contextmanager
def sentinel(port: int, master: int, *more: str, binary: Path | None = None) -> Iterator[None]:
    """Run one of the Sentinels of the master on port `master`."""
    with tempfile.TemporaryDirectory(prefix="kvlane-test-sentinel-") as folder:
        config = Path(folder) / "sentinel.conf"
        settings = {"down-after-milliseconds": 1000, "failover-timeout": 5000, "parallel-syncs": 1}
        lines = [f"port {port}", "bind 127.0.0.1", f"dir {folder}", "logfile sentinel.log"]
        lines += [f"sentinel monitor {SERVICE} 127.0.0.1 {master} 2"]
        lines += [f"sentinel {name} {SERVICE} {value}" for name, value in settings.items()]
        config.write_text("\n".join([*lines, *more]))
        command = [str(binary or redis_server_binary()), str(config), "--sentinel"]
        process = subprocess.Popen(command, preexec_fn=embedded._die_with_parent)  # noqa: PLW1509
        try:
            yield
        finally:
            process.kill()
            process.wait()


class Cluster:
    """Three masters, and a replica for one of them if asked for."""

    def __init__(self, masters: Sequence[RedisProcess]) -> None:
        self.masters = masters
        self.replica: RedisProcess | None = None
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in masters)

    def owner_of(self, key: str) -> RedisProcess:
        """Return the master of a key."""
        slot = redis.cluster.key_slot(key.encode())
        return self.masters[min(slot * len(self.masters) // NUM_SLOTS, len(self.masters) - 1)]

    def deny_all(self, node: RedisProcess) -> Callable[[], None]:
        """Have `node` refuse every command, since it knows of no owner of some slot; return the cure."""
        slot = -(-NUM_SLOTS * self.masters.index(node) // len(self.masters))

        def command(name: str) -> None:
            with node.client() as client:
                client.execute_command("CLUSTER", name, slot)

        command("DELSLOTS")
        return lambda: command("ADDSLOTS")

    def move_pool(self, directory: str, source: RedisProcess, target: RedisProcess) -> Iterator[None]:
        """Move a pool as an operator would move its slot, key by key; yield after every few.

        The buckets are last, so that whatever is written meanwhile is overwritten by what was there before.
        """
        slot = redis.cluster.key_slot(directory.encode())
        with redis.Redis(port=source.port) as ours, redis.Redis(port=target.port) as theirs:
            our_id, their_id = (each.execute_command("CLUSTER MYID") for each in (ours, theirs))
            theirs.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", our_id)
            ours.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", their_id)
            to_target = ("127.0.0.1", target.port, "", 0, 5000, "REPLACE", "KEYS")
            while keys := ours.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10_000):
                others = [key for key in keys if b":b:" not in key]
                ours.execute_command("MIGRATE", *to_target, *(others or keys[:10]))
                yield
            for client in (theirs, ours):
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", their_id)


@contextmanager
def cluster(*, replicated: str | None = None, binary: Path | None = None) -> Iterator[Cluster]:
    """Run a cluster whose slots are in three equal parts; the owner of key `replicated` has a replica."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", *_EMPTY)
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(RedisProcess(*options, port=port, binary=binary))
            for port in cluster_ports(3 if replicated is None else 4)
        ]
        for node in nodes:
            node.wait_until_ready()
        made = Cluster(nodes[:3])
        clients = [stack.enter_context(node.client()) for node in nodes]
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < 3:
                slots = range(-(-NUM_SLOTS * number // 3), -(-NUM_SLOTS * (number + 1) // 3))
                client.execute_command("CLUSTER", "ADDSLOTS", *slots)
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[number].port)
        for client in clients:
            wait_until(lambda client=client: _sees(client, len(nodes)))
        if replicated is not None:
            made.replica = nodes[3]
            owner = clients[nodes.index(made.owner_of(replicated))].execute_command("CLUSTER MYID")
            clients[3].execute_command("CLUSTER", "REPLICATE", owner)
            wait_until(lambda: clients[3].info("replication")["master_link_status"] == "up")
        yield made


def _sees(client: redis.Redis, num_nodes: int) -> bool:
    info = client.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == num_nodes


def cluster_ports(count: int) -> list[int]:
    """Return free ports that have a free port for the cluster's bus beside them."""
    ports: list[int] = []
    while len(ports) < count:
        (port,) = free_ports(1)
        if port < 65536 - _BUS_OFFSET and port not in ports and _is_free(port + _BUS_OFFSET):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
