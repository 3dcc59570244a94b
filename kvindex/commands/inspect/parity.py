"""What a gateway holds of workers and pools: exact, degraded and why, or still checking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvindex.commands.inspect.admin_api import ask
from kvindex.errors import AdminUnavailable

UNKNOWN = "-"
"""Shown where no gateway answers, or does not know the worker."""


def read_fleet(admin: str) -> Mapping[str, Any] | None:
    """Return the gateway's view of the fleet; None, and nothing is amiss, where no gateway answers."""
    try:
        fleet: dict[str, Any] = ask(admin, "GET", "/fleet")
    except AdminUnavailable:
        return None
    return fleet


def parity_of_workers(fleet: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the state by incarnation out of a gateway's `/fleet`; empty without one."""
    workers = fleet["workers"] if fleet else []
    return {each["worker"]["incarnation"]: _said(each["parity"]) for each in workers}


def parity_of_pools(fleet: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the state by pool id out of a gateway's `/fleet`; empty without one."""
    return {each["pool_id"]: each["parity"] for each in fleet["pools"]} if fleet else {}


def _said(parity: Mapping[str, Any]) -> str:
    return f"{parity['state']} ({parity['reason']})" if parity["reason"] else parity["state"]
