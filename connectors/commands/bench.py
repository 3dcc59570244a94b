"""`kvlane bench transport` and `tiers`, which `kvlane bench` finds by entry point."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvindex.figures import show, write


def transport(
    *,
    device: Annotated[str, typer.Option(help="Where the caches are: cpu or cuda.")] = "cpu",
    link: Annotated[
        str | None,
        typer.Option(help="UCX_TLS for all that is measured. Default: tcp on a CPU, everything on a GPU."),
    ] = None,
    max_blocks: Annotated[int, typer.Option(min=4, help="Most blocks of 256 KiB in one transfer.")] = 4096,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Also start engines with this model, two of ours and two with NixlConnector: times to first "
            "token, and between.",
        ),
    ] = None,
    engine_args: Annotated[str, typer.Option(help="More arguments of `vllm serve` for these.")] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures there.")
    ] = None,
) -> None:
    """Measure moving KV between two processes, beside memcpy, raw UCXX and vLLM's NixlConnector."""
    from connectors.bench import engines
    from connectors.bench.transport import run

    console = Console(stderr=True)
    link = link or ("tcp,self" if device == "cpu" else "all")
    figures = run(device, link, max_blocks, console)
    if model is not None:
        figures += engines.run(model, device, link, engine_args, console)
    show(Console(), "Moving KV", figures)
    if json_file is not None:
        write(json_file, f"kvlane {' '.join(sys.argv[1:])}", figures)


def tiers(
    *,
    directory: Annotated[
        Path | None, typer.Option(help="Where the disk tier's files go for the time. Default: temporary.")
    ] = None,
    s3: Annotated[
        str | None,
        typer.Option(metavar="URL", help="s3://BUCKET/PREFIX?endpoint=URL&region=REGION. Default: no S3."),
    ] = None,
    num_chunks: Annotated[int, typer.Option(min=1, max=32, help="Chunks of 8 MiB in one transfer.")] = 16,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Also start an engine with this model: times to first token, computed and loaded.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the caches are: cpu or cuda.")] = "cpu",
    engine_args: Annotated[str, typer.Option(help="More arguments of `vllm serve` for it.")] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures there.")
    ] = None,
) -> None:
    """Measure storing KV in the tiers of a node and loading it, beside memcpy, plain files and plain S3."""
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "WARNING")  # it is read when LMCache is imported
    from connectors.bench import tier_ttft
    from connectors.bench.tiers import run
    from connectors.tiers import checks
    from connectors.tiers.spec import parse_bucket

    checks.check_lmcache()
    location = parse_bucket(s3).location if s3 else None
    if location is not None:
        checks.check_bucket(location)
    console = Console(stderr=True)
    figures = run(directory, location, num_chunks, device, console)
    if model is not None:
        figures += tier_ttft.run(model, device, directory, engine_args, console)
    show(Console(), "Tiers", figures)
    if json_file is not None:
        write(json_file, f"kvlane {' '.join(sys.argv[1:])}", figures)
