"""Real LMCache servers for tests."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from connectors.bench.ports import free_ports

START_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class LmcacheServer:
    """A running `lmcache server`; `process` leads the process group of everything it started."""

    instance_id: str
    port: int
    http_port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def kill(self) -> None:
        """End it at once, as a crash would."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def start_lmcache(
    instance_id: str, coordinator_url: str, *adapters: dict[str, Any], log: Path
) -> Iterator[LmcacheServer]:
    """Run a server that reports to `coordinator_url` until the block ends; ready when entered.

    Args:
        adapters: its second level, as `--l2-adapter` takes them.
        log: where the output goes.

    Raises:
        RuntimeError: it ended or was not healthy in time.
    """
    port, http_port = free_ports(2)
    command = [str(Path(sys.executable).parent / "lmcache"), "server", "--instance-id", instance_id]
    command += ["--host", "127.0.0.1", "--port", str(port), "--http-host", "127.0.0.1"]
    command += ["--http-port", str(http_port), "--chunk-size", "256", "--supported-transfer-mode", "auto"]
    command += ["--shm-name", f"kvlane-test-{secrets.token_hex(4)}", "--eviction-policy", "LRU"]
    command += ["--l1-size-gb", "1", "--l1-init-size-gb", "1", "--coordinator-url", coordinator_url]
    command += ["--coordinator-advertise-ip", "127.0.0.1", "--coordinator-event-reporting"]
    command += ["--coordinator-event-flush-interval", "0.2", "--coordinator-heartbeat-interval", "0.5"]
    command += [part for adapter in adapters for part in ("--l2-adapter", json.dumps(adapter))]
    environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    server = LmcacheServer(instance_id, port, http_port, process)
    try:
        _wait(server, log)
        yield server
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
    finally:
        server.kill()


def _wait(server: LmcacheServer, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/healthcheck").status_code == 200:
                return
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"lmcache server did not start: {log.read_text()[-3000:]}")
        time.sleep(0.1)
