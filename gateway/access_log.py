"""The access log service: Envoy's measurement of every finished request goes to the router.

Source: Envoy 1.40 `envoy/service/accesslog/v3/als.proto`.
"""

from __future__ import annotations

import grpc

from gateway.decision import End, Router, Served
from gateway.protos import access_log_pb2 as wire

LOG_NAME = "kvlane"

DECISION_HEADER = "x-kvlane-decision"
"""Response header that names the decision."""

TTFT_TAG = "ttft_us"
"""Custom tag with the time from the request's first byte to the first byte of the response's body."""


class AccessLogService:
    """Serves `envoy.service.accesslog.v3.AccessLogService`."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        return grpc.method_handlers_generic_handler(
            "envoy.service.accesslog.v3.AccessLogService",
            {
                "StreamAccessLogs": grpc.stream_unary_rpc_method_handler(
                    self.stream,
                    request_deserializer=wire.StreamAccessLogsMessage.FromString,
                    response_serializer=wire.StreamAccessLogsResponse.SerializeToString,
                )
            },
        )

    async def stream(
        self,
        _: object,
        context: grpc.aio.ServicerContext[wire.StreamAccessLogsMessage, wire.StreamAccessLogsResponse],
    ) -> wire.StreamAccessLogsResponse:
        """Record the entries of one Envoy thread until it goes away."""
        while (message := await context.read()) is not grpc.aio.EOF:
            for entry in message.http_logs.log_entry:
                if (served := read_entry(entry)) is not None:
                    self._router.record(served)
        return wire.StreamAccessLogsResponse()


def read_entry(entry: wire.HTTPAccessLogEntry) -> Served | None:
    """Return what was measured, or None for a request that no decision was made about."""
    decision_id = entry.response.response_headers.get(DECISION_HEADER)
    if not decision_id:
        return None
    common = entry.common_properties
    # Envoy writes "-" where it never saw a byte of the body.
    ttft_us = common.custom_tags.get(TTFT_TAG, "-")
    upstream = common.upstream_remote_address.socket_address
    host = f"[{upstream.address}]" if ":" in upstream.address else upstream.address
    return Served(
        decision_id=decision_id,
        status=entry.response.response_code.value,
        worker=f"{host}:{upstream.port_value}" if upstream.address else None,
        ttft_ms=int(ttft_us) / 1e3 if ttft_us.isdecimal() else None,
        duration_ms=common.duration.ToTimedelta().total_seconds() * 1e3
        if common.HasField("duration")
        else None,
        request_bytes=entry.request.request_body_bytes,
        response_bytes=entry.response.response_body_bytes,
        # Every flag that the subset of ResponseFlags has means that the response broke off.
        end=End.ABORTED if common.response_flags.ListFields() else End.COMPLETE,
    )
