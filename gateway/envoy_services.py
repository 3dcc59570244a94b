"""The services that Envoy speaks to, on one port: ext_proc, endpoint discovery, access log, health."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc

from gateway.access_log import AccessLogService
from gateway.config import GatewayConfig
from gateway.decision import Endpoints, Router
from gateway.eds import EdsService
from gateway.extproc.server import ExtProcService
from gateway.readiness import Readiness
from gateway.tls import grpc_credentials
from kvindex.errors import ConfigError

# Room for what travels beside a body in one message.
_MESSAGE_OVERHEAD_BYTES = 1 << 20


@contextlib.asynccontextmanager
async def serve_envoy(
    config: GatewayConfig, router: Router, endpoints: Endpoints, readiness: Readiness
) -> AsyncIterator[int]:
    """Serve ext_proc, EDS, the access log and health checks inside the block; yield the port.

    Requests are taken once `readiness` says so, which ends with the block.

    Raises:
        ConfigError: the address is taken or is not ours, or a certificate cannot be used.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", config.max_body_bytes + _MESSAGE_OVERHEAD_BYTES),
            # A second gateway on the same port would silently take half of the connections.
            ("grpc.so_reuseport", 0),
            # Envoy pings to find a gateway that hangs; by default grpc takes that for an attack.
            ("grpc.http2.max_ping_strikes", 0),
        ]
    )
    ext_proc = ExtProcService(router, readiness, max_body_bytes=config.max_body_bytes)
    services = (ext_proc, EdsService(endpoints), AccessLogService(router))
    server.add_generic_rpc_handlers(tuple(service.handler() for service in services))
    await readiness.serve(server)
    try:
        if config.tls is None:
            port = server.add_insecure_port(config.listen)
        else:
            port = server.add_secure_port(config.listen, grpc_credentials(config.tls))
    except RuntimeError as error:
        raise cannot_listen(config.listen, "--listen") from error
    await server.start()
    try:
        yield port
    finally:
        await readiness.close()
        await server.stop(config.stop_grace_s)
        await ext_proc.settled()


def cannot_listen(address: str, option: str) -> ConfigError:
    """Return the error that says so in one line."""
    return ConfigError(f"cannot listen on {address}, taken or not this machine's: choose another {option}")
