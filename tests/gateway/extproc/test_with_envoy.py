"""The picker behind a real Envoy: what clients, workers and the router see."""

import asyncio
import contextlib

import httpx
import pytest
from starlette.responses import JSONResponse, StreamingResponse

from connectors.bench.ports import free_ports
from gateway.decision import End
from gateway.envoy import LbPolicy
from gateway.errors import RequestError
from tests.support.envoy import KnownEndpoints, ScriptedRouter, Stack, serve
from tests.support.waiting import eventually

pytestmark = pytest.mark.envoy

BODY_LIMIT = 16 << 20


class Worker:
    """Answers with what it saw; `/sse` sends an event whenever a test lets it, `/wait` only then answers."""

    def __init__(self, name="worker"):
        self.name = name
        self.requests = []
        self.go = asyncio.Semaphore(0)
        self.disconnected = asyncio.Event()

    async def answer(self, request):
        body = await request.body()
        self.requests.append(request)
        if request.url.path == "/sse":
            return StreamingResponse(self.events(), media_type="text/event-stream")
        if request.url.path == "/wait":
            await self.go.acquire()
        return JSONResponse({"worker": self.name, "bytes": len(body), "headers": dict(request.headers)})

    async def events(self):
        for number in range(1000):
            await self.go.acquire()
            yield f"data: {number}\n\n"


@contextlib.asynccontextmanager
async def stack(tmp_path, *workers, change=lambda _: None, **options):
    """Yield gateway and Envoy over these workers; the first one is picked."""
    async with contextlib.AsyncExitStack() as exits:
        addresses = [await exits.enter_async_context(serve(worker.answer)) for worker in workers]
        router = ScriptedRouter(tuple(addresses[:1]))
        running = Stack(tmp_path, router, KnownEndpoints(*addresses))
        yield await exits.enter_async_context(running.run(change, **options))


def full_duplex(config):
    """Make the bootstrap that of a gateway that follows the endpoint picker protocol."""
    (chain,) = config["static_resources"]["listeners"][0]["filter_chains"]
    ext_proc = chain["filters"][0]["typed_config"]["http_filters"][0]["typed_config"]
    del ext_proc["message_timeout"]
    ext_proc["processing_mode"] = {
        "request_header_mode": "SEND",
        "request_body_mode": "FULL_DUPLEX_STREAMED",
        "request_trailer_mode": "SEND",
        "response_header_mode": "SEND",
        "response_body_mode": "FULL_DUPLEX_STREAMED",
        "response_trailer_mode": "SEND",
    }


@pytest.fixture(params=["buffered", "full_duplex"])
def change(request):
    return full_duplex if request.param == "full_duplex" else lambda _: None


async def test_request_goes_where_it_was_picked_for(tmp_path, change):
    first, second = Worker("first"), Worker("second")
    async with stack(tmp_path, first, second, change=change) as running, httpx.AsyncClient() as client:
        for worker, address in zip((first, second), running.endpoints.addresses, strict=True):
            running.router.destinations = (address,)
            for _ in range(4):
                response = await client.post(f"{running.url}/v1/completions", json={"prompt": "x"})
                assert response.json()["worker"] == worker.name
            assert response.headers["x-kvlane-worker"] == address
            assert response.headers["x-kvlane-decision"] == f"{len(running.router.requests):016x}"
            assert response.json()["headers"]["x-request-id"].endswith(
                "-kv" + f"{len(running.router.requests):016x}"
            )
        await eventually(lambda: len(running.router.finished) == 8)
        assert {end for _, end in running.router.finished} == {End.COMPLETE}


async def test_client_cannot_pick_a_worker(tmp_path):
    async with stack(tmp_path, Worker("first"), Worker("second")) as running, httpx.AsyncClient() as client:
        forged = {"x-gateway-destination-endpoint": running.endpoints.addresses[1]}
        response = await client.post(f"{running.url}/v1/completions", json={}, headers=forged)
        assert response.json()["worker"] == "first"
        assert response.json()["headers"]["x-gateway-destination-endpoint"] == running.endpoints.addresses[0]
        assert "x-gateway-destination-endpoint" not in running.router.requests[0].headers


async def test_next_in_the_list_is_tried_where_the_first_is_dead(tmp_path):
    async with stack(tmp_path, Worker("alive")) as running, httpx.AsyncClient() as client:
        (alive,) = running.endpoints.addresses
        dead = f"127.0.0.1:{free_ports(1)[0]}"
        await running.endpoints.set(alive, dead)
        await running.until_hosts(alive, dead)
        running.router.destinations = (dead, alive)
        for _ in range(10):
            response = await client.post(f"{running.url}/v1/completions", json={})
            assert (response.status_code, response.json()["worker"]) == (200, "alive")


async def test_refusal_reaches_the_client_as_it_is(tmp_path, change):
    async def refuse(_):
        raise RequestError(404, "The model `x` does not exist.", kind="NotFoundError", retry_after_s=9)

    async with stack(tmp_path, Worker(), change=change) as running, httpx.AsyncClient() as client:
        running.router.script = refuse
        response = await client.post(f"{running.url}/v1/completions", json={"model": "x"})
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/json"
        assert response.headers["retry-after"] == "9"
        error = {
            "message": "The model `x` does not exist.",
            "type": "NotFoundError",
            "param": None,
            "code": 404,
        }
        assert response.json() == {"error": error}


async def test_body_of_the_limit_passes_and_a_larger_one_is_413(tmp_path, change):
    async with stack(tmp_path, Worker(), change=change) as running, httpx.AsyncClient(timeout=30) as client:
        response = await client.post(f"{running.url}/v1/completions", content=b"x" * BODY_LIMIT)
        assert response.json()["bytes"] == BODY_LIMIT
        response = await client.post(f"{running.url}/v1/completions", content=b"x" * (BODY_LIMIT + 1))
        assert response.status_code == 413
        assert response.json()["error"]["code"] == 413
        assert str(BODY_LIMIT) in response.json()["error"]["message"]


@pytest.mark.parametrize("size", [0, 10, 300_000])
async def test_router_may_change_the_body_and_take_headers_away(tmp_path, change, size):
    worker = Worker()
    async with stack(tmp_path, worker, change=change) as running, httpx.AsyncClient() as client:
        running.router.body = b"y" * size
        response = await client.post(
            f"{running.url}/v1/completions", content=b"x" * 2000, headers={"authorization": "Bearer key"}
        )
        assert response.json()["bytes"] == size
        assert await worker.requests[0].body() == running.router.body
        assert "authorization" not in response.json()["headers"]
        assert running.router.requests[0].headers["authorization"] == "Bearer key"


async def test_request_that_is_not_admitted_ends_before_its_body(tmp_path, change):
    async with stack(tmp_path, Worker(), change=change) as running:
        running.router.refusal = RequestError(401, "Who are you?", kind="AuthenticationError")
        host, port = running.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"}}")
        assert answer.startswith(b"HTTP/1.1 401 Unauthorized")
        assert b"Who are you?" in answer
        writer.close()


async def test_http2_client_with_a_large_body(tmp_path, change):
    body = bytes(range(256)) * (8 << 10)
    async with (
        stack(tmp_path, Worker(), change=change) as running,
        httpx.AsyncClient(http1=False, http2=True, timeout=30) as client,
    ):
        response = await client.post(f"{running.url}/v1/completions", content=body)
        assert (response.http_version, response.json()["bytes"]) == ("HTTP/2", len(body))
        assert running.router.requests[0].body == body


async def send_trailers(url, body):
    """Send a chunked request with trailers and return the first line of the answer."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ntrailer: t\r\n\r\n"
    )
    for chunk in body:
        writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)
    writer.write(b"0\r\nt: 1\r\n\r\n")
    async with asyncio.timeout(10):
        line = await reader.readline()
    writer.close()
    return line


async def test_body_in_pieces_with_trailers(tmp_path, change):
    def trailers(config):
        change(config)
        http_of(config)["http_protocol_options"] = {"enable_trailers": True}
        # With retries, Envoy 1.40 itself sends a FULL_DUPLEX_STREAMED body that has trailers twice.
        (host,) = http_of(config)["route_config"]["virtual_hosts"]
        del host["routes"][0]["route"]["retry_policy"]

    worker = Worker()
    async with stack(tmp_path, worker, Worker(), change=trailers) as running:
        pieces = [b"a" * 1000, b"b" * 70_000, b"c"]
        assert await send_trailers(running.url, pieces) == b"HTTP/1.1 200 OK\r\n"
        assert running.router.requests[0].body == b"".join(pieces)
        assert await worker.requests[0].body() == b"".join(pieces)


async def test_what_the_proxy_says_of_endpoints_is_read(tmp_path):
    """An Envoy that tells the subset and who served, as a gateway with an InferencePool does."""

    def proxy(config):
        full_duplex(config)
        filters = http_of(config)["http_filters"]
        subset = {"x-gateway-destination-endpoint-subset": ["10.0.0.1:8000", "10.0.0.2:8000"]}
        filters.insert(
            0, metadata_filter("set_metadata", {"metadata": [metadata("envoy.lb.subset_hint", subset)]})
        )
        options = filters[1]["typed_config"]["metadata_options"]
        options["forwarding_namespaces"] = {"untyped": ["envoy.lb", "envoy.lb.subset_hint"]}
        served = {"x-gateway-destination-endpoint-served": "10.0.0.2:8000"}
        filters[1]["typed_config"]["metadata_options"] = options
        filters.append(filters.pop())
        filters.insert(1, metadata_filter("set_metadata", {"metadata": [metadata("envoy.lb", served)]}))

    async with stack(tmp_path, Worker(), change=proxy) as running, httpx.AsyncClient() as client:
        await client.post(f"{running.url}/v1/completions", json={})
        assert running.router.requests[0].candidates == {"10.0.0.1:8000", "10.0.0.2:8000"}
        await eventually(lambda: running.router.served)
        assert running.router.served[0].worker == "10.0.0.2:8000"
        assert running.router.served[0].ttft_ms > 0


def metadata(namespace, value):
    return {"metadata_namespace": namespace, "value": value, "allow_overwrite": True}


def metadata_filter(name, config):
    kind = "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config"
    return {"name": f"envoy.filters.http.{name}", "typed_config": {"@type": kind, **config}}


def http_of(config):
    (chain,) = config["static_resources"]["listeners"][0]["filter_chains"]
    return chain["filters"][0]["typed_config"]


async def test_gateway_that_is_not_ready_gets_no_request_while_another_is(tmp_path):
    async with contextlib.AsyncExitStack() as exits:
        worker = Worker()
        address = await exits.enter_async_context(serve(worker.answer))
        (tmp_path / "other").mkdir()
        ready = Stack(tmp_path, ScriptedRouter((address,)), KnownEndpoints(address))
        starting = Stack(tmp_path / "other", ScriptedRouter((address,)), KnownEndpoints(address))
        starting.opens = False
        await exits.enter_async_context(starting.serve_gateway())
        both = tuple(f"127.0.0.1:{each.gateway_port}" for each in (ready, starting))
        await exits.enter_async_context(ready.run(gateways=both))
        client = await exits.enter_async_context(httpx.AsyncClient())

        async def is_known():
            text = (await client.get(f"{ready.admin_url}/clusters")).text
            return text.count("kvlane_gateway::127.0.0.1") and "failed_active_hc" in text

        await eventually(is_known)
        for _ in range(10):
            response = await client.post(f"{ready.url}/v1/completions", json={})
            assert "x-kvlane-decision" in response.headers
        assert starting.router.requests == []


async def test_request_without_body_is_routed(tmp_path, change):
    async with (
        stack(tmp_path, Worker("first"), Worker(), change=change) as running,
        httpx.AsyncClient() as client,
    ):
        response = await client.get(f"{running.url}/v1/models")
        assert response.json()["worker"] == "first"
        assert (running.router.requests[0].method, running.router.requests[0].path) == ("GET", "/v1/models")


async def test_events_arrive_one_by_one(tmp_path, change):
    worker = Worker()
    async with stack(tmp_path, worker, change=change) as running, httpx.AsyncClient() as client:
        worker.go.release()  # httpx returns with the first bytes
        async with client.stream("POST", f"{running.url}/sse", json={}) as response:
            lines = response.aiter_lines()
            for number in range(5):
                async with asyncio.timeout(5):
                    assert await anext(lines) == f"data: {number}"
                assert await anext(lines) == ""
                worker.go.release()


async def test_client_that_leaves_while_the_body_is_sent_is_not_decided(tmp_path):
    async with stack(tmp_path, Worker()) as running:
        host, port = running.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        async with httpx.AsyncClient() as client:
            await client.get(f"{running.url}/v1/models")
        await eventually(lambda: len(running.router.finished) == 1)
        assert [request.method for request in running.router.requests] == ["GET"]


async def test_client_that_leaves_during_the_decision_frees_it(tmp_path, change):
    cancelled = asyncio.Event()

    async def hang(_):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with stack(tmp_path, Worker(), change=change) as running, httpx.AsyncClient() as client:
        running.router.script = hang
        with pytest.raises(httpx.ReadTimeout):
            await client.post(f"{running.url}/v1/completions", json={}, timeout=0.3)
        async with asyncio.timeout(5):
            await cancelled.wait()
        assert running.router.finished == []


async def test_client_that_leaves_before_the_response_aborts(tmp_path, change):
    async with stack(tmp_path, Worker(), change=change) as running, httpx.AsyncClient() as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(f"{running.url}/wait", json={}, timeout=0.5)
        await eventually(lambda: running.router.finished)
        await client.get(f"{running.url}/v1/models")
        await eventually(lambda: len(running.router.finished) == 2)
        assert running.router.finished[0] == ("0000000000000001", End.ABORTED)


async def test_client_that_leaves_a_response_settles_once_and_is_logged_as_aborted(tmp_path, change):
    worker = Worker()
    async with stack(tmp_path, worker, change=change) as running, httpx.AsyncClient() as client:
        worker.go.release()
        async with client.stream("POST", f"{running.url}/sse", json={}) as response:
            assert await anext(response.aiter_lines()) == "data: 0"
            assert running.router.finished == []
        await eventually(lambda: running.router.finished)
        await eventually(lambda: running.router.served)
        assert running.router.served[0].end == End.ABORTED
        assert len(running.router.finished) == 1


async def test_without_a_gateway_envoy_goes_on(tmp_path):
    async with stack(tmp_path, Worker("first"), Worker("second")) as running, httpx.AsyncClient() as client:
        await client.post(f"{running.url}/v1/completions", json={})
        await running.stop_gateway()
        answers = [await client.post(f"{running.url}/v1/completions", json={}) for _ in range(20)]
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["worker"] for answer in answers} == {"first", "second"}


async def test_request_in_the_gateways_hands_outlives_it(tmp_path):
    async def hang(_):
        await asyncio.sleep(3600)

    async with stack(tmp_path, Worker()) as running, httpx.AsyncClient(timeout=10) as client:
        running.router.script = hang
        request = asyncio.create_task(client.post(f"{running.url}/v1/completions", json={}))
        await eventually(lambda: running.router.requests)
        await running.stop_gateway()
        assert (await request).status_code == 200


async def test_slow_gateway_costs_the_pick_after_the_timeout(tmp_path):
    async def hang(_):
        await asyncio.sleep(3600)

    async with stack(tmp_path, Worker(), ext_proc_timeout_s=0.3) as running, httpx.AsyncClient() as client:
        running.router.script = hang
        response = await client.post(f"{running.url}/v1/completions", json={})
        assert (response.status_code, response.json()["bytes"]) == (200, 2)


async def test_defect_of_the_router_costs_only_the_pick(tmp_path, change):
    async def fail(_):
        raise KeyError("defect")

    async with stack(tmp_path, Worker(), change=change) as running, httpx.AsyncClient() as client:
        running.router.script = fail
        response = await client.post(f"{running.url}/v1/completions", json={})
        assert (response.status_code, response.json()["bytes"]) == (200, 2)


async def test_worker_that_dies_under_a_request_is_a_clear_error(tmp_path):
    async def die(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    server = await asyncio.start_server(die, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, stack(tmp_path, Worker()) as running, httpx.AsyncClient() as client:
        await running.endpoints.set(address)
        await running.until_hosts(address)
        running.router.destinations = (address,)
        response = await client.post(f"{running.url}/v1/completions", json={})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["message"].startswith("The worker went away before it answered")


async def test_without_a_worker_the_answer_is_503(tmp_path):
    async with stack(tmp_path, Worker()) as running, httpx.AsyncClient() as client:
        await running.endpoints.set()
        await running.until_hosts()
        response = await client.post(f"{running.url}/v1/completions", json={})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "ServiceUnavailableError"


async def test_without_ext_proc_requests_go_round_robin(tmp_path):
    async with (
        stack(
            tmp_path, Worker("first"), Worker("second"), ext_proc=False, lb_policy=LbPolicy.ROUND_ROBIN
        ) as running,
        httpx.AsyncClient() as client,
    ):
        answers = [await client.post(f"{running.url}/v1/completions", json={}) for _ in range(8)]
        names = [answer.json()["worker"] for answer in answers]
        assert names[::2] == names[:1] * 4
        assert names[1::2] == names[1:2] * 4
        assert names[0] != names[1]
        assert running.router.requests == []
