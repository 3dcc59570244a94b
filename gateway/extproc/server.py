"""The ext_proc service: one gRPC stream per HTTP request."""

from __future__ import annotations

import asyncio

import grpc
import structlog
from google.protobuf.message import DecodeError

from gateway.decision import Router
from gateway.errors import ProtocolViolation
from gateway.extproc.metrics import OPEN_STREAMS, VIOLATIONS
from gateway.extproc.session import Session
from gateway.protos import ext_proc_pb2 as wire
from gateway.readiness import EXT_PROC_SERVICE, Readiness

log = structlog.get_logger(__name__)


class ExtProcService:
    """Serves `envoy.service.ext_proc.v3.ExternalProcessor` with the decisions of a router.

    A gateway that is not ready answers as one that is away would, so that Envoy goes by its own failure
    mode instead of by a fleet that is not known yet.
    """

    def __init__(self, router: Router, readiness: Readiness, *, max_body_bytes: int) -> None:
        self._router = router
        self._readiness = readiness
        self._max_body_bytes = max_body_bytes
        self._finishing: set[asyncio.Task[None]] = set()

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what `grpc.aio.Server.add_generic_rpc_handlers` takes."""
        return grpc.method_handlers_generic_handler(
            EXT_PROC_SERVICE,
            {
                "Process": grpc.stream_stream_rpc_method_handler(
                    self.process,
                    request_deserializer=wire.ProcessingRequest.FromString,
                    response_serializer=wire.ProcessingResponse.SerializeToString,
                )
            },
        )

    async def process(
        self, _: object, context: grpc.aio.ServicerContext[wire.ProcessingRequest, wire.ProcessingResponse]
    ) -> None:
        """Answer one request's messages; settle its decision when the stream ends, however it does."""
        if not self._readiness.is_ready:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the gateway is {self._readiness.state}")
        session = Session(self._router, max_body_bytes=self._max_body_bytes)
        OPEN_STREAMS.inc()
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                for response in await session.answer(message):
                    await context.write(response)
        except (ProtocolViolation, DecodeError) as error:
            VIOLATIONS.inc()
            log.warning("ext_proc stream refused", reason=str(error))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            OPEN_STREAMS.dec()
            # Envoy half-closes and then resets: a reset must not cancel the settlement.
            task = asyncio.create_task(session.finish())
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)

    async def settled(self) -> None:
        """Return once every stream that has ended is settled."""
        await asyncio.gather(*self._finishing)
