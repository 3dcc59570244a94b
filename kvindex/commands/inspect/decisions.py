"""`kvlane inspect prefix`, `decision` and `why`: what a gateway knows of prompts and requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from kvindex.commands.inspect.admin_api import ask, ask_about_prompt, download
from kvindex.commands.inspect.options import DEFAULT_ADMIN, AdminUrl, AsJson, show
from kvindex.commands.inspect.tables import HOW_TO_JOIN, facts, inline, local_time, share, table
from kvindex.worker import Tier

PromptModel = Annotated[
    str | None, typer.Option(help="Model or LoRA adapter; default: the body's, or the fleet's only one.")
]

RequestId = Annotated[
    str,
    typer.Argument(metavar="ID", help="The x-kvlane-decision header of the answer, or its x-request-id."),
]


def prefix(
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT-or-@FILE",
            help="A prompt; or @FILE with a prompt or with the JSON body of a chat request.",
        ),
    ],
    model: PromptModel = None,
    tenant: Annotated[
        str | None, typer.Option(help="Whose prompt it is, where the gateway tells tenants apart.")
    ] = None,
    admin: AdminUrl = DEFAULT_ADMIN,
    as_json: AsJson = False,
) -> None:
    """Say how much of a prompt each worker holds, in which tier."""
    found = ask_about_prompt(admin, text, model, tenant=tenant)
    show(found, _view_prefix(found), as_json=as_json)


def decision(decision_id: RequestId, admin: AdminUrl = DEFAULT_ADMIN, as_json: AsJson = False) -> None:
    """Show a decision: every candidate with its terms, the choice, and what was then measured."""
    found = ask(admin, "GET", f"/decisions/{quote(decision_id, safe='')}")
    show(found, _view_decision(found), as_json=as_json)


def receipts(
    count: Annotated[int, typer.Option("--lines", "-n", min=1, max=1_000, help="Latest decisions.")] = 20,
    jsonl: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all as a trace for `kvlane replay`: hashes and counts."),
    ] = None,
    admin: AdminUrl = DEFAULT_ADMIN,
    as_json: AsJson = False,
) -> None:
    """List the latest decisions of a gateway, newest first; or write all that it remembers as a trace."""
    if jsonl is not None:
        num_lines = download(admin, "/recording", jsonl)
        typer.echo(f"{jsonl}: {num_lines:,} requests")
        return
    found = ask(admin, "GET", f"/decisions?limit={count}")
    show(found, _view_receipts(found), as_json=as_json)


def why(
    decision_id: RequestId,
    worker: Annotated[str | None, typer.Option(help="Explain this candidate, too.")] = None,
    admin: AdminUrl = DEFAULT_ADMIN,
    as_json: AsJson = False,
) -> None:
    """Say why the worker of a request did not hold more of its prompt, and why the best holder did not.

    Known are the requests that the asked gateway remembers, and what the index remembers of evictions and
    restarts. Neither text nor tokens nor salts are kept anywhere.
    """
    asked = f"?worker={quote(worker, safe='')}" if worker else ""
    found = ask(admin, "GET", f"/why/{quote(decision_id, safe='')}{asked}")
    show(found, Group(*_view_why(found)), as_json=as_json)


def _view_prefix(found: Mapping[str, Any]) -> RenderableType:
    if not found["workers"]:
        return Text(f"No live worker serves {found['model']}. {HOW_TO_JOIN}")
    num_tokens = found["prompt_tokens"]
    tiers = [tier for tier in Tier if any(tier in each["tier_tokens"] for each in found["workers"])]
    rows = (
        (
            each["worker"],
            *(f"{each['tier_tokens'].get(tier, 0):,}" for tier in tiers),
            f"{each['matched_blocks']:,}",
            share(each["matched_tokens"], num_tokens),
        )
        for each in found["workers"]
    )
    doubt = f"; may differ from the engine's: {found['inexact']}" if found["inexact"] else ""
    title = f"{num_tokens:,} prompt tokens of {found['model']}{doubt}"
    columns = [*(f"tokens on {tier}" for tier in tiers), "blocks held", "of the prompt"]
    return table(title, ["worker"], columns, rows)


def _view_decision(receipt: Mapping[str, Any]) -> RenderableType:
    """Show a receipt: the request, every candidate with its terms, what was measured."""
    values = {name: value for name, value in receipt.items() if name != "candidates"}
    return Group(facts(values | {"at": local_time(receipt["at"])}), _candidates(receipt["candidates"]))


def _view_receipts(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    if not found:
        return Text("This gateway remembers no decision.")
    rows = (
        (
            each["decision_id"],
            local_time(each["at"]),
            each["model"] or "",
            each["fallback"] or each["mode"],
            each["chosen"] or "",
            f"{each['prompt_tokens']:,}",
            share(each["matched_tokens"], each["prompt_tokens"]),
            *(
                "-" if value is None else f"{value:,.0f}"
                for value in (
                    each["predicted_ttft_ms"],
                    each["served"]["ttft_ms"] if each["served"] else None,
                    each["ttft_error_ms"],
                )
            ),
        )
        for each in found
    )
    numbers = ["prompt tokens", "held", "predicted TTFT ms", "measured", "error"]
    return table("", ["decision", "at", "model", "by", "worker"], numbers, rows)


def _candidates(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    if not found:
        return Text("No candidate was weighed: the index was not asked, and load alone decided.")
    loaded = ["loaded_tokens"] if any(each["loads"] or each["passed_over"] for each in found) else []
    terms = [name for name in found[0]["terms"] if loaded or name != "load_ms"]
    columns = ["cached_tokens", *loaded, "uncached_tokens", "backlog_tokens"]
    columns += ["running_requests", "waiting_requests"]
    rows = (
        (
            each["worker"],
            *(inline(each[name]) for name in columns),
            *(inline(each["terms"][name]) for name in terms),
            inline(each["ttft_ms"]),
        )
        for each in found
    )
    titles = [name.replace("_", " ") for name in [*columns, *terms, "ttft_ms"]]
    return Group(table("candidates, best first", ["worker"], titles, rows), *_view_loads(found))


def _view_loads(found: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """Show what tiers had for the candidates, and how far it was to be loaded."""
    rows = [
        (
            each["worker"],
            load["store"],
            load["tier"],
            made,
            f"{load['num_tokens']:,}",
            f"{load['ms']:,.1f}",
        )
        for each in found
        for loads, made in (("loads", "loaded"), ("passed_over", "computed: that is faster"))
        for load in each[loads]
    ]
    if rows:
        yield table(
            "what tiers held behind that", ["worker", "store", "tier", ""], ["tokens", "load ms"], rows
        )


_ROLES = {
    "chosen": "The chosen worker",
    "best_holder": "The best holder",
    "asked_for": "The worker asked for",
}


def _view_why(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    apart = {"findings", "receipts_since"}
    values = {name: value for name, value in found.items() if name not in apart}
    times = {"at": local_time(found["at"]), "requests known since": local_time(found["receipts_since"])}
    yield facts(values | times)
    if not found["findings"]:
        reason = found["fallback"] or "its path carries no prompt that is understood"
        yield Text(f"The index was not asked ({reason}): nothing is known of blocks.")
        return
    for role, finding in found["findings"].items():
        yield from _view_finding(_ROLES[role], finding)


def _view_finding(who: str, finding: Mapping[str, Any]) -> Iterator[RenderableType]:
    yield Text()
    held, num_blocks = finding["overlap_blocks"], finding["num_blocks"]
    yield Text(f"{who}, {finding['worker']}, held {held:,} of its {num_blocks:,} full blocks.")
    values: dict[str, object] = {"reason": f"{finding['reason'].replace('_', ' ')}: {finding['detail']}"}
    if finding["missed_tokens"] is not None:
        first, last = finding["missed_tokens"]
        values["first_miss"] = f"tokens {first:,} to {last - 1:,}, block {finding['block']}"
        values["held_now_by"] = finding["holders_now"] or "nobody"
    values["tiers_had"] = finding["tiers"]
    yield Padding(facts(values), (0, 0, 0, 2))
