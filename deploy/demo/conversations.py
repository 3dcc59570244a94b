"""The demo's workload: people who ask assistants about documentation, several turns each. Pure."""

from __future__ import annotations

import ast
import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MODULES = ("argparse", "collections", "difflib", "logging", "pathlib", "statistics", "subprocess", "tarfile")
"""One assistant each; its system prompt carries the module's documentation."""

PASTED_LINES = 16

QUESTIONS = (
    "What is {name} for, and when would I rather use something else?",
    "Show me the smallest example with {name}. My input is a list of about {number} records.",
    "Which errors can {name} raise, and how should I handle them in a service that must not stop?",
    "I called {name} {number} times in a loop and it was slow. What should I change?",
    "Explain the parameters of {name} to somebody who has used Python for {number} weeks.",
    "Rewrite my use of {name} so that it also works for {number} items at a time.",
    "Does {name} behave differently in older versions? I support the last {number}.",
    "How would you test code that depends on {name}? Please name the edge cases.",
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A system prompt that others share, and what one person asks, turn by turn."""

    system: str
    questions: tuple[str, ...]


def conversations(
    *, num_assistants: int, num_people: int, num_turns: int, system_chars: int, seed: int
) -> list[Conversation]:
    """Return `num_people` conversations with each of `num_assistants` assistants."""
    chance = random.Random(seed)  # noqa: S311 - the same workload at every run is the point
    made = []
    for module in MODULES[:num_assistants]:
        source = _source(module)
        tree = ast.parse(source)
        names = sorted(set(_names(tree)))
        system = f"You answer questions about Python's {module} module. Rely on this documentation.\n\n"
        system += "\n\n".join(_documentation(tree))[:system_chars]
        for _ in range(num_people):
            questions = [
                question.format(name=f"{module}.{chance.choice(names)}", number=chance.randrange(3, 10_000))
                + f" This is the code in question:\n\n{_excerpt(source, chance)}"
                for question in chance.sample(QUESTIONS, num_turns)
            ]
            made.append(Conversation(system, tuple(questions)))
    return made


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None  # noqa: S101 - the standard library has them all
    assert spec.origin is not None  # noqa: S101
    return Path(spec.origin).read_text()


def _excerpt(source: str, chance: random.Random) -> str:
    lines = [line for line in source.splitlines() if line.strip()]
    first = chance.randrange(len(lines) - PASTED_LINES)
    return "\n".join(lines[first : first + PASTED_LINES])


def _names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name


def _documentation(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield f"{getattr(node, 'name', 'Overview')}: {text}"
