"""Turns the messages of a request into the conversation that a chat template reads.

vLLM 0.24 differs in what templates rarely show: it keeps tool arguments that are a JSON list, hides
unknown fields of text parts, and finds no loop over content that a macro gets under another name.

Source: vLLM 0.32 `vllm/renderers/chat_utils.py` (parse_chat_messages and what it calls).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from gateway.tokens.bodies import JsonObject, Message

Part = str | JsonObject

_TEXT_FIELDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_MODALITIES = ("image", "audio", "video")

# What the engine knows of a part; other fields (cache_control and the like) reach the template.
_KNOWN_FIELDS = frozenset(
    {
        *("type", "uuid", "name", "data", "file", "closed", "prompt_cache_breakpoint"),
        *("text", "refusal", "thinking", "input_audio", "audio_url", "audio_embeds"),
        *("image_url", "image_pil", "image_embeds", "video_url", "video_embeds"),
    }
)

# Claude Code puts a line into system prompts that changes with every request; vLLM 0.32 drops it.
BILLING_HEADER = "x-anthropic-billing-header"


def has_media(messages: Iterable[Message]) -> bool:
    """Say whether any message holds something that is not text."""
    return any(
        _is_media(part)
        for message in messages
        if not isinstance(message.content, str)
        for part in _parts(message)
    )


def has_billing_header(messages: Iterable[Message]) -> bool:
    """Say whether a system message starts with the line that only newer engines drop."""
    return any(
        _starts_with_header(part)
        for message in messages
        if message.role == "system"
        for part in _raw_parts(message)
    )


def conversation(
    messages: Iterable[Message], *, structured: bool, stand_in: str | None = None
) -> list[JsonObject]:
    """Return the messages as the engine hands them to the template.

    Args:
        messages: as the client sent them.
        structured: content as a list of parts, for templates that loop over it; else joined text.
        stand_in: text put where an image, audio or video goes, to find out where that is. Without it
            structured content names the modality and joined text leaves it out.
    """
    return [_message(message, structured, stand_in) for message in messages]


def without_developer(chat: Sequence[JsonObject]) -> list[JsonObject]:
    """Rewrite the developer's messages as system messages, for templates that do not know the role.

    All system messages then become one at the front, unless there is just one and it stands there.
    """
    chat = [
        {key: value for key, value in message.items() if key != "tools"} | {"role": "system"}
        if message["role"] == "developer"
        else message
        for message in chat
    ]
    if all(message["role"] != "system" for message in chat[1:]):
        return chat
    system = [_joined(message["content"]) for message in chat if message["role"] == "system"]
    merged = {"role": "system", "content": "\n\n".join(filter(None, system))}
    return [merged, *(message for message in chat if message["role"] != "system")]


def _message(message: Message, structured: bool, stand_in: str | None) -> JsonObject:
    result: JsonObject = {"role": message.role, "content": _content(message, structured, stand_in)}
    if message.role == "assistant":
        if message.tool_calls:
            result["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
        reasoning = message.reasoning_content if message.reasoning is None else message.reasoning
        if reasoning is not None:
            result |= {"reasoning": reasoning, "reasoning_content": reasoning}
    elif message.role == "tool" and message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    for key, value in (("name", message.name), ("task", message.task)):
        if isinstance(value, str):
            result[key] = value
    if message.role == "developer":
        result["tools"] = message.tools and [_tool(tool) for tool in message.tools]
    return result


def _content(message: Message, structured: bool, stand_in: str | None) -> Any:  # noqa: ANN401 - text or parts
    if isinstance(message.content, str) and message.role != "system" and not structured:
        return message.content  # as what follows would, at a fraction of the cost
    parts = _parts(message)
    items: Any = [item for part in parts if (item := _part(part, structured, stand_in))]
    if not structured:
        # The engine puts the placeholders of media before the text.
        front = stand_in if stand_in is not None and any(map(_is_media, parts)) else ""
        return front + "\n".join(items)
    if message.role == "tool" and all(item["type"] == "text" for item in items):
        return _joined(items)
    return items


def _parts(message: Message) -> list[Part]:
    parts = _raw_parts(message)
    if message.role != "system":
        return parts
    return [kept for part in parts if (kept := _without_header(part)) is not None]


def _raw_parts(message: Message) -> list[Part]:
    content = message.content
    return [content] if isinstance(content, str) else content or []


def _starts_with_header(part: Part) -> bool:
    return _kind(part) == "text" and (_text(part) or "").startswith(BILLING_HEADER)


def _without_header(part: Part) -> Part | None:
    if not _starts_with_header(part):
        return part
    _, _, rest = (_text(part) or "").partition("\n")
    return ({"type": "text", "text": rest} | _extras(part)) if rest else None


def _part(part: Part, structured: bool, stand_in: str | None) -> JsonObject | str | None:
    """Return what stands for `part` in the content; None or empty: nothing."""
    if not _is_media(part):
        text = _text(part)
        if text is None or not structured:
            return text
        if _kind(part) == "tool_reference":
            return {"type": "tool_reference", "name": text}
        return {"type": "text", "text": text} | _extras(part)
    if structured and stand_in is not None:
        return {"type": "text", "text": stand_in}
    return {"type": _modality(part)} | _extras(part) if structured else None


def _kind(part: Part) -> object:
    return "text" if isinstance(part, str) else part.get("type")


def _is_media(part: Part) -> bool:
    kind = _kind(part)
    return not isinstance(kind, str) or (kind not in _TEXT_FIELDS and kind != "tool_reference")


def _modality(part: Part) -> str:
    kind = _kind(part)
    names = [kind] if isinstance(kind, str) else list(part)
    return next((modality for modality in _MODALITIES if any(modality in name for name in names)), "unknown")


def _text(part: Part) -> str | None:
    if isinstance(part, str):
        return part
    kind = part.get("type")
    name = _TEXT_FIELDS.get(kind, "name") if isinstance(kind, str) else "text"
    text = part.get(name)
    return text if isinstance(text, str) else None


def _extras(part: Part) -> JsonObject:
    if isinstance(part, str):
        return {}
    return {key: value for key, value in part.items() if key not in _KNOWN_FIELDS}


def _joined(content: str | list[JsonObject]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(item["text"] for item in content if "text" in item)


def _tool(tool: JsonObject) -> JsonObject:
    tool = _ordered(tool, "function", "type")
    if isinstance(function := tool.get("function"), dict):
        tool["function"] = _ordered(function, "name", "description", "parameters", "strict")
    return tool


def _tool_call(call: JsonObject) -> JsonObject:
    """Order the fields as the engine does and parse the arguments, which templates want as an object."""
    call = _ordered(call, "id", "function", "type")
    if isinstance(function := call.get("function"), dict):
        call["function"] = _ordered(function, "arguments", "name") | {
            "arguments": _arguments(function.get("arguments"))
        }
    return call


def _arguments(arguments: object) -> JsonObject:
    """Return the arguments as an object, empty where they are none."""
    if isinstance(arguments, str):
        try:
            # Like the engine: more lenient than a JSON parser should be (NaN, Infinity).
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {}
    return arguments if isinstance(arguments, dict) else {}


def _ordered(fields: JsonObject, *first: str) -> JsonObject:
    return {key: fields[key] for key in first if key in fields} | fields
