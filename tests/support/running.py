"""A process that lives as long as a block."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` until the block ends, then kill it."""
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.kill()
