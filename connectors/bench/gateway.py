"""A real gateway beside a bench's engine, to say what it would expect. It sends nothing but its check."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from connectors.bench.ports import free_ports
from connectors.errors import BenchFailed

_PATIENCE_S = 120.0
_ASK_AGAIN_S = 0.02


class Gateway:
    """The admin API of a gateway, of a fleet of one engine.

    Args:
        model: the engine's.
    """

    def __init__(self, client: httpx.Client, model: str) -> None:
        self._client = client
        self._model = model

    def is_ready(self) -> bool:
        """Whether it knows the engine, and has checked it."""
        try:
            workers = self._get("/fleet")["workers"]
        except httpx.TransportError:
            return False
        return [each["parity"]["state"] for each in workers] == ["exact"]

    def has_measured(self) -> bool:
        """Whether all that its predictions go by was measured."""
        rates = self._get("/rates")
        sources = [each["source"] for each in rates["workers"]]
        return sources == ["worker"] and {each["source"] for each in rates["loads"]} == {"measured"}

    def predict(self, prompt: list[int], held: dict[str, int]) -> float:
        """Return the time to first token, in ms, that is expected of loading all that is held.

        Args:
            held: tokens of the prompt by tier, once the index has followed.
        """
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            answer = self._client.post("/prefix", json={"model": self._model, "text": prompt})
            workers = answer.raise_for_status().json()["workers"]
            # A moment after its cache was cleared the engine has no slot.
            known = [each["tier_tokens"] for each in workers]
            if known == [{"device": 0, **held}]:
                break
            if time.monotonic() > deadline_s:
                raise BenchFailed(f"the index knows of {known} and not of {held}")
            time.sleep(_ASK_AGAIN_S)
        [worker] = workers
        predicted: float = worker["cuts"][-1]["ttft_ms"] if worker["cuts"] else worker["predicted_ttft_ms"]
        return predicted

    def _get(self, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = self._client.get(path).raise_for_status().json()
        return answer


@contextmanager
def predicting(redis_url: str, model: str, log: Path) -> Iterator[Gateway]:
    """Run a gateway until the block ends; it knows the one engine of the index when entered.

    Raises:
        BenchFailed: it does not come to know the engine.
    """
    grpc_port, admin_port = free_ports(2)
    command = [str(Path(sys.executable).with_name("kvlane")), "gateway", "--redis-url", redis_url]
    command += ["--listen", f"127.0.0.1:{grpc_port}", "--admin-listen", f"127.0.0.1:{admin_port}"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603 - our own
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{admin_port}", timeout=_PATIENCE_S) as client:
            gateway = Gateway(client, model)
            deadline_s = time.monotonic() + _PATIENCE_S
            while not gateway.is_ready():
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise BenchFailed(f"a gateway does not find the engine: {log.read_text()[-1000:]}")
                time.sleep(0.2)
            yield gateway
    finally:
        process.terminate()
        process.wait()
