"""A process with a publisher, to be killed or paused.

    python -m tests.support.publishing_process URL LEASE_MS TOKEN...

Its engine holds the blocks of one prompt.
"""

from __future__ import annotations

import sys
import time

from tests.support.publishing import Published
from tests.support.scripted_engine import prompt


def main() -> None:
    url, lease_ms, *tokens = sys.argv[1:]
    published = Published(url, lease_ms=int(lease_ms), heartbeat_ms=50)
    published.source.put(prompt(*map(int, tokens))[0])
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
