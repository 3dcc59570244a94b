"""The `kvlane` command: finds its subcommands by entry point and imports only the one that is called."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from kvindex.errors import ConfigError, KvlaneError
from kvindex.log import LogLevel, configure_logging

GROUP = "kvlane.commands"

OUR_PACKAGES = frozenset({"kvindex", "connectors", "vllm_plugin", "gateway"})

INSTALL = {
    "gateway": "pip install 'kvlane[gateway]'",
    "vllm_plugin": "pip install kvlane beside vLLM >= 0.24",
}
"""What to do when a package's requirements are missing; `kvindex` has none beyond the base install."""


def main() -> None:
    """Run the command line of this process; never returns."""
    root()()


def root() -> typer.Typer:
    """Build the command line from the installed entry points."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, callback=_start)
    for entry in commands():
        app.command(entry.name, cls=_Unparsed, help=summary(entry))(_caller(entry))
    return app


class _Unparsed(TyperCommand):
    """Everything behind the name belongs to the subcommand, `--help` and `--` too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 (its class moved in typer 0.26)
        ctx.args = args
        return args


def _caller(entry: EntryPoint) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        call(entry, context.args)

    return run


def commands() -> Iterator[EntryPoint]:
    """Yield the installed subcommands by name."""
    yield from sorted(entry_points(group=GROUP), key=lambda entry: entry.name)


def summary(entry: EntryPoint) -> str:
    """Return the first line of the docstring of the subcommand's module, read without importing it."""
    spec = importlib.util.find_spec(entry.module)
    if spec is None or spec.origin is None:
        return ""
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
    line = docstring.partition("\n")[0].removeprefix(f"`kvlane {entry.name}`: ")
    return line[:1].upper() + line[1:]


def call(entry: EntryPoint, arguments: list[str]) -> None:
    """Run a subcommand with the arguments behind its name; what it raises becomes one line and an exit code.

    Raises:
        typer.Exit: 1 for an error, 2 for a wrong setting or a missing part of the installation.
    """
    try:
        app: typer.Typer = entry.load()
        app(arguments, prog_name=f"kvlane {entry.name}")
    except ConfigError as error:
        raise _stop(str(error), 2) from error
    except KvlaneError as error:
        raise _stop(str(error), 1) from error
    except ModuleNotFoundError as error:
        package = entry.module.partition(".")[0]
        if package not in INSTALL or (error.name or "").partition(".")[0] in OUR_PACKAGES:
            raise
        line = f"kvlane {entry.name} needs: {INSTALL[package]} (no module named {error.name})"
        raise _stop(line, 2) from error


def _stop(line: str, code: int) -> typer.Exit:
    Console(stderr=True, soft_wrap=True).print(Text(line, style="red"))
    return typer.Exit(code)


def _show_version(asked: bool) -> None:
    if asked:
        Console().print(f"kvlane {version('kvlane')}", highlight=False)
        raise typer.Exit


def _start(
    log_level: Annotated[
        LogLevel, typer.Option(envvar="KVLANE_LOG_LEVEL", help="Least severe line that is logged.")
    ] = LogLevel.INFO,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run a vLLM fleet as one KV cache."""
    configure_logging(log_level)


if __name__ == "__main__":
    main()
