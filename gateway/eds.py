"""The endpoint discovery service: tells Envoy which workers there are, as soon as that changes.

Source: Envoy 1.40 `envoy/service/endpoint/v3/eds.proto` and the xDS protocol, state of the world.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable, Set

import grpc
import structlog
from google.protobuf.any_pb2 import Any

from gateway.config import split_address
from gateway.decision import Endpoints
from gateway.protos import core_pb2 as core
from gateway.protos import discovery_pb2 as wire

log = structlog.get_logger(__name__)

TYPE_URL = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


class EdsService:
    """Serves `envoy.service.endpoint.v3.EndpointDiscoveryService` from a fleet's addresses.

    Every cluster that is asked for has the same endpoints. Nothing is sent before the fleet is known
    (version 0), so that a gateway that has just started takes no worker away from Envoy.
    """

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        codec = {
            "request_deserializer": wire.DiscoveryRequest.FromString,
            "response_serializer": wire.DiscoveryResponse.SerializeToString,
        }
        return grpc.method_handlers_generic_handler(
            "envoy.service.endpoint.v3.EndpointDiscoveryService",
            {
                "StreamEndpoints": grpc.stream_stream_rpc_method_handler(self.stream, **codec),
                "FetchEndpoints": grpc.unary_unary_rpc_method_handler(self.fetch, **codec),
            },
        )

    async def fetch(
        self,
        request: wire.DiscoveryRequest,
        _: grpc.aio.ServicerContext[wire.DiscoveryRequest, wire.DiscoveryResponse],
    ) -> wire.DiscoveryResponse:
        """Answer a proxy that polls; waits until the fleet is known."""
        await self._endpoints.changed(0)
        return self._response(request.resource_names)

    async def stream(
        self, _: object, context: grpc.aio.ServicerContext[wire.DiscoveryRequest, wire.DiscoveryResponse]
    ) -> None:
        """Send the endpoints to a proxy that subscribes, and again whenever they or its clusters change."""
        clusters: list[str] = []
        sent: tuple[int, list[str]] = (0, [])
        read = asyncio.ensure_future(context.read())
        changed = asyncio.ensure_future(self._endpoints.changed(0))
        try:
            while True:
                await asyncio.wait({read, changed}, return_when=asyncio.FIRST_COMPLETED)
                if changed.done():
                    changed.result()
                    changed = asyncio.ensure_future(self._endpoints.changed(self._endpoints.version))
                if read.done():
                    request = read.result()
                    if request is grpc.aio.EOF:
                        return
                    if request.HasField("error_detail"):
                        log.error("Envoy refuses endpoints", reason=request.error_detail.message)
                    clusters = list(request.resource_names)
                    read = asyncio.ensure_future(context.read())
                # An acknowledgement names what was sent last and gets no answer.
                state = (self._endpoints.version, clusters)
                if all(state) and state != sent:
                    await context.write(self._response(clusters))
                    sent = state
        finally:
            read.cancel()
            changed.cancel()

    def _response(self, clusters: Iterable[str]) -> wire.DiscoveryResponse:
        version = str(self._endpoints.version)
        assignments = [
            load_assignment(cluster, self._endpoints.addresses, self._endpoints.draining)
            for cluster in clusters
        ]
        return wire.DiscoveryResponse(
            version_info=version,
            nonce=version,
            type_url=TYPE_URL,
            resources=[Any(type_url=TYPE_URL, value=each.SerializeToString()) for each in assignments],
        )


def load_assignment(
    cluster: str, addresses: Iterable[str], draining: Set[str] = frozenset()
) -> wire.ClusterLoadAssignment:
    """Return the addresses as the endpoints of `cluster`, all in one locality.

    Envoy sends nothing new to one that drains, and does not cut off what is under way there. What is not
    `ip:port` is left out: Envoy would refuse the whole list for it.
    """
    endpoints = []
    for address in addresses:
        try:
            host, port = split_address(address)
            ipaddress.ip_address(host)
        except ValueError:
            log.error("worker left out: Envoy needs ip:port", address=address)
            continue
        socket = core.SocketAddress(address=host, port_value=port)
        endpoint = wire.Endpoint(address=core.Address(socket_address=socket))
        status = wire.HealthStatus.DRAINING if address in draining else wire.HealthStatus.UNKNOWN
        endpoints.append(wire.LbEndpoint(endpoint=endpoint, health_status=status))
    return wire.ClusterLoadAssignment(
        cluster_name=cluster, endpoints=[wire.LocalityLbEndpoints(lb_endpoints=endpoints)]
    )
