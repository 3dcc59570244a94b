"""The same conversations through kvlane and round robin, over the same engines, on cold caches.

python -m deploy.demo
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from connectors.bench.serving import ONE_PROCESS
from deploy.demo.conversations import Conversation, conversations
from deploy.demo.model import ENGINE_ENV, NAME, make_model
from deploy.demo.play import Played, play
from gateway.local_fleet import FleetOptions, LocalFleet, local_fleet, serve_command
from kvindex.errors import KvlaneError

HOME = Path(".kvlane")
MODEL = HOME / "tinymodel"
RESULT = HOME / "demo.json"

SEED = 7
CONCURRENCY = 3
# The conversations need about 1,050 blocks in all. As in production, the two caches together are about
# enough for everything once, and not for everything twice.
WORKLOAD = {"num_assistants": 6, "num_people": 2, "num_turns": 8, "system_chars": 2_400}
ENGINE = (
    *("--served-model-name", NAME, "--enforce-eager", "--max-model-len", "4096", "--block-size", "32"),
    *("--num-gpu-blocks-override", "480"),
    *ONE_PROCESS,
)


class Figures(msgspec.Struct, frozen=True):
    """One run. Tokens are the engines' own counts, times are the clients'."""

    prompt_tokens: int
    cached_tokens: int
    hit_rate: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    errors: int


class Result(msgspec.Struct, frozen=True):
    """Both runs, as `.kvlane/demo.json` keeps them."""

    kvlane: Figures
    round_robin: Figures


def main() -> None:
    """Run the demo; exit code 1 if a part or a request failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(highlight=False, soft_wrap=True)
    try:
        result = run(console)
    except KvlaneError as error:
        console.print(f"[red]{error}[/]", markup=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    RESULT.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    show(result, console)
    sys.exit(1 if result.kvlane.errors or result.round_robin.errors else 0)


def run(console: Console) -> Result:
    """Start a fleet of two real engines and play the workload twice."""
    if not (MODEL / "model.safetensors").exists():
        with console.status(
            "making the model: random weights, a tokenizer trained on Python's documentation"
        ):
            MODEL.mkdir(parents=True, exist_ok=True)
            make_model(MODEL)
    # The engines' cache can be emptied over HTTP in this mode only.
    os.environ.update(ENGINE_ENV, VLLM_SERVER_DEV_MODE="1")
    workload = conversations(**WORKLOAD, seed=SEED)
    options = FleetOptions(serve_command(str(MODEL), *ENGINE), start_timeout_s=300)
    with local_fleet(options, HOME / "logs") as fleet:
        with console.status(
            f"starting Redis, two vLLM engines (about a minute), gateway and Envoy; logs in {HOME}/logs"
        ):
            fleet.wait_until_ready(lambda line: console.print(f"  [green]ready[/] {line}"))
        with Progress(
            TextColumn("{task.description:12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress:
            kvlane = measure(fleet, fleet.url, "kvlane", workload, progress)
            with fleet.round_robin() as url:
                round_robin = measure(fleet, url, "round robin", workload, progress)
        with console.status("stopping"):
            fleet.processes.stop()
    return Result(kvlane=kvlane, round_robin=round_robin)


def measure(
    fleet: LocalFleet, url: str, name: str, workload: Sequence[Conversation], progress: Progress
) -> Figures:
    """Empty the caches and play the workload once."""
    fleet.wait_until(lambda: all(map(empty_cache, fleet.engines)), "empty caches")
    before = tokens(fleet)
    task = progress.add_task(name, total=sum(len(each.questions) for each in workload))
    played = asyncio.run(
        play(url, NAME, workload, concurrency=CONCURRENCY, seed=SEED, progress=lambda: progress.advance(task))
    )
    for error in played.errors[:3]:
        progress.console.print(f"[red]{name}: {error}[/]")
    return figures(played, before, tokens(fleet))


def figures(played: Played, before: tuple[int, int], after: tuple[int, int]) -> Figures:
    """Return one run's figures from the engines' counters before and after it."""
    prompt, cached = (late - early for early, late in zip(before, after, strict=True))
    percentiles = statistics.quantiles(played.ttft_ms, n=10) if len(played.ttft_ms) > 1 else [0.0] * 9
    return Figures(
        prompt_tokens=prompt,
        cached_tokens=cached,
        hit_rate=round(cached / prompt, 4) if prompt else 0.0,
        ttft_p50_ms=round(percentiles[4], 1),
        ttft_p90_ms=round(percentiles[8], 1),
        errors=len(played.errors),
    )


def empty_cache(engine: str) -> bool:
    """Empty an engine's prefix cache; False while a request still holds blocks."""
    return bool(httpx.post(f"http://{engine}/reset_prefix_cache").raise_for_status().json()["success"])


def tokens(fleet: LocalFleet) -> tuple[int, int]:
    """Return prompt tokens, and those of them served from cache, that the engines have counted so far."""
    names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
    sums = dict.fromkeys(names, 0)
    for engine in fleet.engines:
        metrics = httpx.get(f"http://{engine}/metrics").raise_for_status().text
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                if sample.name in sums:
                    sums[sample.name] += int(sample.value)
    return sums[names[0]], sums[names[1]]


def show(result: Result, console: Console) -> None:
    """Print the two runs side by side."""
    table = Table(title="The same conversations, two real vLLM engines, cold caches")
    table.add_column()
    rows = [("kvlane", result.kvlane), ("round robin", result.round_robin)]
    for name, _ in rows:
        table.add_column(name, justify="right")
    runs = [each for _, each in rows]
    table.add_row("prompt tokens", *(f"{each.prompt_tokens:,}" for each in runs))
    table.add_row("served from cache", *(f"{each.cached_tokens:,}" for each in runs))
    table.add_row("hit rate", *(f"{each.hit_rate:.1%}" for each in runs), style="bold")
    table.add_row("TTFT p50", *(f"{each.ttft_p50_ms:.0f} ms" for each in runs))
    table.add_row("TTFT p90", *(f"{each.ttft_p90_ms:.0f} ms" for each in runs))
    table.add_row("errors", *(str(each.errors) for each in runs))
    console.print(table)
    console.print(f"Token counts are vLLM's own; written to {RESULT}.")


if __name__ == "__main__":
    main()
