"""Makes Jinja's sandbox find the fields of messages sooner. What it finds is the same.

For `message.role` the sandbox asks the dict for an attribute `role`, catches the error, then takes the
item; for `loop.first`, `content.strip` or `ns.turns` it looks at length whether the answer is safe to give.
In a conversation of many messages that is most of the time that rendering takes.

Source: jinja2 3.1 `sandbox.py` (SandboxedEnvironment.getattr, ImmutableSandboxedEnvironment).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from jinja2 import Environment
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

_DICT_ATTRIBUTES = frozenset(dir(dict))

# Attributes that the sandbox gives to every template: they neither change anything nor lead further.
_SAFE = {
    LoopContext: frozenset({"depth", "first", "index", "index0", "last", "length", "revindex", "revindex0"}),
    str: frozenset(
        {
            *("endswith", "find", "join", "lower", "lstrip", "partition", "replace", "rfind", "rpartition"),
            *("rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper"),
        }
    ),
}


_PLAIN = (bool, int, str)


@lru_cache(maxsize=128)
def hasten(template: str) -> None:
    """Let transformers render `template` faster from now on."""
    from transformers.utils import chat_template_utils

    # Private: where a version of transformers lacks it, rendering is slower.
    if compile_template := getattr(chat_template_utils, "_compile_jinja_template", None):
        environment: Environment = compile_template(template).environment
        if "getattr" not in vars(environment):
            environment.getattr = _quick(environment)  # type: ignore[method-assign, assignment]


def _quick(environment: Environment) -> Callable[[Any, str], Any]:
    careful = environment.getattr

    def getattr_(owner: Any, name: str) -> Any:  # noqa: ANN401 - as in Jinja
        kind = type(owner)
        if kind is dict and name not in _DICT_ATTRIBUTES:
            return owner[name] if name in owner else environment.undefined(obj=owner, name=name)
        if name in _SAFE.get(kind, ()):
            return getattr(owner, name)
        if kind is Namespace and not name.startswith("_"):
            value = getattr(owner, name, None)
            if type(value) in _PLAIN:
                return value
        return careful(owner, name)

    return getattr_
