"""How `kvlane inspect` shows things: tables, lists of facts, numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

HOW_TO_JOIN = "Start one with `kvlane serve MODEL`, or `kvlane publish` beside a vLLM that runs."


def table(
    title: str, left: Sequence[str], right: Sequence[str], rows: Iterable[Iterable[str]]
) -> RenderableType:
    """Return a table with some columns of text and then some of numbers, under a line of its own."""
    made = Table()
    for index, name in enumerate(left):
        made.add_column(name, overflow="fold", no_wrap=index == 0)
    for name in right:
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(*row)
    return Group(Text(title), made) if title else made


def facts(values: Mapping[str, object]) -> Table:
    """Return a list of named values; empty ones are left out."""
    grid = Table.grid(padding=(0, 2))
    for name, value in values.items():
        if value not in (None, "", [], {}, ()):
            grid.add_row(name.replace("_", " "), inline(value))
    return grid


def inline(value: object) -> str:
    """Return a value on one line."""
    match value:
        case Mapping():
            return ", ".join(f"{name} {inline(each)}" for name, each in value.items() if each is not None)
        case list() | tuple():
            return ", ".join(map(inline, value))
        case float():
            return f"{value:,.2f}"
        case int() if not isinstance(value, bool):
            return f"{value:,}"
    return str(value)


def num_bytes(count: float) -> str:
    """Return a size in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def share(part: float, whole: float) -> str:
    """Return a part in percent, or a dash where there is no whole."""
    return f"{part / whole:.0%}" if whole else "-"


def local_time(at_s: float) -> str:
    """Return a Unix time as it is here."""
    return datetime.fromtimestamp(at_s).astimezone().isoformat(timespec="milliseconds")
