"""How many gateways there are: each says in Redis that it is there, and counts those that did so lately."""

from __future__ import annotations

import importlib.resources
import secrets

from kvindex.config import IndexConfig
from kvindex.keys import GATEWAYS
from kvindex.redis_connection import AsyncConnection, Script

_SCRIPT = Script((importlib.resources.files("kvindex") / "scripts" / "roll_call.lua").read_text())


class RollCall:
    """One gateway's place among the others, for one event loop.

    Args:
        config: how to reach Redis.
        ttl_s: how long a gateway counts that says nothing any more.
    """

    def __init__(self, config: IndexConfig, *, ttl_s: float) -> None:
        self._connection = AsyncConnection(config)
        self._ttl_ms = int(1000 * ttl_s)
        self._name = secrets.token_hex(8)

    async def count(self) -> int:
        """Say that this gateway is there; return how many are.

        Raises:
            IndexUnavailable: Redis does not answer.
        """
        return await self._call(self._ttl_ms)

    async def leave(self) -> None:
        """Count no more.

        Raises:
            IndexUnavailable: Redis does not answer; then the time to live does it.
        """
        await self._call(0)

    async def close(self) -> None:
        """Release the connection."""
        await self._connection.close()

    async def _call(self, ttl_ms: int) -> int:
        return int(await self._connection.run(_SCRIPT, GATEWAYS, self._name, ttl_ms))
