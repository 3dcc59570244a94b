"""Ports for the parts of a bench."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress


def free_ports(count: int) -> Sequence[int]:
    """Return ports that nobody uses now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def free_pair() -> int:
    """Return a port that is free, as is the next one, where an LMCache server's HTTP API is."""
    while True:
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            second.bind(("127.0.0.1", port + 1))
            return port
