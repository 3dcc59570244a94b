"""Chat templates: which form of content they read, and their rendering.

Source: vLLM 0.32 `vllm/renderers/hf.py` (resolve_chat_template_content_format, safe_apply_chat_template).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from os.path import commonprefix
from typing import Protocol

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.parser import Parser

from gateway.errors import RequestError
from gateway.tokens.bodies import Chat, JsonObject
from gateway.tokens.messages import conversation, has_media, without_developer
from gateway.tokens.sandbox import hasten

# What a template can raise: it is a program, partly written for other inputs than the one at hand.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Arguments of transformers' apply_chat_template that a client must not reach through
# chat_template_kwargs: they are ours to set, or concern what happens after the rendering.
_RESERVED = frozenset(
    {
        *("chat_template", "conversation", "model_config", "tokenizer", "tokenizer_kwargs", "tokenize"),
        *("padding", "truncation", "max_length"),
        *("return_dict", "return_tensors", "return_assistant_tokens_mask"),
    }
)


class TemplateTokenizer(Protocol):
    """What is used here of transformers' tokenizers."""

    def get_chat_template(self, chat_template: str | None, tools: object) -> str:
        """Return the text of the template, given as text, by name or not at all; ValueError: none."""

    def apply_chat_template(self, conversation: list[JsonObject], **options: object) -> str:
        """Render; raises whatever the template makes of its input."""


class _Generation(ext.Extension):
    """Reads the blocks that mark the assistant's own words for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_GRAMMAR = sandbox.ImmutableSandboxedEnvironment(extensions=[_Generation, ext.loopcontrols])


def render(tokenizer: TemplateTokenizer, chat: Chat, template: str | None) -> tuple[str, int | None]:
    """Return the prompt's text, and how many of its characters precede the first image, audio or video.

    The second is None where there is none. Thread-safe.

    Args:
        tokenizer: a transformers tokenizer.
        chat: what the client asks for; its own template, if any, is not looked at.
        template: Jinja text; None: the tokenizer's.

    Raises:
        RequestError: 400, no template, or the template refuses the conversation.
    """
    options = {key: value for key, value in chat.template_kwargs.items() if key not in _RESERVED}
    tools = options.pop("tools", chat.tools)
    try:
        text = tokenizer.get_chat_template(template, tools=tools)
    except ValueError as error:
        raise RequestError(
            400,
            "This model has no chat template: send its prompt to /v1/completions, or give a template to its "
            "engines (--chat-template FILE) and to the gateway (chat_templates).",
        ) from error
    structured = reads_parts(text)

    def rendered(stand_in: str | None = None) -> str:
        messages = conversation(chat.messages, structured=structured, stand_in=stand_in)
        if any(message["role"] == "developer" for message in messages) and not _knows_developer(text):
            messages = without_developer(messages)
        return _apply(tokenizer, text, messages, {**options, "tools": tools})

    prompt = rendered()
    if not has_media(chat.messages):
        return prompt, None
    # Where the three differ first, something that is not text begins.
    return prompt, len(commonprefix([prompt, rendered("0"), rendered("1")]))  # noqa: RUF071 - as wanted


def _apply(
    tokenizer: TemplateTokenizer, template: str, messages: list[JsonObject], options: JsonObject
) -> str:
    try:
        hasten(template)
        return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)
    except _TEMPLATE_ERRORS as error:
        raise RequestError(400, f"The chat template refuses this conversation: {error}") from error


def _knows_developer(template: str) -> bool:
    return '"developer"' in template or "'developer'" in template


@lru_cache(maxsize=32)
def reads_parts(template: str) -> bool:
    """Say whether the template loops over a message's content, and so wants it as a list of parts.

    The verdict follows the template's syntax alone, as the engine's does.
    """
    try:
        root = _GRAMMAR.parse(template)
    except jinja2.TemplateError:
        return False
    loops = list(root.find_all(nodes.For))
    chats = _aliases(root, "messages")
    messages = {_target(loop.target) for loop in loops if _name(_bare(loop.iter)) in chats}
    if None in chats or None in messages:
        return False

    def is_content(expression: nodes.Node) -> bool:
        owner, field = _field(_bare(expression))
        return field == "content" and _name(owner) in messages

    macros = list(root.find_all(nodes.Macro))
    in_macros = {id(loop) for macro in macros for loop in macro.find_all(nodes.For)}
    if any(
        is_content(loop.iter) or (id(loop) not in in_macros and _name(loop.iter) == "content")
        for loop in loops
    ):
        return True
    # A macro that loops over a parameter counts if some call passes a message's content there.
    calls = list(root.find_all(nodes.Call))
    return any(
        _name(loop.iter) in _parameters(macro, calls, is_content)
        for macro in macros
        for loop in macro.find_all(nodes.For)
    )


def _aliases(root: nodes.Template, variable: str) -> set[str | None]:
    """Return `variable` and every name assigned from it; None among them: not a plain name."""
    names: set[str | None] = {variable}
    assignments = [(_name(_bare(node.node)), _target(node.target)) for node in root.find_all(nodes.Assign)]
    while found := {target for source, target in assignments if source and source in names} - names:
        names |= found
    return names


def _parameters(
    macro: nodes.Macro, calls: Iterable[nodes.Call], is_content: Callable[[nodes.Node], bool]
) -> set[str]:
    """Return the parameters of `macro` to which a call passes what `is_content`."""
    names = [parameter.name for parameter in macro.args]
    passed = set()
    for call in calls:
        if _name(call.node) == macro.name:
            passed |= {name for name, value in zip(names, call.args, strict=False) if is_content(value)}
            passed |= {keyword.key for keyword in call.kwargs if is_content(keyword.value)}
    return passed & set(names)


def _bare(node: object) -> object:
    """Strip filters, tests and slices."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    return node


def _name(node: object) -> str | None:
    return node.name if isinstance(node, nodes.Name) and node.ctx == "load" else None


def _target(node: nodes.Node) -> str | None:
    return node.name if isinstance(node, nodes.Name) else None


def _field(node: object) -> tuple[object, object]:
    """Return owner and name of `owner.name` or `owner["name"]`."""
    if isinstance(node, nodes.Getattr):
        return node.node, node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.node, node.arg.value
    return None, None
