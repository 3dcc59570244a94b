"""`kvlane serve`: run vllm serve with the connector, KV events and the endpoint filled in."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.console import Console

from connectors.tiers import checks, node
from connectors.tiers.spec import JoinedTiers, Tiers, parse_tiers
from kvindex.config import labels_of
from kvindex.errors import ConfigError
from kvindex.worker import Role
from vllm_plugin.plugin import CONNECTOR_MODULE, CONNECTOR_NAME

DEFAULT_PORT = 8000
_WILDCARD_HOSTS = frozenset({"", "0.0.0.0", "::"})

app = typer.Typer(add_completion=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model name or directory, as `vllm serve` takes it.")],
    *,
    endpoint: Annotated[
        str | None,
        typer.Option(
            envvar="KVLANE_ENDPOINT",
            help="ip:port at which Envoy reaches this engine. Default: --host and --port of vLLM, or this "
            "machine's address.",
        ),
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(envvar="KVLANE_REDIS_URL", help="The Redis that holds the index.")
    ] = None,
    role: Annotated[
        Role | None,
        typer.Option(envvar="KVLANE_ROLE", help="What it is asked to do until `kvlane role` says otherwise."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="What requests may select it by, once for each label."),
    ] = None,
    tiers: Annotated[
        str | None,
        typer.Option(
            envvar="KVLANE_SERVE_TIERS",
            metavar="TIERS",
            help="Keep KV beyond the engine: cpu=20GB,disk=/var/kv:200GB,s3=s3://bucket/prefix, or "
            "lmcache=HOST:PORT; docs/tiers.md.",
        ),
    ] = None,
    tiers_args: Annotated[
        str, typer.Option(help="More arguments of the LMCache server that --tiers starts, in one string.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and stop.")] = False,
) -> None:
    """Run `vllm serve MODEL`, with any of its arguments, as a worker of the fleet.

    Every argument that is not listed below goes to vLLM unchanged; what you set there wins.
    """
    if model.startswith("-"):
        raise typer.BadParameter(f"MODEL comes first, got {model}", ctx=context, param_hint="MODEL")
    kept = parse_tiers(tiers) if tiers else None
    arguments = complete_arguments(context.args, endpoint, role, labels_of(label or ()), kept)
    if dry_run:
        Console(soft_wrap=True, highlight=False, markup=False).print(
            shlex.join(["vllm", "serve", model, *arguments])
        )
        return
    # Not an argument: a URL may carry a password, and vLLM logs its arguments.
    if redis_url:
        os.environ["KVLANE_REDIS_URL"] = redis_url
    if find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here: pip install 'vllm>=0.24', then kvlane beside it")
    if kept is not None and tiers is not None:
        _prepare(kept, tiers, shlex.split(tiers_args), _block_size(arguments))
    # By module: a script may be missing, or another environment's. -P: a folder `vllm` here is not meant.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", model, *arguments]
    os.execv(sys.executable, command)  # noqa: S606 - no shell wanted


def complete_arguments(
    given: Sequence[str],
    endpoint: str | None,
    role: Role | None = None,
    labels: Mapping[str, str] | None = None,
    tiers: Tiers | JoinedTiers | None = None,
) -> list[str]:
    """Return vLLM's arguments with what a worker needs; given values win, key by key.

    Raises:
        ConfigError: an argument contradicts what a worker needs.
    """
    arguments = list(given)
    if "--no-enable-prefix-caching" in arguments:
        raise ConfigError("a worker needs its prefix cache: remove --no-enable-prefix-caching")
    if isinstance(tiers, Tiers):
        checks.check_block_size(tiers.chunk_size, _block_size(arguments))
    transfer = _take_json(arguments, "--kv-transfer-config")
    events = _take_json(arguments, "--kv-events-config")
    if (connector := transfer.get("kv_connector", CONNECTOR_NAME)) != CONNECTOR_NAME:
        raise ConfigError(
            f"--kv-transfer-config asks for {connector}; run that engine with `vllm serve` and KV events "
            "over tcp, and `kvlane publish` beside it"
        )
    if events.get("enable_kv_cache_events") is False or events.get("publisher") == "null":
        raise ConfigError("--kv-events-config turns KV events off, which a worker publishes: turn them on")
    extra = transfer.get("kv_connector_extra_config", {})
    transfer = {
        "kv_connector": CONNECTOR_NAME,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        **transfer,
        "kv_connector_extra_config": {
            "kvlane.endpoint": endpoint or _endpoint(arguments),
            **({"kvlane.role": role} if role else {}),
            **({"kvlane.labels": labels} if labels else {}),
            **({"kvlane.tiers": tiers.address} if tiers else {}),
            **extra,
        },
    }
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "inproc://kvlane",
        **events,
    }
    return [
        *arguments,
        *("--kv-transfer-config", json.dumps(transfer)),
        *("--kv-events-config", json.dumps(events)),
    ]


def _prepare(tiers: Tiers | JoinedTiers, spec: str, arguments: Sequence[str], block_size: int | None) -> None:
    """Have the tiers there before the engine starts; they stay in use until it ends.

    Raises:
        ConfigError: they cannot be; the message says why.
        TiersUnavailable: the server did not come up.
    """
    checks.check_lmcache()
    # LMCache reports its use to its makers unless it is told not to.
    os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
    if isinstance(tiers, JoinedTiers):
        checks.check_join(tiers)
    else:
        checks.check_tiers(tiers, has_gpu=node.has_gpu())
        node.join_or_start(tiers, spec, arguments)
    if tiers.api:
        server = node.describe_api(tiers.api)
        checks.check_block_size(server.chunk_size, block_size)
        os.environ.setdefault("KVLANE_TIER_SERVER", server.instance_id)
        os.environ.setdefault("KVLANE_TIER_STORES", json.dumps(server.store_names))


def _block_size(arguments: Sequence[str]) -> int | None:
    """Return the tokens per block that vLLM is told; None: it chooses, or will complain itself."""
    value = _value(arguments, "--block-size")
    return int(value) if value is not None and value.isdecimal() and int(value) else None


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """Return the last value given for `flag`, as `--flag value` or `--flag=value`."""
    value = None
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
        elif argument == flag:
            value = arguments[position + 1] if position + 1 < len(arguments) else ""
    return value


def _take_json(arguments: list[str], flag: str) -> dict[str, Any]:
    """Remove `flag` from the arguments and return its value.

    Raises:
        ConfigError: the value is not a JSON object.
    """
    if dotted := next((argument for argument in arguments if argument.startswith(f"{flag}.")), None):
        raise ConfigError(f"{dotted}: give {flag} as one JSON object")
    value = _value(arguments, flag)
    if value is None:
        return {}
    while flag in arguments:
        position = arguments.index(flag)
        del arguments[position : position + 2]
    arguments[:] = [argument for argument in arguments if not argument.startswith(f"{flag}=")]
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{flag} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"{flag} must be a JSON object, got {value}")
    return parsed


def _endpoint(arguments: Sequence[str]) -> str:
    """Return where vLLM's server will be reached: its own host and port, or this machine's address."""
    host = _value(arguments, "--host") or ""
    port = _value(arguments, "--port") or DEFAULT_PORT
    return f"{_machine_address() if host in _WILDCARD_HOSTS else host}:{port}"


def _machine_address() -> str:
    """Return the address that this machine's default route leaves from; nothing is sent."""
    if address := os.environ.get("VLLM_HOST_IP"):
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        address = probe.getsockname()[0]
    return str(address)


if __name__ == "__main__":
    app()
