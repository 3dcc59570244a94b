"""Which transports there are, and which one this process uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from connectors.transport import Transport
from kvindex.errors import ConfigError


def _memory() -> Transport:
    from connectors.memory_transport import MemoryTransport

    return MemoryTransport()


def _ucx() -> Transport:
    from connectors.ucx_transport import UcxTransport

    return UcxTransport()


def _nixl(backend: str) -> Transport:
    from connectors.nixl_transport import NixlTransport

    return NixlTransport(backend)


TRANSPORTS: dict[str, Callable[[], Transport]] = {
    "ucx": _ucx,
    "nixl-libfabric": lambda: _nixl("LIBFABRIC"),
    "nixl-ucx": lambda: _nixl("UCX"),
    "memory": _memory,
}
"""By name, the preferred first."""

PACKAGES = {"ucx": "ucxx", "nixl-ucx": "nixl"}
"""What `auto` looks for. LIBFABRIC is for machines with EFA, and named by those who have them."""


def names(choice: str) -> list[str]:
    """Return the transports that a setting allows here, the preferred first.

    Args:
        choice: names separated by commas, or `auto`.

    Raises:
        ConfigError: a name is unknown, or nothing that `auto` looks for is installed.
    """
    if choice == "auto":
        if found := [name for name, package in PACKAGES.items() if find_spec(package)]:
            return found
        raise ConfigError("no transport is installed: pip install 'kvlane[ucx]', or set kvlane.transport")
    chosen = choice.split(",")
    for name in chosen:
        if name not in TRANSPORTS:
            raise ConfigError(f"there is no transport {name!r}: choose among {', '.join(TRANSPORTS)}, auto")
    return sorted(chosen, key=list(TRANSPORTS).index)


def best_common(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """Return the transport that both have and that is preferred; both sides find the same."""
    return next((name for name in TRANSPORTS if name in ours and name in theirs), None)


class TransportChoice:
    """The one transport of this process, opened when the first peer agrees on it.

    There is one, as UCXX and NIXL bring a UCX each and two of them in one process crash. A single name is
    opened at once, so that a transport that cannot work is noticed at the start.

    Args:
        choice: see `names`.

    Raises:
        ConfigError: the choice is impossible here.
    """

    def __init__(self, choice: str) -> None:
        self.names = names(choice)
        self.transport: Transport | None = None
        if len(self.names) == 1:
            self.open(self.names[0])

    def open(self, name: str) -> Transport:
        """Return the transport `name`, one of `names`; from then on it is the only one."""
        if self.transport is None:
            self.transport = TRANSPORTS[name]()
            self.names = [name]
        return self.transport

    def close(self) -> None:
        """Close the transport. Idempotent."""
        if self.transport is not None:
            self.transport.close()
