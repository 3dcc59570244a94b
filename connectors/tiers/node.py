"""The tiers of this node: one process keeps LMCache's server running, every engine of the node uses it.

Files tell who does what, by locks that end with their holder, however it ends:

    tiers-PORT.lock    held by the process that keeps the server
    tiers-PORT.json    what it keeps, and whether the server is up
    tiers-PORT.users   shared by the engines that were started with these tiers
    tiers-PORT.log     the server's output
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import httpx
import msgspec
import structlog

from connectors.errors import TiersUnavailable
from connectors.tiers.spec import Bucket, Disk, Tiers
from kvindex.errors import ConfigError, StoreUnavailable
from kvindex.tiers.server import ServerDescription, describe_server

_ANSWER_S = 10.0
_CHECK_S = 0.5
_START_PATIENCE_S = 120.0
_STOP_PATIENCE_S = 15.0
_RESTART_PAUSES_S = (0.5, 1.0, 5.0, 15.0)
_STEADY_S = 60.0
"""A server that ran for this long is restarted at once when it dies."""
_LOCK_TRIES = 10
_PATH_LOCK = ".kvlane.lock"
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # here, since a forked child of a threaded process must not load libraries

_log = structlog.get_logger(__name__)


def has_gpu() -> bool:
    """Whether engines of this node compute on NVIDIA GPUs, whose KV does not go through shared memory."""
    return Path("/dev/nvidiactl").exists()


class NodeFiles:
    """Where the processes of one node find each other, by the server's port."""

    def __init__(self, port: int) -> None:
        folder = Path(tempfile.gettempdir()) / f"kvlane-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise ConfigError(f"{folder} belongs to somebody else: set TMPDIR to a directory of your own")
        self.lock, self.state, self.users, self.log = (
            folder / f"tiers-{port}.{name}" for name in ("lock", "json", "users", "log")
        )

    def read_state(self) -> State | None:
        """Return what is kept now; None if that is nothing, or nobody keeps it any more."""
        if not is_locked(self.lock):
            return None
        try:
            return msgspec.json.decode(self.state.read_bytes(), type=State)
        except (FileNotFoundError, msgspec.DecodeError):
            return None


class State(msgspec.Struct, frozen=True):
    """What a node's keeper says of itself."""

    tiers: dict[str, Any]
    arguments: list[str]
    is_up: bool
    pid: int
    """Of the keeper."""


def describe(tiers: Tiers) -> dict[str, Any]:
    """Return tiers as plain values: two servers of the same are one."""
    described: dict[str, Any] = msgspec.to_builtins(asdict(tiers), enc_hook=str)
    return described


def try_lock(path: Path) -> IO[bytes] | None:
    """Return a file that holds the lock until it is closed, or None if others hold it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock."""
    if not path.exists():
        return False
    if (file := try_lock(path)) is None:
        return True
    file.close()
    return False


def instance_id(tiers: Tiers) -> str:
    """Return the server's name, which outlives it."""
    return f"{socket.gethostname()}-{tiers.port}"


def server_command(tiers: Tiers, coordinator_url: str | None, arguments: Sequence[str]) -> list[str]:
    """Return the command of LMCache's server; what stands in `arguments` wins."""
    gib = str(tiers.cpu_bytes / (1 << 30))
    command = [
        *(sys.executable, "-m", "connectors.tiers.lmcache_server", "server"),
        *("--instance-id", instance_id(tiers)),
        *("--host", "127.0.0.1", "--port", str(tiers.port)),
        *("--http-host", "127.0.0.1", "--http-port", str(tiers.port + 1)),
        *("--chunk-size", str(tiers.chunk_size)),
        # The default has no handler for engines on CPUs, which then hang at their start.
        *("--supported-transfer-mode", "auto"),
        *("--l1-size-gb", gib, "--no-l1-use-lazy", "--eviction-policy", "LRU"),
    ]
    if not has_gpu():
        command += ["--shm-name", f"kvlane-{tiers.port}"]
    for adapter in (_disk_adapter(tiers.disk), _bucket_adapter(tiers.s3)):
        if adapter is not None:
            command += ["--l2-adapter", msgspec.json.encode(adapter).decode()]
    if coordinator_url is not None:
        command += ["--coordinator-url", coordinator_url, "--coordinator-advertise-ip", "127.0.0.1"]
        command += ["--coordinator-event-reporting", "--coordinator-event-flush-interval", "0.2"]
    return [*command, *arguments]


def _disk_adapter(disk: Disk | None) -> dict[str, Any] | None:
    if disk is None:
        return None
    return {
        "type": "kvlane_disk",
        "base_path": str(disk.path),
        "max_bytes": disk.max_bytes,
        **_eviction(disk.max_bytes),
    }


def _bucket_adapter(bucket: Bucket | None) -> dict[str, Any] | None:
    if bucket is None:
        return None
    return {
        "type": "kvlane_s3",
        "location": asdict(bucket.location),
        "shared": True,
        "max_bytes": bucket.max_bytes,
        **_eviction(bucket.max_bytes),
    }


def _eviction(max_bytes: int) -> dict[str, Any]:
    policy = {"eviction_policy": "LRU", "trigger_watermark": 0.95, "eviction_ratio": 0.1}
    return {"eviction": policy} if max_bytes else {}


class TierKeeper:
    """Keeps the server of a node's tiers running, until `stop` is set or nobody uses it any more.

    Args:
        tiers: checked before (`connectors.tiers.checks`).
        arguments: more arguments of LMCache's server.
        coordinator_url: whom the server tells of what it holds.
        linger_s: how long the server outlives its last engine; None: it waits for the next one for ever.

    Raises:
        ConfigError: another process keeps tiers at this port, or in this directory.
    """

    def __init__(
        self, tiers: Tiers, arguments: Sequence[str], coordinator_url: str | None, linger_s: float | None
    ) -> None:
        self._tiers = tiers
        self._arguments = list(arguments)
        self._command = server_command(tiers, coordinator_url, arguments)
        self._linger_s = linger_s
        self._files = NodeFiles(tiers.port)
        self._locks = ExitStack()
        self._hold(
            self._files.lock, f"another process keeps tiers at port {tiers.port}: set port= to another"
        )
        if tiers.disk is not None:
            path = tiers.disk.path
            self._hold(
                path / _PATH_LOCK, f"another server keeps its chunks in {path}: each needs a directory"
            )
            for scratch in path.glob("*.tmp"):  # of a server that was killed
                scratch.unlink(missing_ok=True)

    def _hold(self, path: Path, refusal: str) -> None:
        for _ in range(_LOCK_TRIES):  # others hold it for a moment to see whether it is held
            if (file := try_lock(path)) is not None:
                self._locks.enter_context(file)
                return
            time.sleep(0.05)
        self._locks.close()
        raise ConfigError(f"--tiers: {refusal}")

    def run(self, stop: threading.Event) -> None:
        """Keep the server, on this thread, until it is time to stop.

        Raises:
            TiersUnavailable: the server did not come up at the first try.
        """
        num_deaths = 0
        with self._locks, self._files.log.open("ab") as log:
            try:
                while not stop.is_set():
                    started_s = time.monotonic()
                    with _running(self._command, log) as server:
                        if self._wait_until_up(server, stop):
                            self._say(is_up=True)
                            self._watch(server, stop)
                        elif num_deaths == 0 and not stop.is_set():
                            raise TiersUnavailable(
                                f"LMCache's server did not start: {_last_line(self._files.log)}; "
                                f"see {self._files.log}"
                            )
                        self._say(is_up=False)
                    if stop.is_set():
                        break
                    num_deaths = 1 if time.monotonic() - started_s > _STEADY_S else num_deaths + 1
                    pause_s = _RESTART_PAUSES_S[min(num_deaths, len(_RESTART_PAUSES_S)) - 1]
                    _log.error("tier_server_died", status=server.returncode, restarted_after_s=pause_s)
                    stop.wait(pause_s)
            finally:
                self._files.state.unlink(missing_ok=True)
                Path(f"/dev/shm/lmcache_l1_pool_kvlane-{self._tiers.port}").unlink(missing_ok=True)  # noqa: S108

    def _say(self, *, is_up: bool) -> None:
        state = State(describe(self._tiers), self._arguments, is_up, os.getpid())
        scratch = self._files.state.with_suffix(".new")
        scratch.write_bytes(msgspec.json.encode(state))
        scratch.replace(self._files.state)

    def _wait_until_up(self, server: subprocess.Popen[bytes], stop: threading.Event) -> bool:
        self._say(is_up=False)
        deadline_s = time.monotonic() + _START_PATIENCE_S
        url = f"{self._tiers.api}/healthcheck"
        with httpx.Client(timeout=1) as client:
            while time.monotonic() < deadline_s and server.poll() is None and not stop.is_set():
                with suppress(httpx.HTTPError):
                    if client.get(url).status_code == 200:
                        return True
                stop.wait(0.1)
        return False

    def _watch(self, server: subprocess.Popen[bytes], stop: threading.Event) -> None:
        unused_since_s = time.monotonic()
        while server.poll() is None and not stop.wait(_CHECK_S):
            if self._linger_s is None or is_locked(self._files.users):
                unused_since_s = time.monotonic()
            elif time.monotonic() - unused_since_s > self._linger_s:
                _log.info("tier_server_unused", for_s=self._linger_s)
                stop.set()


@contextmanager
def _running(command: Sequence[str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends, or this process does."""
    # LMCache reports its use to its makers unless it is told not to.
    environment = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1", **os.environ}
    server = subprocess.Popen(  # noqa: S603 - our own command
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=_end_with_parent,  # noqa: PLW1509 - the main thread starts it
    )
    try:
        yield server
    finally:
        server.terminate()
        try:
            server.wait(_STOP_PATIENCE_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return next(
        (line for line in reversed(lines) if "error" in line.lower()),
        lines[-1] if lines else "nothing is said",
    )


def describe_api(api: str) -> ServerDescription:
    """Return what a server is made of.

    Args:
        api: URL of its HTTP API.

    Raises:
        TiersUnavailable: it does not say.
        ConfigError: its chunks cannot be indexed.
    """
    with httpx.Client(timeout=_ANSWER_S) as client:
        try:
            return describe_server(client, api)
        except StoreUnavailable as error:
            raise TiersUnavailable(str(error)) from error


def join_or_start(
    tiers: Tiers, spec: str, arguments: Sequence[str], patience_s: float = _START_PATIENCE_S
) -> None:
    """Have the node's tiers kept, by a process that is there or a new one, and wait until they are up.

    They are in use, and so are not ended, until this process ends and whatever it execs.

    Raises:
        ConfigError: the node keeps other tiers at this port.
        TiersUnavailable: the server did not come up.
    """
    files = NodeFiles(tiers.port)
    users = os.open(files.users, os.O_CREAT | os.O_RDWR, 0o600)
    os.set_inheritable(users, True)
    fcntl.flock(users, fcntl.LOCK_SH)
    keeper: subprocess.Popen[bytes] | None = None
    deadline_s = time.monotonic() + patience_s
    while time.monotonic() < deadline_s:
        state = files.read_state()
        if state is not None:
            if (state.tiers, state.arguments) != (describe(tiers), list(arguments)):
                raise ConfigError(
                    f"--tiers: this node keeps other tiers at port {tiers.port}: {_short(state)}; "
                    "write the same, or set port= to another"
                )
            if state.is_up:
                return
        if keeper is None and not is_locked(files.lock):
            keeper = _start_keeper(spec, arguments, files)
        elif keeper is not None and keeper.poll() is not None and not is_locked(files.lock):
            raise TiersUnavailable(f"the tiers did not start: {_last_line(files.log)}; see {files.log}")
        time.sleep(0.1)
    raise TiersUnavailable(f"the tiers were not up after {patience_s:.0f} s; see {files.log}")


def _start_keeper(spec: str, arguments: Sequence[str], files: NodeFiles) -> subprocess.Popen[bytes]:
    program = shutil.which("kvlane", path=str(Path(sys.executable).parent)) or "kvlane"
    with files.log.open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own command
            [program, "tier", "serve", spec, "--linger", "60", "--", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _short(state: State) -> str:
    return msgspec.json.encode(state.tiers).decode()
