"""Chat conversations of a given size, in English prose and code: the text of Python's own help topics."""

from __future__ import annotations

import functools
import random
from typing import TypedDict

import msgspec


class Message(TypedDict):
    """One chat message."""

    role: str
    content: str


@functools.cache
def _paragraphs() -> list[str]:
    from pydoc_data.topics import topics

    return [paragraph for text in topics.values() for paragraph in text.split("\n\n") if paragraph.strip()]


def _text(num_bytes: int, draw: random.Random) -> str:
    text = ""
    while len(text) < num_bytes:
        text += draw.choice(_paragraphs()) + "\n\n"
    return text[:num_bytes]


def conversation(num_bytes: int, draw: random.Random) -> list[Message]:
    """Return a system prompt and turns of user and assistant, nearly `num_bytes` as JSON, user last.

    No two conversations of one `draw` begin alike.
    """
    content_bytes = int((num_bytes - 200) * 0.93)  # the rest is JSON: keys, and escapes of line ends
    num_turns = max(1, content_bytes // 4_000)
    share = content_bytes // (2 * num_turns)
    messages = [Message(role="system", content=f"Session {draw.getrandbits(64):x}. {_text(share, draw)}")]
    for turn in range(num_turns):
        if turn:
            messages.append(Message(role="assistant", content=_text(share, draw)))
        messages.append(Message(role="user", content=_text(share, draw)))
    return messages


def next_turn(messages: list[Message], draw: random.Random) -> list[Message]:
    """Return the conversation after an answer and the next question, about 500 bytes each."""
    answer = Message(role="assistant", content=_text(500, draw))
    return [*messages, answer, Message(role="user", content=_text(500, draw))]


def chat_body(model: str, messages: list[Message]) -> bytes:
    """Return the JSON body of a chat request."""
    return msgspec.json.encode({"model": model, "messages": messages, "temperature": 0, "max_tokens": 16})
