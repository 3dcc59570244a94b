"""Free TCP ports."""

import random
import socket


def free_ports(count: int) -> list[int]:
    """Return `count` different ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def adjacent_ports(count: int) -> int:
    """Return the first of `count` ports in a row that nobody listens on; no connection leaves from any."""
    while True:
        first = random.randrange(20_000, 32_000)
        try:
            for port in range(first, first + count):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return first
