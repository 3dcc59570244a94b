"""Have prompts computed, so that the tiers have them before anybody asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from kvindex.errors import ConfigError

_PATHS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Warming:
    """A request whose answer does not matter."""

    line: int
    path: str
    body: dict[str, Any]


@dataclass(slots=True)
class Outcome:
    """What became of the requests."""

    num_done: int = 0
    num_tokens: int = 0
    """Prompt tokens of those that were answered."""
    num_cached_tokens: int = 0
    """Those of them that the engine says it had, with `--enable-prompt-tokens-details`; 0 without."""
    failures: list[str] = field(default_factory=list)
    """A line for each request that was not answered."""


def read_prompts(file: Path) -> list[Warming]:
    """Read requests, one JSON body of `/v1/chat/completions` or `/v1/completions` a line.

    Raises:
        ConfigError: the file cannot be read, or a line is no such body; the message names it.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    found = list(_requests(file, lines))
    if not found:
        raise ConfigError(f"{file} has no prompts: one JSON body a line is wanted")
    return found


def _requests(file: Path, lines: list[str]) -> Iterator[Warming]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}, line {number}: not JSON: {error}") from error
        path = next((_PATHS[key] for key in _PATHS if isinstance(body, dict) and key in body), None)
        if path is None:
            raise ConfigError(f"{file}, line {number}: neither `messages` nor `prompt` is in it")
        answer = {"max_tokens": 1, "stream": False}
        yield Warming(number, path, {**body, **answer})


async def warm(
    requests: list[Warming],
    url: str,
    *,
    concurrency: int,
    api_key: str | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> Outcome:
    """Send the requests to a gateway or an engine, so many at a time, and count.

    Args:
        url: without a path.
        on_done: called after each.
    """
    outcome = Outcome()
    turn = asyncio.Semaphore(concurrency)
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, headers=headers) as client:

        async def send(request: Warming) -> None:
            async with turn:
                try:
                    answer = await client.post(request.path, json=request.body)
                except httpx.HTTPError as error:
                    outcome.failures.append(f"line {request.line}: {error or type(error).__name__}")
                else:
                    _count(outcome, request, answer)
            on_done()

        await asyncio.gather(*map(send, requests))
    return outcome


def _count(outcome: Outcome, request: Warming, answer: httpx.Response) -> None:
    if answer.is_error:
        outcome.failures.append(f"line {request.line}: {answer.status_code}: {answer.text[:200]}")
        return
    usage = answer.json().get("usage") or {}
    outcome.num_done += 1
    outcome.num_tokens += usage.get("prompt_tokens") or 0
    outcome.num_cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
