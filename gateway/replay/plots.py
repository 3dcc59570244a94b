"""A replay as pictures: distributions, hit rate over time, load by worker, goodput against rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.replay.engine import Job
from gateway.replay.run import Summary
from gateway.replay.simulation import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_WINDOWS = 40
"""Points of a curve over time."""


def draw(folder: Path, summaries: Sequence[Summary], outcomes: Sequence[Outcome]) -> list[Path]:
    """Write the pictures into `folder` and return their files; all but goodput are of the highest rate.

    Args:
        summaries: of every policy at every rate.
        outcomes: of the same runs, in the same order.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (`pip install 'kvlane[plot]'`).
        OSError: the folder cannot be written.
    """
    highest = max(each.requests_per_s for each in summaries)
    runs = {
        summary.policy: outcome
        for summary, outcome in zip(summaries, outcomes, strict=True)
        if summary.requests_per_s == highest
    }
    folder.mkdir(parents=True, exist_ok=True)

    def distribution(of: Callable[[Job], float]) -> Callable[[Axes], None]:
        def plot(axes: Axes) -> None:
            for policy, outcome in runs.items():
                seconds = sorted(of(job) / 1000 for job in outcome.jobs)
                shares = [(number + 1) / len(seconds) for number in range(len(seconds))]
                axes.plot(seconds, shares, label=policy)
            axes.set_xscale("log")
            axes.set_ylabel("share of requests")

        return plot

    def hits(axes: Axes) -> None:
        for policy, outcome in runs.items():
            axes.plot(*_hit_rates(outcome.jobs), label=policy)
        axes.set_ylabel("prompt tokens from cache")

    def load(axes: Axes) -> None:
        for number, (policy, outcome) in enumerate(runs.items()):
            shares = [busy_ms / max(sum(outcome.busy_ms), 1e-9) for busy_ms in sorted(outcome.busy_ms)]
            places = [worker + number / (len(runs) + 1) for worker in range(len(shares))]
            axes.bar(places, shares, width=1 / (len(runs) + 1), label=policy)
        axes.set_ylabel("share of all computing time")

    def goodput(axes: Axes) -> None:
        for policy in runs:
            points = sorted((s.requests_per_s, s.goodput_per_s) for s in summaries if s.policy == policy)
            axes.plot([rate for rate, _ in points], [good for _, good in points], marker="o", label=policy)
        axes.set_ylabel("first tokens in time/s")

    at_rate = f"at {highest:.2f} requests/s"
    return [
        _save(
            folder / "ttft.png", f"Time to first token {at_rate}", "s", distribution(lambda job: job.ttft_ms)
        ),
        _save(folder / "e2e.png", f"Time to last token {at_rate}", "s", distribution(lambda job: job.e2e_ms)),
        _save(folder / "hit_rate.png", f"Hit rate {at_rate}", "minutes", hits),
        _save(folder / "load.png", f"Load by worker {at_rate}", "workers, least busy first", load),
        _save(folder / "goodput.png", "Goodput", "requests/s", goodput),
    ]


def _hit_rates(jobs: Iterable[Job]) -> tuple[list[float], list[float]]:
    """Return the ends of even windows in minutes, and the hit rate of what arrived in each."""
    ordered = list(jobs)
    window_ms = max(ordered[-1].arrived_ms / NUM_WINDOWS, 1.0)
    cached, asked = [0] * (NUM_WINDOWS + 1), [0] * (NUM_WINDOWS + 1)
    for job in ordered:
        window = min(int(job.arrived_ms / window_ms), NUM_WINDOWS)
        cached[window] += job.num_hit_tokens
        asked[window] += job.request.num_tokens
    filled = [window for window in range(NUM_WINDOWS + 1) if asked[window]]
    minutes = [(window + 1) * window_ms / 60_000 for window in filled]
    return minutes, [cached[window] / asked[window] for window in filled]


def _save(file: Path, title: str, x_label: str, plot: Callable[[Axes], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    plot(axes)
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    return file
