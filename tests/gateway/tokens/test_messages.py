"""Messages become what chat templates read."""

from __future__ import annotations

import json

import pytest

from gateway.tokens.bodies import Message
from gateway.tokens.messages import (
    BILLING_HEADER,
    conversation,
    has_billing_header,
    has_media,
    without_developer,
)

IMAGE = {"type": "image_url", "image_url": {"url": "http://host/cat.png"}, "mine": 1}


def text(text: str, **extra: object) -> dict[str, object]:
    return {"type": "text", "text": text, **extra}


def content(given, *, structured: bool, role: str = "user", stand_in: str | None = None):
    (message,) = conversation([Message(role, given)], structured=structured, stand_in=stand_in)
    return message["content"]


@pytest.mark.parametrize(
    ("given", "joined", "parts"),
    [
        ("a", "a", [text("a")]),
        (None, "", []),
        ("", "", [text("")]),
        ([], "", []),
        ([text("a"), text("b")], "a\nb", [text("a"), text("b")]),
        ([text("a"), text("")], "a", [text("a"), text("")]),
        (["a", "b"], "a\nb", [text("a"), text("b")]),
        ([text("a", cache_control=1)], "a", [text("a", cache_control=1)]),
        ([{"type": "refusal", "refusal": "no"}], "no", [text("no")]),
        ([{"type": "thinking", "thinking": "hm", "closed": True}], "hm", [text("hm")]),
        ([{"type": "text"}], "", []),
        ([{"type": "tool_reference", "name": "f"}], "f", [{"type": "tool_reference", "name": "f"}]),
    ],
)
def test_content(given, joined, parts):
    assert content(given, structured=False) == joined
    assert content(given, structured=True) == parts


def test_results_of_tools_are_joined_in_either_form():
    parts = [text("a"), text("b")]
    assert content(parts, role="tool", structured=True) == "a\nb"
    kept = [{"type": "tool_reference", "name": "f"}]
    assert content(kept, role="tool", structured=True) == kept


def test_media_is_named_or_stood_in_for():
    given = [text("what is"), IMAGE]
    assert has_media([Message("user", given)])
    assert not has_media([Message("user", [text("a"), "b"])])
    assert content(given, structured=True) == [text("what is"), {"type": "image", "mine": 1}]
    assert content(given, structured=True, stand_in="0") == [text("what is"), text("0")]
    assert content(given, structured=False) == "what is"
    assert content(given, structured=False, stand_in="0") == "0what is"
    assert content([{"image_url": "u"}], structured=True) == [{"type": "image"}]
    assert content([{"type": ["odd"]}], structured=True) == [{"type": "unknown"}]


def test_the_line_that_changes_with_every_request_is_dropped():
    system = f"{BILLING_HEADER}: cch=1234;\nbe kind"
    assert content(system, role="system", structured=False) == "be kind"
    assert content(system, role="user", structured=False) == system
    assert content([text(f"{BILLING_HEADER}: 1"), text("a")], role="system", structured=True) == [text("a")]
    assert has_billing_header([Message("system", system)])
    assert not has_billing_header([Message("user", system)])


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ('{"b": 1, "a": 2}', {"b": 1, "a": 2}),
        ("", {}),
        ("[1]", {}),
        ("broken", {}),
        ({"a": 1}, {"a": 1}),
        (None, {}),
    ],
)
def test_arguments_of_tool_calls_are_objects(arguments, parsed):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}, "id": "1", "index": 0}
    (message,) = conversation([Message("assistant", tool_calls=[call])], structured=False)
    expected = {"id": "1", "function": {"arguments": parsed, "name": "f"}, "type": "function", "index": 0}
    assert json.dumps(message["tool_calls"]) == json.dumps([expected])


def test_only_the_fields_of_the_role_are_kept():
    call = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        Message("user", "a", name="bob", tool_calls=call, tool_call_id="1", reasoning="r"),
        Message("assistant", "b", reasoning_content="r", tool_calls=[]),
        Message("tool", "c", tool_call_id="1", name=5),
    ]
    assert conversation(messages, structured=False) == [
        {"role": "user", "content": "a", "name": "bob"},
        {"role": "assistant", "content": "b", "reasoning": "r", "reasoning_content": "r"},
        {"role": "tool", "content": "c", "tool_call_id": "1"},
    ]


def test_developer_messages_become_one_system_message_in_front():
    messages = [Message("user", "a"), Message("developer", "b", tools=[{}]), Message("system", "c")]
    assert without_developer(conversation(messages, structured=True)) == [
        {"role": "system", "content": "b\n\nc"},
        {"role": "user", "content": [text("a")]},
    ]
    alone = conversation([Message("developer", "b"), Message("user", "a")], structured=False)
    assert without_developer(alone) == [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]
