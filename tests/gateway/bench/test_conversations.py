"""The bench's requests: realistic in shape, right in size, reproducible, and never the same twice."""

import itertools
import json
import random

import pytest

from gateway.bench.conversations import chat_body, conversation, next_turn


@pytest.mark.parametrize("num_bytes", [2_000, 32_000, 400_000])
def test_size_and_shape(num_bytes):
    messages = conversation(num_bytes, random.Random(1))
    body = chat_body("tiny", messages)
    assert 0.9 * num_bytes < len(body) <= num_bytes
    assert json.loads(body)["model"] == "tiny"
    roles = [message["role"] for message in messages]
    assert roles[:2] == ["system", "user"]
    assert roles[-1] == "user"
    assert all(first != second for first, second in itertools.pairwise(roles))


def test_reproducible_and_distinct_from_the_first_block_on():
    assert conversation(2_000, random.Random(1)) == conversation(2_000, random.Random(1))
    draw = random.Random(1)
    begins = {conversation(2_000, draw)[0]["content"][:32] for _ in range(100)}
    assert len(begins) == 100


def test_next_turn_extends_and_leaves_the_conversation_alone():
    draw = random.Random(1)
    messages = conversation(2_000, draw)
    before = list(messages)
    longer = next_turn(messages, draw)
    assert longer[: len(before)] == before == messages
    assert [message["role"] for message in longer[len(before) :]] == ["assistant", "user"]
