"""One HTTP request as ext_proc tells it, message by message."""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import structlog

from gateway.decision import Decision, End, HttpRequest, Router, Served
from gateway.errors import DEFECTS, ProtocolViolation, RequestError
from gateway.extproc import messages
from gateway.extproc.messages import Pick
from gateway.extproc.metrics import HANDLING_SECONDS, REQUESTS
from gateway.protos import ext_proc_pb2 as wire
from kvindex.log import frames

log = structlog.get_logger(__name__)

_ROUTED, _REFUSED, _FAILED = map(REQUESTS.labels, ("routed", "refused", "failed"))
_NO_PICK = Pick(wire.CommonResponse())
_CONTINUE_HEADERS = (wire.ProcessingResponse(request_headers=wire.HeadersResponse()),)
_CONTINUE_BODY = (wire.ProcessingResponse(request_body=wire.BodyResponse()),)
_CONTINUE_TRAILERS = (wire.ProcessingResponse(request_trailers=wire.TrailersResponse()),)
_CONTINUE_RESPONSE_TRAILERS = (wire.ProcessingResponse(response_trailers=wire.TrailersResponse()),)

_READ_MODES = (wire.BUFFERED, wire.STREAMED, wire.FULL_DUPLEX_STREAMED)


@dataclass(slots=True)
class _Response:
    """A response whose body passes through here, and which is therefore measured here."""

    started_s: float
    request_bytes: int
    status: int
    served_by: str | None
    num_bytes: int = 0
    ttft_ms: float | None = None

    def add(self, num_bytes: int) -> None:
        if num_bytes and self.ttft_ms is None:
            self.ttft_ms = self._elapsed_ms()
        self.num_bytes += num_bytes

    def served(self, decision_id: str, end: End) -> Served:
        return Served(
            decision_id,
            status=self.status,
            worker=self.served_by,
            ttft_ms=self.ttft_ms,
            duration_ms=self._elapsed_ms(),
            request_bytes=self.request_bytes,
            response_bytes=self.num_bytes,
            end=end,
        )

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self.started_s) * 1000


class _Stage(enum.Enum):
    """How far the request has been told."""

    HEADERS = enum.auto()
    BODY = enum.auto()
    WHOLE = enum.auto()
    """And decided."""
    REFUSED = enum.auto()
    """What the proxy had sent before it knew is ignored."""


class Session:
    """Answers the messages of one ext_proc stream, which is one HTTP request.

    The router admits the request at its headers and decides once it is whole. BUFFERED bodies come in
    one message, and every message gets one answer. FULL_DUPLEX_STREAMED bodies come in chunks; nothing
    is answered before the decision, and the body is sent back then. `finish` must be called at the end,
    whatever happened.
    """

    def __init__(self, router: Router, *, max_body_bytes: int) -> None:
        self._router = router
        self._max_body_bytes = max_body_bytes
        self._stage = _Stage.HEADERS
        self._decision: Decision | None = None
        self._headers: dict[str, str] = {}
        self._candidates: frozenset[str] | None = None
        self._chunks: list[bytes] = []
        self._num_body_bytes = 0
        self._request_mode: wire.BodySendMode = wire.NONE
        self._response_mode: wire.BodySendMode = wire.NONE
        self._response_ended = False
        self._started_s = time.perf_counter()
        self._response: _Response | None = None

    async def answer(self, message: wire.ProcessingRequest) -> Iterable[wire.ProcessingResponse]:
        """Return the answers to `message`, in order; none after a refusal.

        Raises:
            ProtocolViolation: the message has no place here.
        """
        answers: Iterable[wire.ProcessingResponse] = ()
        if self._stage is _Stage.REFUSED:
            return answers
        try:
            match message.WhichOneof("request"):
                case "request_headers":
                    answers = await self._request_headers(message)
                case "request_body":
                    answers = await self._request_body(message.request_body)
                case "request_trailers":
                    answers = await self._request_trailers()
                case "response_headers":
                    answers = self._response_headers(message)
                case "response_body":
                    answers = self._response_body(message.response_body)
                case "response_trailers":
                    self._response_ended = True
                    answers = _CONTINUE_RESPONSE_TRAILERS
                case unknown:
                    raise ProtocolViolation(f"an ext_proc message of kind {unknown}")
        except RequestError as error:
            self._stage = _Stage.REFUSED
            _REFUSED.inc()
            answers = (messages.refusal(error),)
        return answers

    async def finish(self) -> None:
        """Settle the decision, if there is one; the stream has ended, and nobody knows from its end how."""
        if self._decision is not None:
            end = End.COMPLETE if self._response_ended else End.ABORTED
            if self._response is not None:
                self._router.record(self._response.served(self._decision.decision_id, end))
            await self._router.finish(self._decision.decision_id, end)

    @property
    def _is_duplex(self) -> bool:
        return self._request_mode == wire.FULL_DUPLEX_STREAMED

    async def _request_headers(self, message: wire.ProcessingRequest) -> Iterable[wire.ProcessingResponse]:
        self._expect(_Stage.HEADERS, "request headers")
        self._stage = _Stage.BODY
        self._headers = messages.read_headers(message.request_headers)
        self._candidates = messages.read_subset(message)
        self._request_mode = message.protocol_config.request_body_mode
        self._response_mode = message.protocol_config.response_body_mode
        self._router.admit(self._request())
        if message.request_headers.end_of_stream:
            return (_headers_answer(await self._decide()),)
        if self._request_mode not in _READ_MODES:
            mode = wire.BodySendMode.Name(self._request_mode)
            raise ProtocolViolation(
                f"request_body_mode {mode}: whole bodies are needed, set BUFFERED or FULL_DUPLEX_STREAMED"
            )
        return () if self._is_duplex else _CONTINUE_HEADERS

    async def _request_body(self, message: wire.HttpBody) -> Iterable[wire.ProcessingResponse]:
        # Envoy may send the last chunk again (1.35 to 1.40, envoyproxy/envoy#46237).
        if self._is_duplex and self._stage is _Stage.WHOLE:
            return ()
        self._expect(_Stage.BODY, "a request body")
        self._num_body_bytes += len(message.body)
        if self._num_body_bytes > self._max_body_bytes:
            raise RequestError(413, f"The request body is larger than {self._max_body_bytes} bytes.")
        self._chunks.append(message.body)
        if self._is_duplex:
            return self._duplex_answer(await self._decide()) if message.end_of_stream else ()
        # A buffered body is whole even where trailers follow and the stream has not ended.
        if message.end_of_stream or self._request_mode != wire.STREAMED:
            return (_body_answer(await self._decide()),)
        return _CONTINUE_BODY

    async def _request_trailers(self) -> Iterable[wire.ProcessingResponse]:
        if not self._is_duplex:
            return _CONTINUE_TRAILERS
        self._expect(_Stage.BODY, "request trailers")
        return chain(self._duplex_answer(await self._decide(), trailers_follow=True), _CONTINUE_TRAILERS)

    def _duplex_answer(
        self, pick: Pick, *, trailers_follow: bool = False
    ) -> Iterator[wire.ProcessingResponse]:
        yield _headers_answer(pick)
        body = b"".join(self._chunks) if pick.body is None else pick.body
        self._chunks.clear()
        for change in messages.body_chunks(body, end_of_stream=not trailers_follow):
            yield wire.ProcessingResponse(request_body=wire.BodyResponse(response=change))

    def _response_headers(self, message: wire.ProcessingRequest) -> Iterable[wire.ProcessingResponse]:
        # Where the body stays with Envoy, its end is out of sight; the access log tells it.
        is_hidden = self._response_mode == wire.NONE
        self._response_ended = message.response_headers.end_of_stream or is_hidden
        if not is_hidden:
            self._response = _Response(
                started_s=self._started_s,
                request_bytes=self._num_body_bytes,
                status=messages.read_status(message.response_headers),
                served_by=messages.read_served(message),
            )
        change = wire.CommonResponse()
        if self._decision is not None:
            change.header_mutation.CopyFrom(messages.header_mutation(self._decision.response_headers))
        return (wire.ProcessingResponse(response_headers=wire.HeadersResponse(response=change)),)

    def _response_body(self, message: wire.HttpBody) -> Iterator[wire.ProcessingResponse]:
        self._response_ended = message.end_of_stream
        if self._response is not None:
            self._response.add(len(message.body))
        changes: Iterable[wire.CommonResponse] = (wire.CommonResponse(),)
        if self._response_mode == wire.FULL_DUPLEX_STREAMED:
            changes = messages.body_chunks(message.body, end_of_stream=message.end_of_stream)
        for change in changes:
            yield wire.ProcessingResponse(response_body=wire.BodyResponse(response=change))

    def _expect(self, stage: _Stage, what: str) -> None:
        if self._stage is not stage:
            raise ProtocolViolation(f"{what} where the request is at {self._stage.name}")

    def _request(self) -> HttpRequest:
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        return messages.http_request(self._headers, body, self._candidates)

    async def _decide(self) -> Pick:
        self._stage = _Stage.WHOLE
        started_s = time.perf_counter()
        try:
            self._decision = await self._router.decide(self._request())
        except RequestError:
            raise
        except DEFECTS as error:
            path = self._headers.get(":path", "").partition("?")[0]
            log.error(
                "request passes without a pick", path=path, error=type(error).__name__, at=frames(error)
            )
            _FAILED.inc()
            return _NO_PICK
        finally:
            HANDLING_SECONDS.observe(time.perf_counter() - started_s)
        _ROUTED.inc()
        return messages.pick(self._decision)


def _headers_answer(pick: Pick) -> wire.ProcessingResponse:
    return wire.ProcessingResponse(
        request_headers=wire.HeadersResponse(response=pick.change), dynamic_metadata=pick.metadata
    )


def _body_answer(pick: Pick) -> wire.ProcessingResponse:
    if pick.body is not None:
        pick.change.body_mutation.body = pick.body
    return wire.ProcessingResponse(
        request_body=wire.BodyResponse(response=pick.change), dynamic_metadata=pick.metadata
    )
