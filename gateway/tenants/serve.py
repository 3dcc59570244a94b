"""The gate as a part of a running gateway."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from gateway.config import GatewayConfig
from gateway.decision import Router
from gateway.tenants.gate import TenantGate
from gateway.tenants.limits import Limiter
from gateway.tenants.peers import TTL_S, Peers
from gateway.tenants.roster_file import RosterFile
from kvindex.roll_call import RollCall


@contextlib.asynccontextmanager
async def gated(config: GatewayConfig, router: Router) -> AsyncIterator[Router]:
    """Yield `router` behind the gate while the block runs; as it is where there are no tenants.

    Raises:
        ConfigError: the file of tenants is wrong.
    """
    secret = config.salt_secret
    if config.tenants is None or secret is None:
        yield router
        return
    roster_file = RosterFile(config.tenants)
    peers = Peers(RollCall(config, ttl_s=TTL_S))
    await peers.start()
    roster_file.start()
    try:
        yield TenantGate(
            router,
            lambda: roster_file.roster,
            Limiter(peers.num_gateways),
            secret=secret,
            engine_key=config.worker_api_key.get_secret_value() if config.worker_api_key else None,
        )
    finally:
        await roster_file.stop()
        await peers.stop()
