"""What a gateway holds of workers and pools: exact, degraded and why, or still checking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvindex.commands.inspect_index import PoolView
from kvindex.worker import RegisteredWorker

UNKNOWN = "-"
"""Shown where no gateway answers, or does not know the worker."""


def of_workers(fleet: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the state by incarnation out of a gateway's `/fleet`; empty without one."""
    workers = fleet["workers"] if fleet else []
    return {each["worker"]["incarnation"]: _said(each["parity"]) for each in workers}


def of_pools(fleet: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the state by pool id out of a gateway's `/fleet`; empty without one."""
    return {each["pool_id"]: each["parity"] for each in fleet["pools"]} if fleet else {}


def joined(
    found: Sequence[RegisteredWorker] | Sequence[PoolView], parity: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return what was found as JSON-ready values, each with its `parity`; None where it is not known."""
    return [msgspec.to_builtins(each) | {"parity": parity.get(_key(each))} for each in found]


def _key(found: RegisteredWorker | PoolView) -> str:
    return found.pool_id if isinstance(found, PoolView) else found.worker.incarnation


def _said(parity: Mapping[str, Any]) -> str:
    return f"{parity['state']} ({parity['reason']})" if parity["reason"] else parity["state"]
