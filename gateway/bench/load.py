"""The bench's client: blocking, keep-alive, and the same for all that is compared."""

from __future__ import annotations

import http.client
import os
import random
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from gateway.errors import BenchFailed

CHAT_PATH = "/v1/chat/completions"
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One answered request."""

    took_ms: float
    headers: http.client.HTTPMessage


class Client:
    """One keep-alive connection to an address, for one thread; opened by the first request."""

    def __init__(self, address: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def post(self, body: bytes) -> Sample:
        """Send a chat request and read its answer.

        Raises:
            BenchFailed: the answer is not 200.
        """
        begin = time.perf_counter()
        self._connection.request("POST", CHAT_PATH, body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        content = answer.read()
        took_ms = (time.perf_counter() - begin) * 1000
        if answer.status != HTTPStatus.OK:
            raise BenchFailed(f"answer {answer.status}: {content[:200].decode(errors='replace')}")
        return Sample(took_ms, answer.headers)


def interleave(
    bodies: Iterable[bytes], addresses: Mapping[str, str], draw: random.Random
) -> dict[str, list[Sample]]:
    """Send each body to every address, one at a time, and return the samples by name.

    The order is drawn anew for each body, so that what else the machine does falls on all alike. The
    first body only opens the connections.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in addresses}
    with ExitStack() as stack:
        clients = {name: stack.enter_context(closing(Client(address))) for name, address in addresses.items()}
        for body in bodies:
            for name in draw.sample(list(clients), len(clients)):
                samples[name].append(clients[name].post(body))
    return {name: timed for name, (_, *timed) in samples.items()}


def saturate(address: str, bodies: list[bytes], *, num_clients: int, duration_s: float) -> int:
    """Send as many requests as `num_clients` connections can in `duration_s`; return how many.

    Each body is sent once, before any is sent again.
    """
    counts = [0] * num_clients
    failures: list[Exception] = []
    end = time.monotonic() + duration_s

    def run(number: int) -> None:
        try:
            with closing(Client(address)) as client:
                while time.monotonic() < end:
                    client.post(bodies[(number + counts[number] * num_clients) % len(bodies)])
                    counts[number] += 1
        except (OSError, http.client.HTTPException, BenchFailed) as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise BenchFailed(f"{len(failures)} of {num_clients} connections failed: {failures[0]}")
    return sum(counts)


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU seconds that processes have used so far, all threads, user and system."""
    stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")
