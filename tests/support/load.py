"""Clients that keep a fleet busy while something happens to it, and what became of their requests."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx


@dataclass
class Load:
    """Requests sent so far. An answer that broke off or never came has status 0."""

    answers: list[httpx.Response | None] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def statuses(self) -> Counter[int]:
        return Counter(each.status_code if each else 0 for each in list(self.answers))

    @property
    def fallbacks(self) -> Counter[str]:
        found = (each.headers.get("x-kvlane-fallback", "") for each in list(self.answers) if each)
        return Counter(found)

    def since(self, num_answers: int) -> Load:
        """Return the load without its first answers."""
        return Load(self.answers[num_answers:], self.failures)

    def errors(self) -> list[str]:
        """Return what clients saw that was no answer of 200."""
        bad = [
            f"{each.status_code} {each.text[:200]}"
            for each in list(self.answers)
            if each and each.status_code != 200
        ]
        return bad + list(self.failures)


def completion(number: int) -> dict[str, object]:
    """Return a request with a prompt that one in eight others shares."""
    return {"model": "tiny", "prompt": list(range(100 + number % 8, 300 + number % 8)), "max_tokens": 2}


@contextmanager
def load(
    url: str,
    *,
    num_clients: int = 6,
    body: Callable[[int], dict[str, object]] = completion,
    timeout_s: float = 30,
) -> Iterator[Load]:
    """Send requests to `url` inside the block, each client one after the other."""
    done = threading.Event()
    sent = Load()
    numbers = itertools.count()

    def run() -> None:
        with httpx.Client(base_url=url, timeout=timeout_s) as client:
            while not done.is_set():
                try:
                    sent.answers.append(client.post("/v1/completions", json=body(next(numbers))))
                except httpx.TransportError as error:
                    sent.answers.append(None)
                    sent.failures.append(repr(error))
                time.sleep(0.005)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield sent
    finally:
        done.set()
        for thread in threads:
            thread.join()
