import httpx
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.wrappers_pb2 import UInt32Value
from starlette.responses import PlainTextResponse

from gateway.access_log import read_entry
from gateway.decision import End, Served
from gateway.protos import access_log_pb2 as wire
from gateway.protos import core_pb2 as core
from tests.support.envoy import KnownEndpoints, ScriptedRouter, Stack, serve
from tests.support.waiting import eventually


def entry(decision_id="d", *, ttft_us="1500", address="10.0.0.1", flags=None):
    return wire.HTTPAccessLogEntry(
        common_properties=wire.AccessLogCommon(
            upstream_remote_address=core.Address(
                socket_address=address and core.SocketAddress(address=address, port_value=8000)
            ),
            response_flags=flags,
            custom_tags={"ttft_us": ttft_us},
            duration=Duration(seconds=2, nanos=500_000_000),
        ),
        request=wire.HTTPRequestProperties(request_body_bytes=11),
        response=wire.HTTPResponseProperties(
            response_code=UInt32Value(value=200),
            response_body_bytes=22,
            response_headers={"x-kvlane-decision": decision_id},
        ),
    )


def test_everything_measured_is_read():
    assert read_entry(entry()) == Served(
        decision_id="d",
        status=200,
        worker="10.0.0.1:8000",
        ttft_ms=1.5,
        duration_ms=2500.0,
        request_bytes=11,
        response_bytes=22,
        end=End.COMPLETE,
    )


def test_what_was_not_measured_is_none():
    served = read_entry(entry(ttft_us="-", address=None))
    assert (served.ttft_ms, served.worker) == (None, None)
    assert read_entry(entry(address="fd00::1")).worker == "[fd00::1]:8000"


@pytest.mark.parametrize("flag", [field.name for field in wire.ResponseFlags.DESCRIPTOR.fields])
def test_response_that_broke_off_is_aborted(flag):
    assert read_entry(entry(flags=wire.ResponseFlags(**{flag: True}))).end == End.ABORTED


def test_request_without_decision_is_no_business_of_the_router():
    assert read_entry(entry(decision_id="")) is None


@pytest.mark.envoy
async def test_envoy_reports_what_it_measured(tmp_path):
    async def answer(request):
        await request.body()
        return PlainTextResponse("x" * 1000)

    router = ScriptedRouter()
    async with serve(answer) as worker:
        router.destinations = (worker,)
        running = Stack(tmp_path, router, KnownEndpoints(worker))
        async with running.run(), httpx.AsyncClient() as client:
            response = await client.post(running.url, content=b"y" * 100)
            await eventually(lambda: router.served)
    (served,) = router.served
    assert served.decision_id == response.headers["x-kvlane-decision"]
    assert (served.status, served.worker, served.end) == (200, worker, End.COMPLETE)
    assert (served.request_bytes, served.response_bytes) == (100, 1000)
    assert 0 < served.ttft_ms <= served.duration_ms < 10_000
