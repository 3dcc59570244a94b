"""Certificates of a running gateway, as its peers see them."""

import asyncio
import contextlib
import shutil
import ssl

import grpc
import httpx
import pytest
from starlette.responses import JSONResponse

from gateway import metrics
from gateway.config import GatewayConfig
from gateway.envoy import bootstrap
from gateway.envoy_services import serve_envoy
from gateway.probe import Unreachable, served_models, worker_client
from gateway.readiness import Readiness
from gateway.tls import kept_current
from kvindex.errors import ConfigError
from kvindex.tls import ClientTls, ServerTls
from tests.support import extproc
from tests.support.certificates import Authority
from tests.support.envoy import KnownEndpoints, ScriptedRouter, Stack, serve
from tests.support.waiting import eventually


@pytest.fixture
def authority(tmp_path):
    folder = tmp_path / "ca"
    folder.mkdir()
    return Authority(folder)


@pytest.fixture
def files(tmp_path, authority):
    """A certificate in files that a test replaces."""
    tls = ServerTls(cert=tmp_path / "tls.crt", key=tmp_path / "tls.key", client_ca=authority.cafile)
    install(authority.issue("first"), tls)
    return tls


def install(certificate, tls):
    """Put other files in the place of these, as a mounted secret does."""
    for source, target in ((certificate.certfile, tls.cert), (certificate.keyfile, tls.key)):
        staged = target.with_suffix(".new")
        shutil.copy(source, staged)
        staged.replace(target)


def client(authority, name="client"):
    own = authority.issue(name)
    return ClientTls(ca=authority.cafile, cert=own.certfile, key=own.keyfile)


def refusals():
    return metrics.CERTIFICATE_LOADS.labels("refused")._value.get()


async def shown(address, context):
    """Return the common name of the certificate that a server shows."""
    host, port = address.split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    certificate = writer.get_extra_info("peercert")
    writer.close()
    return dict(pair for pairs in certificate["subject"] for pair in pairs)["commonName"]


async def test_a_new_certificate_is_shown_and_a_bad_one_is_not(authority, files):
    async def hello(_):
        return JSONResponse({})

    context, mine = files.context(), client(authority).context()
    async with serve(hello, context) as address, kept_current(context, files, "a test", interval_s=0.01):
        assert await shown(address, mine) == "first"
        install(authority.issue("second"), files)

        async def is_second():
            return await shown(address, mine) == "second"

        await eventually(is_second)
        before = refusals()
        files.cert.write_text("no certificate")
        await eventually(lambda: refusals() == before + 1)
        assert await shown(address, mine) == "second"


def channel(port, tls):
    contents = tls.contents()
    credentials = grpc.ssl_channel_credentials(contents["ca"], contents.get("key"), contents.get("cert"))
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials)


async def picks(channel):
    """Say whether the gateway answers an ext_proc request on this channel."""
    call = extproc.process(channel)
    try:
        await call.write(extproc.request_headers("GET", "/v1/models", end_of_stream=True))
        answer = await call.read()
    except grpc.aio.AioRpcError:
        return False
    return answer is not grpc.aio.EOF and answer.HasField("request_headers")


@contextlib.asynccontextmanager
async def gateway(tls):
    readiness = Readiness()
    config = GatewayConfig(listen="127.0.0.1:0", tls=tls, stop_grace_s=0)
    endpoints = KnownEndpoints("10.0.0.1:8000")
    async with serve_envoy(config, ScriptedRouter(("10.0.0.1:8000",)), endpoints, readiness) as port:
        await readiness.open()
        yield port


async def test_the_port_for_envoy_lets_in_only_who_is_known_and_follows_its_files(authority, files, tmp_path):
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    mine = client(authority)
    async with gateway(files) as port:
        async with channel(port, mine) as known:
            assert await picks(known)
        async with channel(port, ClientTls(ca=authority.cafile)) as without:
            assert not await picks(without)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as plain:
            assert not await picks(plain)
        other = Authority(stranger)
        theirs = client(other)
        async with channel(port, theirs.model_copy(update={"ca": authority.cafile})) as unknown:
            assert not await picks(unknown)
        # A new certificate, of a new CA, for clients of the new one alone.
        shutil.copy(other.cafile, files.client_ca)
        install(other.issue("second"), files)
        async with channel(port, theirs) as known:
            assert await picks(known)
        mine_from_other = mine.model_copy(update={"ca": other.cafile})
        async with channel(port, mine_from_other) as old:
            assert not await picks(old)
        before = refusals()
        files.key.write_text("no key")
        async with channel(port, theirs) as known:
            assert await picks(known)
        assert refusals() == before + 1


async def test_a_wrong_certificate_ends_the_start(files):
    files.key.write_text("no key")
    with pytest.raises(ConfigError, match="no certificate and its key"):
        async with gateway(files):
            pass


async def test_workers_are_asked_by_https_and_shown_our_certificate(authority):
    async def models(_):
        return JSONResponse({"data": [{"id": "tiny"}]})

    own = authority.issue("worker")
    theirs = ServerTls(cert=own.certfile, key=own.keyfile, client_ca=authority.cafile)
    async with serve(models, theirs.context()) as address:
        async with worker_client(GatewayConfig(worker_tls=client(authority, "gateway"))) as http:
            (card,) = await served_models(http, address)
            assert card.id == "tiny"
        async with worker_client(GatewayConfig(worker_tls=ClientTls())) as http:
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await served_models(http, address)


def test_envoy_is_never_told_to_trust_any_certificate(tmp_path):
    stack = Stack(tmp_path, ScriptedRouter(), KnownEndpoints())
    for name in ("gateway_tls", "worker_tls"):
        with pytest.raises(ValueError, match="name the CA"):
            bootstrap(type(stack.options)(**{name: ClientTls()}))


@pytest.mark.envoy
@pytest.mark.parametrize("mutual", [False, True])
async def test_every_connection_of_envoy_can_be_tls(authority, tmp_path, mutual):
    async def answer(request):
        return JSONResponse({"body": (await request.body()).decode()})

    def server(name):
        own = authority.issue(name)
        return ServerTls(cert=own.certfile, key=own.keyfile, client_ca=authority.cafile if mutual else None)

    def dialer(name):
        return client(authority, name) if mutual else ClientTls(ca=authority.cafile)

    async with serve(answer, server("worker").context()) as worker:
        stack = Stack(tmp_path, ScriptedRouter((worker,)), KnownEndpoints(worker))
        stack.gateway_tls = server("gateway")
        stack.url = stack.url.replace("http:", "https:")
        options = {"tls": server("envoy"), "gateway_tls": dialer("dials"), "worker_tls": dialer("asks")}
        async with stack.run(**options, fail_open=False):
            async with httpx.AsyncClient(verify=dialer("me").context(), http2=True) as known:
                response = await known.post(f"{stack.url}/v1/completions", content=b"hello")
                assert (response.status_code, response.json()) == (200, {"body": "hello"})
                assert response.http_version == "HTTP/2"
                assert stack.router.requests[0].body == b"hello"
                await eventually(lambda: stack.router.served)  # the access log came, too
            strangers = [httpx.AsyncClient()]
            if mutual:
                strangers.append(httpx.AsyncClient(verify=ClientTls(ca=authority.cafile).context()))
            for stranger in strangers:
                async with stranger:
                    with pytest.raises((httpx.TransportError, ssl.SSLError)):
                        await stranger.post(f"{stack.url}/v1/completions", content=b"hello")
            async with httpx.AsyncClient() as plain:
                with pytest.raises(httpx.TransportError):
                    await plain.get(stack.url.replace("https:", "http:"))
        assert len(stack.router.requests) == 1


async def test_context_of_a_client_follows_its_files(authority, tmp_path):
    async def hello(_):
        return JSONResponse({})

    own = authority.issue("worker")
    server = ServerTls(cert=own.certfile, key=own.keyfile, client_ca=authority.cafile).context()
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    unknown = Authority(stranger).issue("unknown")
    tls = ClientTls(ca=authority.cafile, cert=tmp_path / "c.crt", key=tmp_path / "c.key")
    install(unknown, tls)
    context = tls.context()
    async with serve(hello, server) as address, kept_current(context, tls, "a test", interval_s=0.01):
        url = f"https://{address}/"

        async def passes():
            with contextlib.suppress(httpx.TransportError, ssl.SSLError):
                async with httpx.AsyncClient(verify=context) as http:
                    return (await http.get(url)).status_code == 200
            return False

        assert not await passes()
        install(authority.issue("known"), tls)
        await eventually(passes)
