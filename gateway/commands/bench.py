"""`kvlane bench`: measure what kvlane costs, beside what it is compared with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvindex.figures import Figure, show, write

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Measure what kvlane costs, beside what it is compared with.",
)

Scale = Annotated[
    float, typer.Option(min=0.01, help="Share of the work; below 1 it is quick and the tails mean little.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures there.")
]


@app.command()
def extproc(
    tokenizer: Annotated[
        Path, typer.Option(help="Directory of the tokenizer that chat requests are tokenised with.")
    ] = Path(".kvlane/tinymodel"),
    scale: Scale = 1.0,
    json_file: JsonFile = None,
) -> None:
    """Measure the latency that kvlane adds to Envoy, beside a trivial ext_proc server."""
    from gateway.bench.extproc import run

    _report("Latency added to Envoy", run(tokenizer, scale=scale, console=Console(stderr=True)), json_file)


@app.command()
def index(scale: Scale = 1.0, json_file: JsonFile = None) -> None:
    """Measure the index in Redis: bytes a block, match and reserve, store rate."""
    from gateway.bench.index import run

    _report("Index in Redis", run(scale=scale), json_file)


@app.command()
def tenants(scale: Scale = 1.0, json_file: JsonFile = None) -> None:
    """Measure what telling tenants apart adds to a request: key, limits, salt."""
    from gateway.bench.tenants import run

    _report("Tenants", run(scale=scale), json_file)


@app.command()
def replay(
    trace: Annotated[Path, typer.Option(metavar="FILE", help="Mooncake JSON lines: docs/replay.md.")],
    scale: Scale = 1.0,
    json_file: JsonFile = None,
) -> None:
    """Simulate a fleet under a trace: our routing beside that of others."""
    from gateway.bench.replay import run

    _report("Replay", run(trace, scale=scale, console=Console(stderr=True)), json_file)


@app.command()
def split(
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also Mooncake JSON lines: docs/replay.md.")
    ] = None,
    *,
    wire: Annotated[
        str, typer.Option(metavar="GB_PER_S[@MS]", help="How KV moves between workers.")
    ] = "50@2",
    engine: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML that describes the engines (docs/replay.md).")
    ] = None,
    requests_per_s: Annotated[float, typer.Option(min=0.001, help="Of the mix, on eight workers.")] = 20.0,
    long_tokens: Annotated[int, typer.Option(min=1, help="Length of the mix's long prompts.")] = 32_000,
    scale: Scale = 1.0,
    json_file: JsonFile = None,
) -> None:
    """Simulate splitting requests: first tokens, running answers, and the traffic at which it begins."""
    from gateway.bench.split import run
    from gateway.replay.fleets import read_engine
    from gateway.replay.mixes import Mix
    from gateway.replay.wire import read_wire

    mix = Mix(long_share=0.05, requests_per_s=requests_per_s, num_requests=3_000, long_tokens=long_tokens)
    figures = run(
        trace,
        engine=read_engine(engine),
        wire=read_wire(wire),
        mix=mix,
        scale=scale,
        console=Console(stderr=True),
    )
    _report("Split requests", figures, json_file)


for _entry in sorted(entry_points(group="kvlane.bench"), key=lambda entry: entry.name):
    app.command(_entry.name)(_entry.load())


def _report(title: str, figures: Sequence[Figure], json_file: Path | None) -> None:
    show(Console(), title, figures)
    if json_file is not None:
        write(json_file, f"kvlane {' '.join(sys.argv[1:])}", figures)
