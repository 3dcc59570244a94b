"""ext_proc messages as Envoy sends them, and a client that speaks them to a server without Envoy."""

import grpc

from gateway.protos import core_pb2 as core
from gateway.protos import ext_proc_pb2 as wire

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"


def request_headers(
    method: str = "POST",
    path: str = "/v1/completions",
    *,
    mode: wire.BodySendMode = wire.BUFFERED,
    response_mode: wire.BodySendMode = wire.NONE,
    end_of_stream: bool = False,
    **headers: str,
) -> wire.ProcessingRequest:
    named = {":method": method, ":path": path} | {k.replace("_", "-"): v for k, v in headers.items()}
    pairs = [core.HeaderValue(key=key, raw_value=value.encode()) for key, value in named.items()]
    return wire.ProcessingRequest(
        request_headers=wire.HttpHeaders(headers=core.HeaderMap(headers=pairs), end_of_stream=end_of_stream),
        protocol_config=wire.ProtocolConfiguration(request_body_mode=mode, response_body_mode=response_mode),
    )


def request_body(body: bytes, *, end_of_stream: bool = True) -> wire.ProcessingRequest:
    return wire.ProcessingRequest(request_body=wire.HttpBody(body=body, end_of_stream=end_of_stream))


def request_trailers() -> wire.ProcessingRequest:
    return wire.ProcessingRequest(request_trailers=wire.HttpTrailers())


def response_headers(*, end_of_stream: bool = False) -> wire.ProcessingRequest:
    return wire.ProcessingRequest(response_headers=wire.HttpHeaders(end_of_stream=end_of_stream))


def response_body(body: bytes, *, end_of_stream: bool) -> wire.ProcessingRequest:
    return wire.ProcessingRequest(response_body=wire.HttpBody(body=body, end_of_stream=end_of_stream))


def process(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall:
    """Open an ext_proc stream."""
    return channel.stream_stream(
        METHOD,
        request_serializer=wire.ProcessingRequest.SerializeToString,
        response_deserializer=wire.ProcessingResponse.FromString,
    )()


def headers_set(mutation: wire.HeaderMutation) -> dict[str, str]:
    return {each.header.key: each.header.raw_value.decode() for each in mutation.set_headers}
