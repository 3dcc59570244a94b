"""Templates find the same fields as without the shortcut, and are refused the same."""

from __future__ import annotations

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
    *("none.role", "(1).real", "ns.found", "ns.missing", "message.calls[0].function.name"),
]
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
        return template.render(messages=messages, message=messages[1], bos_token="<s>", tools=None)
    except (jinja2.TemplateError, AttributeError, TypeError, LookupError, ValueError) as error:
        return type(error), str(error)


def templates() -> list[str]:
    plain = [f"{{% set ns = namespace(found=1) %}}{{{{ {each} }}}}" for each in EXPRESSIONS]
    loops = [f"{{% for message in messages %}}{{{{ {each} }}}} {{% endfor %}}" for each in LOOP]
    return [*plain, *loops, *filter(None, FAMILIES.values())]


@pytest.mark.parametrize("template", templates())
def test_templates_find_the_same_fields(template):
    compiled = chat_template_utils._compile_jinja_template(template)
    # Compiled apart, so not hastened.
    expected = outcome(chat_template_utils._cached_compile_jinja_template(template))
    hasten(template)
    assert "getattr" in vars(compiled.environment)
    addresses = ("<built-in method", "<bound method")
    found = outcome(compiled)
    if isinstance(expected, str) and expected.startswith(addresses):
        assert found.partition(" at 0x")[0] == expected.partition(" at 0x")[0]
    else:
        assert found == expected


def test_hastening_twice_is_hastening_once():
    template = "{{ message.role }} twice"
    hasten(template)
    environment = chat_template_utils._compile_jinja_template(template).environment
    quick = environment.getattr
    hasten.cache_clear()
    hasten(template)
    assert environment.getattr is quick
