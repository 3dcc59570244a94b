"""`kvlane inspect rates`: what steps and loads cost, whence that is known, and how well it predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from kvindex.commands.inspect.admin_api import ask
from kvindex.commands.inspect.options import DEFAULT_ADMIN, AdminUrl, AsJson, show
from kvindex.commands.inspect.tables import HOW_TO_JOIN, table

COSTS = {
    "prefill_tokens_per_s": "prefill tokens/s",
    "attention_ns_per_pair": "ns/pair",
    "step_ms": "ms/step",
    "decode_us_per_request": "us/decode",
    "decode_ns_per_token": "ns/context token",
}


def rates(admin: AdminUrl = DEFAULT_ADMIN, as_json: AsJson = False) -> None:
    """Show what a gateway takes workers' steps and loads to cost, whence, and how far predictions were off.

    Sources: `worker` measured its own steps, `pool` is what another worker of the pool measured, `profile` is
    the settings'. All are corrected by the times to first token that the access log tells: `speed` is by how
    much. Errors are measured minus predicted times of the requests on record.

    Loads come from a store into the engine. Their speed is `measured` (into memory by the LMCache server,
    from there by the worker) or the `settings`'; `slower` is by how much first tokens have corrected it.
    """
    found = ask(admin, "GET", "/rates")
    show(found, _view(found), as_json=as_json)


def _view(found: Mapping[str, Any]) -> RenderableType:
    if not found["workers"]:
        return Text(f"No worker is live. {HOW_TO_JOIN}")
    rows = (
        (
            each["worker"],
            each["model"],
            each["source"],
            f"{each['num_steps']:,}",
            *(_short(each["profile"][name]) for name in COSTS),
            f"{each['speed']:.2f}",
            f"{each['errors']['num_measured']:,}",
            _late(each["errors"]["median_ms"]),
            _short(each["errors"]["p90_distance_ms"]),
        )
        for each in found["workers"]
    )
    numbers = ["steps", *COSTS.values(), "speed", "measured TTFTs", "late ms (p50)", "off by ms (p90)"]
    steps = table(_title(found["errors"]), ["worker", "model", "source"], numbers, rows)
    return Group(steps, *_view_loads(found["loads"]))


def _view_loads(found: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    rows = [
        (
            each["worker"],
            each["store"],
            each["tier"],
            each["source"],
            f"{each['num_loads']:,}" if each["num_loads"] else "-",
            _short(each["gb_per_s"]),
            _short(each["latency_ms"]),
            f"{each['slower']:.2f}",
        )
        for each in found
    ]
    if rows:
        numbers = ["loads and probes", "GB/s", "latency ms", "slower"]
        yield table("loads", ["worker", "store", "tier", "source"], numbers, rows)


def _title(errors: Mapping[str, Any]) -> str:
    if not errors["num_measured"]:
        return "rates; no prediction was measured yet"
    return (
        f"rates; {errors['num_measured']:,} first tokens came {_late(errors['median_ms'])} ms later than "
        f"predicted (median), 90% were off by {_short(errors['p90_distance_ms'])} ms or less"
    )


def _late(value: float | None) -> str:
    return "-" if value is None else f"{value:+,.1f}"


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.2f}"
