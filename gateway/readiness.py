"""Whether requests may come, told over gRPC's health protocol and over HTTP alike.

Source: Gateway API Inference Extension, proposal 004, health checking; `grpc.health.v1`.
"""

from __future__ import annotations

import enum

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

LIVENESS = "liveness"
EXT_PROC_SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
READINESS = ("", "readiness", EXT_PROC_SERVICE)
"""Services whose health is whether requests may come; the empty name is what a probe asks for by default."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class State(enum.StrEnum):
    """A gateway's life, in order."""

    STARTING = "starting"
    """The index has not been read yet: whatever was picked now would be a guess."""
    READY = "ready"
    STOPPING = "stopping"


class Readiness:
    """The state of this process. Changed by the process alone, on its event loop."""

    def __init__(self) -> None:
        self._state = State.STARTING
        self._health = health.aio.HealthServicer()

    @property
    def state(self) -> State:
        """The state now."""
        return self._state

    @property
    def is_ready(self) -> bool:
        """Whether requests may come."""
        return self._state is State.READY

    async def serve(self, server: grpc.aio.Server) -> None:
        """Answer health checks on `server`, which has not been started: alive, and not ready yet."""
        await self._health.set(LIVENESS, _SERVING)
        await self._say(_NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    async def open(self) -> None:
        """Let requests come."""
        self._state = State.READY
        await self._say(_SERVING)

    async def close(self) -> None:
        """Let no further request come; those under way go on."""
        self._state = State.STOPPING
        await self._say(_NOT_SERVING)

    async def _say(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in READINESS:
            await self._health.set(service, status)
