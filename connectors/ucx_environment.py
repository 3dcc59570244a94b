"""What the environment tells UCX, UCXX's and NIXL's; interface settings cannot be given otherwise."""

from __future__ import annotations

import os

_SETTINGS = {
    "UCX_TCP_TX_SEG_SIZE": "256k",
    "UCX_TCP_RX_SEG_SIZE": "256k",
    "UCX_TCP_SNDBUF": "4m",
    "UCX_TCP_RCVBUF": "4m",
    # Without these UCX drops shared memory, in silence, wherever peer failure is to be noticed.
    "UCX_POSIX_ERROR_HANDLING": "y",
    "UCX_SYSV_ERROR_HANDLING": "y",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}


def tune() -> None:
    """Set what is not set; to be called before UCX is loaded."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
