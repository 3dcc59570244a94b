"""Templates find the same fields as without the shortcut, and are refused the same."""

from __future__ import annotations

import re
from typing import Any

import jinja2
import pytest
from transformers.utils import chat_template_utils

from gateway.tokens.sandbox import hasten
from tests.support.chat_templates import FAMILIES

EXPRESSIONS = [
    *(
        "message.role",
        "message.missing",
        "message.missing is defined",
        "message.missing.more",
        "message.items",
    ),
    *("message.items() | list", "message.get('role')", "message.update({'a': 1})", "message.pop('role')"),
    *("message.keys", "message._private", "message.__class__", "message['keys']", "message.content.strip()"),
    *("message.content.split('l')", "message.content.startswith(' h')", "message.content.missing"),
    *("message.content.format()", "'{0.__class__}'.format(message)", "message.content.format_map({})"),
    *("message.content.__class__", "message.content.upper", "messages.append(1)", "messages.missing"),
    *("ns.found", "ns.missing", "ns.text", "ns.none", "ns.chat", "ns.method", "ns.method()", "ns._private"),
    *("ns.__class__", "ns.items", "none.role", "(1).real", "message.calls[0].function.name"),
]
NAMESPACE = (
    "{% set ns = namespace(found=1, text='a', none=none, chat=messages, method='{}'.format, items=2) %}"
    "{% set ns._private = 1 %}"
)
LOOP = [
    *(
        "loop.first",
        "loop.last",
        "loop.index",
        "loop.index0",
        "loop.revindex",
        "loop.revindex0",
        "loop.depth",
    ),
    *("loop.length", "loop.previtem", "loop.nextitem", "loop.cycle(1, 2)", "loop.changed(1)", "loop._length"),
    *("loop.__class__", "loop.missing", "loop.nextitem.role.upper()"),
]
MESSAGES = [
    {"role": "system", "content": "be kind", "keys": "shadowed", "_private": 1},
    {"role": "user", "content": " hello ", "calls": [{"function": {"name": "f"}}]},
    {"role": "assistant", "content": "hi\n", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
]


def outcome(template: jinja2.Template) -> Any:
    messages = [dict(message) for message in MESSAGES]
    try:
        text = template.render(messages=messages, message=messages[1], bos_token="<s>", tools=None)
        return re.sub("0x[0-9a-f]+", "address", text)
    except (jinja2.TemplateError, AttributeError, TypeError, LookupError, ValueError) as error:
        return type(error), str(error)


def templates() -> list[str]:
    plain = [NAMESPACE + f"{{{{ {each} }}}}" for each in EXPRESSIONS]
    loops = [f"{{% for message in messages %}}{{{{ {each} }}}} {{% endfor %}}" for each in LOOP]
    return [*plain, *loops, *filter(None, FAMILIES.values())]


@pytest.mark.parametrize("template", templates())
def test_templates_find_the_same_fields(template):
    compiled = chat_template_utils._compile_jinja_template(template)
    # Compiled apart, so not hastened.
    expected = outcome(chat_template_utils._cached_compile_jinja_template(template))
    hasten(template)
    assert "getattr" in vars(compiled.environment)
    assert outcome(compiled) == expected


def test_hastening_twice_is_hastening_once():
    template = "{{ message.role }} twice"
    hasten(template)
    environment = chat_template_utils._compile_jinja_template(template).environment
    quick = environment.getattr
    hasten.cache_clear()
    hasten(template)
    assert environment.getattr is quick
