"""A finding: what is wrong, what it costs, what cures it."""

from __future__ import annotations

import enum
from collections.abc import Iterable

import msgspec


class Level(enum.StrEnum):
    """How bad it is: nothing, worth a look, or hits and requests are being lost."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at. `cost` and `cure` are empty only where all is well."""

    level: Level
    subject: str
    """What was looked at: `Redis 10.0.0.1:6379`, `worker 10.0.0.2:8000`."""
    what: str
    cost: str = ""
    cure: str = ""


def ok(subject: str, what: str) -> Finding:
    """Return that all is well."""
    return Finding(level=Level.OK, subject=subject, what=what)


def warning(subject: str, what: str, *, cost: str, cure: str) -> Finding:
    """Return something worth a look."""
    return Finding(level=Level.WARNING, subject=subject, what=what, cost=cost, cure=cure)


def problem(subject: str, what: str, *, cost: str, cure: str) -> Finding:
    """Return something that costs hits or requests now."""
    return Finding(level=Level.PROBLEM, subject=subject, what=what, cost=cost, cure=cure)


def count(findings: Iterable[Finding], level: Level) -> int:
    """Return how many findings are of `level`."""
    return sum(finding.level is level for finding in findings)
