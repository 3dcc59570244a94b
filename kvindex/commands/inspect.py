"""`kvlane inspect`: show what the fleet and its index hold, and why a request went where it went."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import msgspec
import typer
from rich.console import Console, RenderableType

from kvindex.blocks import format_hash, parse_hash
from kvindex.commands import inspect_index, inspect_parity, inspect_view
from kvindex.config import index_config
from kvindex.errors import AdminUnavailable, ConfigError

ADMIN_TIMEOUT_S = 30.0
"""A long prompt is tokenised on the way."""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Show what the fleet and its index hold, and why."
)

RedisUrl = Annotated[
    str,
    typer.Option(envvar="KVLANE_REDIS_URL", help="Redis that holds the index: redis://, rediss://, unix://."),
]
AdminUrl = Annotated[str, typer.Option("--admin", envvar="KVLANE_ADMIN_URL", help="Admin API of a gateway.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

DEFAULT_REDIS = "redis://127.0.0.1:6379/0"
DEFAULT_ADMIN = "http://127.0.0.1:9003"


@app.command()
def workers(
    redis_url: RedisUrl = DEFAULT_REDIS, admin: AdminUrl = DEFAULT_ADMIN, as_json: AsJson = False
) -> None:
    """List the live workers with their load and indexed blocks, and what a gateway holds of them."""
    found = asyncio.run(inspect_index.read_workers(index_config(redis_url)))
    parity = inspect_parity.of_workers(_fleet(admin))
    _show(inspect_parity.joined(found, parity), inspect_view.workers(found, parity), as_json)


@app.command()
def pools(
    redis_url: RedisUrl = DEFAULT_REDIS, admin: AdminUrl = DEFAULT_ADMIN, as_json: AsJson = False
) -> None:
    """List the pools: workers whose block hashes can be compared."""
    found = asyncio.run(inspect_index.read_pools(index_config(redis_url)))
    parity = inspect_parity.of_pools(_fleet(admin))
    _show(inspect_parity.joined(found, parity), inspect_view.pools(found, parity), as_json)


@app.command()
def block(
    block_hash: Annotated[str, typer.Argument(metavar="HASH", help="Up to 16 hex digits.")],
    redis_url: RedisUrl = DEFAULT_REDIS,
    as_json: AsJson = False,
) -> None:
    """Say which live workers hold a block."""
    try:
        wanted = parse_hash(block_hash)
    except ValueError as error:
        raise ConfigError(f"HASH: up to 16 hex digits, not {block_hash!r}") from error
    found = asyncio.run(inspect_index.read_holders(index_config(redis_url), wanted))
    _show(found, inspect_view.holders(format_hash(wanted), found), as_json)


@app.command()
def prefix(
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT-or-@FILE",
            help="A prompt; or @FILE with a prompt or with the JSON body of a chat request.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Model or LoRA adapter; default: the body's, or the fleet's only one.")
    ] = None,
    admin: AdminUrl = DEFAULT_ADMIN,
    as_json: AsJson = False,
) -> None:
    """Say how much of a prompt each worker holds."""
    body = _prompt(text)
    if model is not None or "model" not in body:
        body["model"] = model or _only_model(admin)
    found = _ask(admin, "POST", "/prefix", body)
    _show(found, inspect_view.prefix(found), as_json)


@app.command()
def decision(
    decision_id: Annotated[
        str,
        typer.Argument(metavar="ID", help="The x-kvlane-decision header of the answer, or its x-request-id."),
    ],
    admin: AdminUrl = DEFAULT_ADMIN,
    as_json: AsJson = False,
) -> None:
    """Show a decision: every candidate with its terms, the choice, and what was then measured."""
    found = _ask(admin, "GET", f"/decisions/{quote(decision_id, safe='')}")
    _show(found, inspect_view.decision(found), as_json)


def _prompt(text: str) -> dict[str, Any]:
    if not text.startswith("@"):
        return {"text": text}
    try:
        content = Path(text[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text}: {error}") from error
    try:
        body = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return {"text": content}
    return body if isinstance(body, dict) and "messages" in body else {"text": content}


def _only_model(admin: str) -> str:
    models: list[str] = sorted({each["worker"]["model"] for each in _ask(admin, "GET", "/fleet")["workers"]})
    if not models:
        raise ConfigError(f"the gateway at {admin} knows no live worker. {inspect_view.HOW_TO_JOIN}")
    if len(models) > 1:
        raise ConfigError(f"the fleet serves {', '.join(models)}: name one with --model")
    return models[0]


def _fleet(admin: str) -> dict[str, Any] | None:
    """Return the gateway's view of the fleet; None, and nothing is amiss, where no gateway answers."""
    try:
        return _ask(admin, "GET", "/fleet")
    except AdminUnavailable:
        return None


def _ask(admin: str, method: str, path: str, body: object = None) -> dict[str, Any]:
    """Return the admin API's answer.

    Raises:
        AdminUnavailable: nobody answers there, or with a refusal, which the message repeats.
    """
    try:
        answer = httpx.request(method, admin.rstrip("/") + path, json=body, timeout=ADMIN_TIMEOUT_S)
        content = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        hint = "give a gateway's admin address with --admin"
        raise AdminUnavailable(f"no gateway answers at {admin} ({error}): {hint}") from error
    except ValueError as error:
        raise AdminUnavailable(f"{admin} is not the admin API of a gateway: no JSON at {path}") from error
    if not isinstance(content, dict):
        raise AdminUnavailable(f"{admin} is not the admin API of a gateway: no object at {path}")
    if answer.is_error:
        detail = content.get("detail") or content.get("error", {}).get("message")
        raise AdminUnavailable(f"{admin}{path} answers {answer.status_code}: {detail or answer.text}")
    return content


def _show(found: object, view: RenderableType, as_json: bool) -> None:
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        Console().print(view)
