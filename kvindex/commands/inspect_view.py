"""How `kvlane inspect` shows what it read: values in, rich tables out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvindex.commands.inspect_index import HolderView, PoolView
from kvindex.commands.inspect_parity import UNKNOWN
from kvindex.keys import POOLS
from kvindex.worker import RegisteredWorker

HOW_TO_JOIN = "Start one with `kvlane serve MODEL`, or `kvlane publish` beside a vLLM that runs."


def _table(title: str, left: Sequence[str], right: Sequence[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def workers(found: Sequence[RegisteredWorker], parity: Mapping[str, str]) -> RenderableType:
    """Show workers, their load, and what a gateway holds of them, by incarnation."""
    if not found:
        return Text(f"No worker is live: no pool named by {POOLS} has one with a valid lease. {HOW_TO_JOIN}")
    return _table(
        "workers",
        ["worker", "model", "engine", "parity"],
        ["slot", "blocks indexed", "KV in use", "running", "waiting", "backlog tokens", "lease"],
        (
            (
                each.worker.worker_id,
                each.worker.model,
                f"{each.worker.engine} ({each.worker.publisher})".lstrip(),
                parity.get(each.worker.incarnation, UNKNOWN),
                str(each.slot),
                f"{each.num_indexed_blocks:,} of {each.worker.num_blocks:,}",
                f"{each.load.kv_usage:.0%}",
                str(each.load.running_requests),
                f"{each.load.waiting_requests} + {each.charged_requests}",
                f"{each.load.waiting_prefill_tokens:,} + {each.charged_tokens:,}",
                f"{each.lease_left_ms / 1000:.1f} s",
            )
            for each in found
        ),
    )


def pools(found: Sequence[PoolView], parity: Mapping[str, str]) -> RenderableType:
    """Show pools, and what a gateway holds of them, by pool id."""
    if not found:
        return Text(f"No pool: {POOLS} is empty, so no worker has ever registered here. {HOW_TO_JOIN}")
    return _table(
        "pools",
        ["pool", "model", "hash scheme", "parity"],
        ["block size", "workers", "blocks indexed"],
        (
            (
                each.pool_id,
                each.model,
                each.scheme,
                parity.get(each.pool_id, UNKNOWN),
                str(each.block_size),
                str(each.num_workers),
                f"{each.num_indexed_blocks:,} of {each.num_blocks:,}",
            )
            for each in found
        ),
    )


def holders(block: str, found: Sequence[HolderView]) -> RenderableType:
    """Show who holds a block."""
    if not found:
        return Text(
            f"No live worker holds block {block}: it was never stored, was evicted, or its workers are gone. "
            "Hashes depend on model, block size, LoRA name and cache salt."
        )
    rows = ((each.worker, each.model, each.pool_id, str(each.slot)) for each in found)
    return _table(f"holders of {block}", ["worker", "model", "pool"], ["slot"], rows)


def prefix(found: Mapping[str, Any]) -> RenderableType:
    """Show how much of a prompt each worker holds."""
    if not found["workers"]:
        return Text(f"No live worker serves {found['model']}. {HOW_TO_JOIN}")
    num_tokens = found["prompt_tokens"]
    rows = (
        (
            each["worker"],
            f"{each['matched_blocks']:,}",
            f"{each['matched_tokens']:,}",
            f"{each['matched_tokens'] / max(num_tokens, 1):.0%}",
        )
        for each in found["workers"]
    )
    doubt = f"; may differ from the engine's: {found['inexact']}" if found["inexact"] else ""
    title = f"{num_tokens:,} prompt tokens of {found['model']}{doubt}"
    return _table(title, ["worker"], ["blocks held", "tokens", "of the prompt"], rows)


def decision(receipt: Mapping[str, Any]) -> RenderableType:
    """Show a receipt: the request, every candidate with its terms, what was measured."""
    at = datetime.fromtimestamp(receipt["at"]).astimezone().isoformat(timespec="milliseconds")
    facts = {name: value for name, value in receipt.items() if name != "candidates"}
    return Group(_facts(facts | {"at": at}), _candidates(receipt["candidates"]))


def _facts(values: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in values.items():
        if value not in (None, "", [], {}):
            table.add_row(name.replace("_", " "), _inline(value))
    return table


def _inline(value: object) -> str:
    match value:
        case Mapping():
            return ", ".join(f"{name} {_inline(each)}" for name, each in value.items() if each is not None)
        case list():
            return ", ".join(map(_inline, value))
        case float():
            return f"{value:,.2f}"
        case int() if not isinstance(value, bool):
            return f"{value:,}"
    return str(value)


def _candidates(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    if not found:
        return Text("No candidate was weighed: the index was not asked, and load alone decided.")
    terms = list(found[0]["terms"])
    columns = ["cached_tokens", "uncached_tokens", "backlog_tokens", "running_requests", "waiting_requests"]
    rows = (
        (
            each["worker"],
            *(_inline(each[name]) for name in columns),
            *(_inline(each["terms"][name]) for name in terms),
            _inline(each["ttft_ms"]),
        )
        for each in found
    )
    titles = [name.replace("_", " ") for name in [*columns, *terms, "ttft_ms"]]
    return _table("candidates, best first", ["worker"], titles, rows)
