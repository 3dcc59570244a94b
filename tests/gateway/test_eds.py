import asyncio
import contextlib

import grpc
import httpx
import pytest
from starlette.responses import PlainTextResponse
from structlog.testing import capture_logs

from gateway.config import GatewayConfig
from gateway.eds import TYPE_URL, load_assignment
from gateway.envoy import bootstrap, to_yaml
from gateway.envoy_services import serve_envoy
from gateway.protos import discovery_pb2 as wire
from gateway.readiness import Readiness
from tests.support.envoy import KnownEndpoints, ScriptedRouter, Stack, run_envoy, serve
from tests.support.waiting import eventually

SERVICE = "/envoy.service.endpoint.v3.EndpointDiscoveryService"
CODEC = {
    "request_serializer": wire.DiscoveryRequest.SerializeToString,
    "response_deserializer": wire.DiscoveryResponse.FromString,
}


@contextlib.asynccontextmanager
async def connect(endpoints):
    config = GatewayConfig(listen="127.0.0.1:0", stop_grace_s=0)
    async with (
        serve_envoy(config, ScriptedRouter(), endpoints, Readiness()) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield channel


def subscribe(*clusters, nonce="", error=None):
    return wire.DiscoveryRequest(
        resource_names=clusters,
        response_nonce=nonce,
        type_url=TYPE_URL,
        error_detail=error and wire.Status(code=3, message=error),
    )


def addresses(response):
    """Return the addresses in the response, by cluster."""
    found = {}
    for resource in response.resources:
        assignment = wire.ClusterLoadAssignment.FromString(resource.value)
        sockets = [
            each.endpoint.address.socket_address
            for locality in assignment.endpoints
            for each in locality.lb_endpoints
        ]
        found[assignment.cluster_name] = [(socket.address, socket.port_value) for socket in sockets]
    return found


@contextlib.asynccontextmanager
async def stream(endpoints):
    async with connect(endpoints) as channel:
        call = channel.stream_stream(f"{SERVICE}/StreamEndpoints", **CODEC)()
        yield call
        call.cancel()


async def test_stream_sends_the_endpoints_and_every_change():
    endpoints = KnownEndpoints("10.0.0.1:8000")
    async with stream(endpoints) as call:
        await call.write(subscribe("workers"))
        response = await call.read()
        assert addresses(response) == {"workers": [("10.0.0.1", 8000)]}
        assert response.type_url == response.resources[0].type_url == TYPE_URL
        await call.write(subscribe("workers", nonce=response.nonce))
        await endpoints.set("10.0.0.1:8000", "[fd00::1]:9000")
        changed = await call.read()
        assert addresses(changed) == {"workers": [("10.0.0.1", 8000), ("fd00::1", 9000)]}
        assert changed.nonce != response.nonce
        await endpoints.set()
        assert addresses(await call.read()) == {"workers": []}


async def test_nothing_is_sent_before_the_fleet_is_known():
    endpoints = KnownEndpoints()
    async with stream(endpoints) as call:
        await call.write(subscribe("workers"))
        read = asyncio.ensure_future(call.read())
        assert not (await asyncio.wait({read}, timeout=0.2))[0]
        await endpoints.set("10.0.0.1:8000")
        assert addresses(await read) == {"workers": [("10.0.0.1", 8000)]}


async def test_another_cluster_is_answered_and_an_acknowledgement_is_not():
    async with stream(KnownEndpoints("10.0.0.1:8000")) as call:
        await call.write(subscribe("workers"))
        nonce = (await call.read()).nonce
        await call.write(subscribe("workers", nonce=nonce))
        await call.write(subscribe("workers", "others", nonce=nonce))
        assert addresses(await call.read()).keys() == {"workers", "others"}


async def test_refused_endpoints_are_logged_and_not_sent_again():
    endpoints = KnownEndpoints("10.0.0.1:8000")
    with capture_logs() as logs:
        async with stream(endpoints) as call:
            await call.write(subscribe("workers"))
            nonce = (await call.read()).nonce
            await call.write(subscribe("workers", nonce=nonce, error="malformed"))
            await eventually(lambda: logs)
            await endpoints.set("10.0.0.2:8000")
            assert addresses(await call.read()) == {"workers": [("10.0.0.2", 8000)]}
    assert logs[0]["reason"] == "malformed"


async def test_fetch_answers_once():
    async with connect(KnownEndpoints("10.0.0.1:8000")) as channel:
        fetch = channel.unary_unary(f"{SERVICE}/FetchEndpoints", **CODEC)
        assert addresses(await fetch(subscribe("workers"))) == {"workers": [("10.0.0.1", 8000)]}


@pytest.mark.parametrize("address", ["worker-1:8000", "10.0.0.1", "10.0.0.1:http"])
def test_what_envoy_would_refuse_is_left_out(address):
    with capture_logs() as logs:
        assignment = load_assignment("workers", [address, "10.0.0.2:8000"])
    (locality,) = assignment.endpoints
    assert [each.endpoint.address.socket_address.address for each in locality.lb_endpoints] == ["10.0.0.2"]
    assert logs[0]["address"] == address


@pytest.mark.envoy
async def test_envoy_follows_the_fleet(tmp_path):
    async def answer(_):
        return PlainTextResponse("answer")

    endpoints = KnownEndpoints()
    async with serve(answer) as first, serve(answer) as second:
        running = Stack(tmp_path, ScriptedRouter((first,)), endpoints)
        async with running.run(), httpx.AsyncClient() as client:
            assert (await client.post(running.url)).status_code == 503
            await endpoints.set(first, second)
            await running.until_hosts(first, second)
            assert (await client.post(running.url)).text == "answer"
            await endpoints.set(second)
            await running.until_hosts(second)
            await running.stop_gateway()
            assert (await client.post(running.url)).text == "answer"
            assert await running.known_hosts() == {second}


@pytest.mark.envoy
async def test_envoy_sends_nothing_new_to_a_worker_that_drains(tmp_path):
    begun, released = asyncio.Event(), asyncio.Event()

    async def slow(_):
        begun.set()
        await released.wait()
        return PlainTextResponse("slow")

    async def quick(_):
        return PlainTextResponse("quick")

    endpoints = KnownEndpoints()
    async with serve(slow) as first, serve(quick) as second:
        running = Stack(tmp_path, ScriptedRouter((first,)), endpoints)
        async with running.run(), httpx.AsyncClient(timeout=60) as client:
            await endpoints.set(first, second)
            await running.until_hosts(first, second)
            under_way = asyncio.create_task(client.post(running.url))
            await begun.wait()
            await endpoints.set(first, second, draining=frozenset({first}))
            await eventually(lambda: running.is_known_to_drain(first))
            # Envoy's own choice, since the gateway is gone.
            await running.stop_gateway()
            assert {(await client.post(running.url)).text for _ in range(10)} == {"quick"}
            released.set()
            assert (await under_way).text == "slow"


@pytest.mark.envoy
async def test_gateway_that_comes_late_is_found_soon(tmp_path):
    running = Stack(tmp_path, ScriptedRouter(), KnownEndpoints("127.0.0.1:1"))
    with run_envoy(to_yaml(bootstrap(running.options)), tmp_path):

        async def attempts():
            with contextlib.suppress(httpx.TransportError):
                return await running.stat("cluster.kvlane_gateway.upstream_cx_connect_fail") >= 6

        await eventually(attempts, 30)
        async with running.serve_gateway(), asyncio.timeout(3):
            await running.until_hosts("127.0.0.1:1")
