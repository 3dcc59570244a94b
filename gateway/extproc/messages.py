"""What ext_proc says on the wire, to and from the router's own values. Pure.

Source: Gateway API Inference Extension, proposal 004 (endpoint picker protocol), and Envoy 1.40
`envoy/service/ext_proc/v3/external_processor.proto`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from google.protobuf.struct_pb2 import Struct, Value

from gateway.decision import Decision, HttpRequest
from gateway.errors import RequestError
from gateway.protos import core_pb2 as core
from gateway.protos import ext_proc_pb2 as wire

PICK_KEY = "x-gateway-destination-endpoint"
"""Names the pick, in the dynamic metadata under `envoy.lb` and as a request header."""

PICK_NAMESPACE = "envoy.lb"

SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET_KEY = "x-gateway-destination-endpoint-subset"

SERVED_KEY = "x-gateway-destination-endpoint-served"
"""Names who served, in the metadata under `envoy.lb` that comes with the response."""

REFUSAL_DETAILS = "kvlane_refused"
"""Marks our refusals in Envoy's response code details, so that it leaves their body alone."""

CHUNK_BYTES = 64 << 10
"""Largest body chunk that Envoy should be sent back."""


class Pick(NamedTuple):
    """What changes about a request, and the dynamic metadata that routes it."""

    change: wire.CommonResponse
    metadata: Struct | None = None
    body: bytes | None = None
    """In place of the client's; None: as it came."""


_OVERWRITE = core.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


def read_headers(message: wire.HttpHeaders) -> dict[str, str]:
    """Return the headers by lower-case name, pseudo-headers (`:path`) among them; the last of equals wins."""
    # Envoy fills raw_value; value is what older proxies fill.
    return {
        header.key: header.raw_value.decode("latin-1") if header.raw_value else header.value
        for header in message.headers.headers
    }


def read_subset(message: wire.ProcessingRequest) -> frozenset[str] | None:
    """Return the endpoints that the proxy allows, or None where it does not restrict them."""
    metadata = message.metadata_context.filter_metadata
    if SUBSET_NAMESPACE not in metadata or SUBSET_KEY not in metadata[SUBSET_NAMESPACE].fields:
        return None
    hint = metadata[SUBSET_NAMESPACE].fields[SUBSET_KEY]
    listed = [item.string_value for item in hint.list_value.values] or hint.string_value.split(",")
    return frozenset(address.strip() for address in listed if address.strip())


def read_served(message: wire.ProcessingRequest) -> str | None:
    """Return the endpoint that served the request, where the proxy tells it."""
    metadata = message.metadata_context.filter_metadata
    if PICK_NAMESPACE not in metadata or SERVED_KEY not in metadata[PICK_NAMESPACE].fields:
        return None
    return metadata[PICK_NAMESPACE].fields[SERVED_KEY].string_value or None


def read_status(message: wire.HttpHeaders) -> int:
    """Return the status of a response; 0 where there is none."""
    for header in message.headers.headers:
        if header.key == ":status":
            return int(header.raw_value or header.value)
    return 0


def http_request(headers: dict[str, str], body: bytes, candidates: frozenset[str] | None) -> HttpRequest:
    """Return the request that these parts make."""
    return HttpRequest(
        method=headers.get(":method", ""),
        path=headers.get(":path", ""),
        headers=headers,
        body=body,
        candidates=candidates,
    )


def header_mutation(headers: Mapping[str, str], remove: Iterable[str] = ()) -> wire.HeaderMutation:
    """Return the mutation that sets these headers in place of what stood there, and removes others."""
    return wire.HeaderMutation(
        remove_headers=remove,
        set_headers=[
            core.HeaderValueOption(
                header=core.HeaderValue(key=key, raw_value=value.encode("latin-1", "replace")),
                append_action=_OVERWRITE,
            )
            for key, value in headers.items()
        ],
    )


def pick(decision: Decision) -> Pick:
    """Return the decision as a change of the request and as dynamic metadata."""
    destinations = ",".join(decision.destinations)
    headers = {PICK_KEY: destinations, **decision.request_headers}
    if decision.body is not None:
        headers["content-length"] = str(len(decision.body))
    change = wire.CommonResponse(header_mutation=header_mutation(headers, decision.removed_headers))
    picked = Struct(fields={PICK_KEY: Value(string_value=destinations)})
    metadata = Struct(fields={PICK_NAMESPACE: Value(struct_value=picked)})
    return Pick(change, metadata, decision.body)


def refusal(error: RequestError) -> wire.ProcessingResponse:
    """Return the answer that goes to the client in the engine's place."""
    headers = {"content-type": "application/json"}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return wire.ProcessingResponse(
        immediate_response=wire.ImmediateResponse(
            status=wire.HttpStatus(code=error.status),
            headers=header_mutation(headers),
            body=error.body(),
            details=REFUSAL_DETAILS,
        )
    )


def body_chunks(body: bytes, *, end_of_stream: bool) -> Iterator[wire.CommonResponse]:
    """Yield the body as the chunks that FULL_DUPLEX_STREAMED sends back; an end without bytes is one too."""
    for start in range(0, len(body) or int(end_of_stream), CHUNK_BYTES):
        end = start + CHUNK_BYTES
        last = end_of_stream and end >= len(body)
        chunk = wire.StreamedBodyResponse(body=body[start:end], end_of_stream=last)
        yield wire.CommonResponse(body_mutation=wire.BodyMutation(streamed_response=chunk))
