"""Ports for the parts of a bench."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

_PORTS = range(20_000, 32_000)
"""From none of these a connection leaves."""


def free_ports(count: int) -> list[int]:
    """Return different ports that nobody uses now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def adjacent_ports(count: int) -> int:
    """Return the first of `count` ports in a row that nobody uses now; no connection leaves from any."""
    while True:
        first = random.choice(_PORTS)  # noqa: S311 - so that two that look at once differ
        try:
            for port in range(first, first + count):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return first
