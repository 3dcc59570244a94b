"""Plays conversations against an OpenAI API and takes the time to the first token."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import msgspec

from deploy.demo.conversations import Conversation

ANSWER_TOKENS = 48
_PREFIX = "data: "
_END = "[DONE]"


@dataclass
class Played:
    """What the clients saw."""

    ttft_ms: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Chunk(msgspec.Struct):
    """One event of a streamed chat completion."""

    choices: list[_Choice]


async def play(
    url: str,
    model: str,
    conversations: Sequence[Conversation],
    *,
    concurrency: int,
    seed: int,
    progress: Callable[[], None],
) -> Played:
    """Play all conversations; `progress` is called after each turn.

    People take turns: everybody's first question comes before anybody's second, in a random order, with
    `concurrency` requests in flight. So a conversation's next turn arrives when many others have been
    served in between, as it does in production.
    """
    chance = random.Random(seed)  # noqa: S311 - the same order at every run is the point
    played = Played()
    histories = [[{"role": "system", "content": each.system}] for each in conversations]
    limit = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def turn(number: int, question: str) -> None:
            async with limit:
                histories[number].append({"role": "user", "content": question})
                answer = await _ask(client, model, histories[number], played)
                histories[number].append({"role": "assistant", "content": answer})
                progress()

        for position in range(max(len(each.questions) for each in conversations)):
            order = [
                (number, each.questions[position])
                for number, each in enumerate(conversations)
                if position < len(each.questions)
            ]
            chance.shuffle(order)
            await asyncio.gather(*(turn(*each) for each in order))
    return played


async def _ask(client: httpx.AsyncClient, model: str, messages: list[dict[str, str]], played: Played) -> str:
    """Return the answer, empty after an error."""
    body = {"model": model, "messages": messages, "stream": True}
    body |= {"max_tokens": ANSWER_TOKENS, "temperature": 0}
    answer = ""
    started = time.perf_counter()
    ttft_s = None
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                await response.aread()
                played.errors.append(f"{response.status_code}: {response.text}")
                return ""
            async for line in response.aiter_lines():
                event = line.removeprefix(_PREFIX)
                if event in (line, _END):
                    continue
                ttft_s = ttft_s or time.perf_counter() - started
                for choice in msgspec.json.decode(event, type=_Chunk).choices:
                    answer += choice.delta.content or ""
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        played.errors.append(repr(error))
        return answer
    if ttft_s is None:
        played.errors.append("a stream without an event")
        return ""
    played.ttft_ms.append(1000 * ttft_s)
    return answer
