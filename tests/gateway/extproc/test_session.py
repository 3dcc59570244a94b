import json

import pytest
from structlog.testing import capture_logs

from gateway.decision import End
from gateway.errors import ProtocolViolation, RequestError
from gateway.extproc.messages import CHUNK_BYTES, PICK_KEY
from gateway.extproc.metrics import REQUESTS
from gateway.extproc.session import Session
from gateway.protos import ext_proc_pb2 as wire
from tests.support import extproc
from tests.support.envoy import ScriptedRouter

WORKERS = ("10.0.0.1:8000", "[fd00::2]:8000")
PICK = ",".join(WORKERS)
DUPLEX = wire.FULL_DUPLEX_STREAMED


@pytest.fixture
def router():
    return ScriptedRouter(WORKERS)


@pytest.fixture
def session(router):
    return Session(router, max_body_bytes=1 << 20)


async def answers(session, *messages):
    """Return every answer to the messages, in order."""
    return [answer for message in messages for answer in await session.answer(message)]


def metadata_pick(answer):
    return answer.dynamic_metadata["envoy.lb"][PICK_KEY]


async def test_buffered_request_is_decided_at_its_body(session, router):
    first, second = await answers(session, extproc.request_headers(x_tag="é"), extproc.request_body(b"{}"))
    assert first == wire.ProcessingResponse(request_headers=wire.HeadersResponse())
    assert metadata_pick(second) == PICK
    change = second.request_body.response
    assert extproc.headers_set(change.header_mutation) == {
        PICK_KEY: PICK,
        "x-request-id": "id-kv0000000000000001",
    }
    assert not change.HasField("body_mutation")
    (request,) = router.requests
    assert (request.method, request.path, request.body) == ("POST", "/v1/completions", b"{}")
    assert request.candidates is None
    assert request.headers["x-tag"].encode("latin-1").decode() == "é"


async def test_request_without_body_is_decided_at_its_headers(session, router):
    (answer,) = await answers(session, extproc.request_headers("GET", "/v1/models", end_of_stream=True))
    assert answer.WhichOneof("response") == "request_headers"
    assert metadata_pick(answer) == PICK
    assert router.requests[0].body == b""


async def test_buffered_body_before_trailers_is_whole(session, router):
    body = extproc.request_body(b"{}", end_of_stream=False)
    *_, decided, trailers = await answers(
        session, extproc.request_headers(), body, extproc.request_trailers()
    )
    assert metadata_pick(decided) == PICK
    assert trailers.WhichOneof("response") == "request_trailers"
    assert len(router.requests) == 1


async def test_streamed_body_is_decided_at_its_end(session, router):
    parts = [extproc.request_body(b"ab", end_of_stream=False), extproc.request_body(b"cd")]
    *_, first, last = await answers(session, extproc.request_headers(mode=wire.STREAMED), *parts)
    assert first == wire.ProcessingResponse(request_body=wire.BodyResponse())
    assert metadata_pick(last) == PICK
    assert router.requests[0].body == b"abcd"


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES])
async def test_duplex_body_comes_back_behind_the_decision(session, router, size):
    body = bytes(index % 251 for index in range(size))
    parts = [extproc.request_body(body[at : at + 1000], end_of_stream=False) for at in range(0, size, 1000)]
    early = await answers(session, extproc.request_headers(mode=DUPLEX), *parts)
    assert early == []
    head, *chunks = await answers(session, extproc.request_body(b"", end_of_stream=True))
    assert head.WhichOneof("response") == "request_headers"
    assert metadata_pick(head) == PICK
    sent = [chunk.request_body.response.body_mutation.streamed_response for chunk in chunks]
    assert b"".join(part.body for part in sent) == router.requests[0].body == body
    assert max(len(part.body) for part in sent) <= CHUNK_BYTES
    assert [part.end_of_stream for part in sent] == [False] * (len(sent) - 1) + [True]


async def test_duplex_trailers_end_the_request(session, router):
    head, chunk, trailers = await answers(
        session,
        extproc.request_headers(mode=DUPLEX),
        extproc.request_body(b"{}", end_of_stream=False),
        extproc.request_trailers(),
    )
    assert metadata_pick(head) == PICK
    assert chunk.request_body.response.body_mutation.streamed_response == wire.StreamedBodyResponse(
        body=b"{}"
    )
    assert trailers.WhichOneof("response") == "request_trailers"


async def test_duplex_request_may_have_trailers_and_no_body(session):
    found = await answers(session, extproc.request_headers(mode=DUPLEX), extproc.request_trailers())
    assert [answer.WhichOneof("response") for answer in found] == ["request_headers", "request_trailers"]


async def test_duplex_response_comes_back_as_it_is(session):
    await answers(
        session,
        extproc.request_headers(mode=DUPLEX, response_mode=DUPLEX),
        extproc.request_body(b"{}"),
    )
    big = b"x" * (CHUNK_BYTES + 1)
    head, *chunks = await answers(
        session,
        extproc.response_headers(),
        extproc.response_body(big, end_of_stream=False),
        extproc.response_body(b"", end_of_stream=True),
    )
    assert (
        extproc.headers_set(head.response_headers.response.header_mutation)["x-kvlane-worker"] == WORKERS[0]
    )
    sent = [chunk.response_body.response.body_mutation.streamed_response for chunk in chunks]
    assert [len(part.body) for part in sent] == [CHUNK_BYTES, 1, 0]
    assert [part.end_of_stream for part in sent] == [False, False, True]


@pytest.mark.parametrize("hint", ["10.0.0.1:8000, 10.0.0.2:8000,", ["10.0.0.1:8000", "10.0.0.2:8000"]])
async def test_subset_hint_limits_the_candidates(session, router, hint):
    message = extproc.request_headers()
    namespace = message.metadata_context.filter_metadata["envoy.lb.subset_hint"]
    namespace.update({"x-gateway-destination-endpoint-subset": hint})
    await answers(session, message, extproc.request_body(b"{}"))
    assert router.requests[0].candidates == {"10.0.0.1:8000", "10.0.0.2:8000"}


async def test_empty_subset_allows_nobody(session, router):
    message = extproc.request_headers()
    message.metadata_context.filter_metadata["envoy.lb.subset_hint"].update(
        {"x-gateway-destination-endpoint-subset": []}
    )
    await answers(session, message, extproc.request_body(b"{}"))
    assert router.requests[0].candidates == frozenset()


@pytest.mark.parametrize("mode", [wire.BUFFERED, DUPLEX])
async def test_refusal_is_an_openai_error(session, router, mode):
    async def refuse(_):
        raise RequestError(503, "No worker.", kind="ServiceUnavailableError", retry_after_s=3)

    router.script = refuse
    *_, answer = await answers(session, extproc.request_headers(mode=mode), extproc.request_body(b"{}"))
    reply = answer.immediate_response
    assert reply.status.code == 503
    assert json.loads(reply.body)["error"] == {
        "message": "No worker.",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
    assert extproc.headers_set(reply.headers) == {"content-type": "application/json", "retry-after": "3"}
    await session.finish()
    assert router.finished == []


@pytest.mark.parametrize("mode", [wire.BUFFERED, DUPLEX])
async def test_body_over_the_limit_is_refused(router, mode):
    session = Session(router, max_body_bytes=10)
    parts = [extproc.request_body(b"x" * 6, end_of_stream=False), extproc.request_body(b"x" * 6)]
    messages = parts if mode == DUPLEX else [extproc.request_body(b"x" * 11)]
    *_, answer = await answers(session, extproc.request_headers(mode=mode), *messages)
    assert answer.immediate_response.status.code == 413
    assert router.requests == []


@pytest.mark.parametrize("mode", [wire.BUFFERED, DUPLEX])
async def test_defect_of_the_router_costs_only_the_pick(session, router, mode):
    async def fail(_):
        raise KeyError("defect")

    router.script = fail
    before = REQUESTS.labels("failed")._value.get()
    found = await answers(session, extproc.request_headers(mode=mode), extproc.request_body(b"{}"))
    assert REQUESTS.labels("failed")._value.get() == before + 1
    assert all(not answer.HasField("dynamic_metadata") for answer in found)
    assert found[-1].WhichOneof("response") == "request_body"
    (head,) = await answers(session, extproc.response_headers())
    assert head.response_headers.response == wire.CommonResponse()
    await session.finish()
    assert router.finished == []


async def test_a_defect_is_logged_without_its_message(session, router):
    async def fail(_):
        raise KeyError("what the client wrote")

    router.script = fail
    with capture_logs() as lines:
        await answers(session, extproc.request_headers(), extproc.request_body(b"{}"))
    assert lines[0]["error"] == "KeyError"
    assert "what the client wrote" not in str(lines)


@pytest.mark.parametrize(
    ("response", "end"),
    [
        ([], End.ABORTED),
        ([extproc.response_headers()], End.COMPLETE),
    ],
)
async def test_request_without_response_was_aborted(session, router, response, end):
    await answers(session, extproc.request_headers(), extproc.request_body(b"{}"), *response)
    await session.finish()
    assert router.finished == [("0000000000000001", end)]


@pytest.mark.parametrize(("ended", "end"), [(False, End.ABORTED), (True, End.COMPLETE)])
async def test_duplex_response_tells_its_end(session, router, ended, end):
    await answers(
        session,
        extproc.request_headers(mode=DUPLEX, response_mode=DUPLEX),
        extproc.request_body(b"{}"),
        extproc.response_headers(),
        extproc.response_body(b"x", end_of_stream=ended),
    )
    await session.finish()
    assert router.finished == [("0000000000000001", end)]


async def test_nothing_is_settled_before_the_decision(session, router):
    await answers(session, extproc.request_headers())
    await session.finish()
    assert router.finished == []


@pytest.mark.parametrize("mode", [wire.BUFFERED, DUPLEX])
async def test_router_may_change_the_body_and_take_headers_away(session, router, mode):
    router.body = b"x" * (CHUNK_BYTES + 1)
    found = await answers(session, extproc.request_headers(mode=mode), extproc.request_body(b"{}"))
    if mode == DUPLEX:
        head, *chunks = found
        mutation = head.request_headers.response.header_mutation
        sent = [chunk.request_body.response.body_mutation.streamed_response for chunk in chunks]
        assert [len(part.body) for part in sent] == [CHUNK_BYTES, 1]
    else:
        change = found[-1].request_body.response
        mutation = change.header_mutation
        assert change.body_mutation.body == router.body
    assert extproc.headers_set(mutation)["content-length"] == str(CHUNK_BYTES + 1)
    assert list(mutation.remove_headers) == ["authorization"]


@pytest.mark.parametrize("mode", [wire.BUFFERED, DUPLEX])
async def test_request_that_is_not_admitted_is_refused_before_its_body(session, router, mode):
    router.refusal = RequestError(401, "Who are you?", kind="AuthenticationError")
    (answer,) = await answers(session, extproc.request_headers(mode=mode))
    assert answer.immediate_response.status.code == 401
    assert router.requests == []


async def test_last_chunk_that_envoy_sends_again_changes_nothing(session, router):
    first = await answers(session, extproc.request_headers(mode=DUPLEX), extproc.request_body(b"{}"))
    assert await answers(session, extproc.request_body(b"{}"), extproc.request_body(b"")) == []
    assert len(first) == 2
    assert len(router.requests) == 1


HEAD, DUPLEX_HEAD = extproc.request_headers(), extproc.request_headers(mode=DUPLEX)
WHOLE, PART = extproc.request_body(b"{}"), extproc.request_body(b"{", end_of_stream=False)


@pytest.mark.parametrize(
    "sent",
    [
        [wire.ProcessingRequest()],
        [WHOLE],
        [HEAD, HEAD],
        [HEAD, WHOLE, WHOLE],
        [HEAD, PART, WHOLE],
        [DUPLEX_HEAD, WHOLE, extproc.request_trailers()],
        [extproc.request_headers(mode=wire.NONE)],
        [extproc.request_headers(mode=wire.BUFFERED_PARTIAL)],
    ],
)
async def test_messages_out_of_place_decide_nothing_twice(session, router, sent):
    *placed, misplaced = sent
    await answers(session, *placed)
    with pytest.raises(ProtocolViolation):
        await session.answer(misplaced)
    await session.finish()
    assert len(router.finished) == len(router.requests) <= 1
