"""Real TLS handshakes of our clients. The Redis binaries at hand speak no TLS: a relay ends it for them."""

from __future__ import annotations

import pytest

from kvindex.config import IndexConfig
from kvindex.errors import IndexRefused, IndexUnavailable
from kvindex.redis_connection import AsyncConnection, Connection
from tests.support.certificates import Authority
from tests.support.redis_topology import NUM_SLOTS, RedisProcess, cluster_ports, wait_until
from tests.support.relay import relay


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def redis_port(redis_url) -> int:
    return int(redis_url.rpartition(":")[2].partition("/")[0])


async def ask(url: str, timeout_s: float = 5.0) -> None:
    """Have both clients ask; their errors must be of one kind and in one line."""
    config = IndexConfig(redis_url=url, redis_timeout_s=timeout_s)
    blocking, asynchronous = Connection(config), AsyncConnection(config)
    raised: list[IndexUnavailable] = []
    try:
        blocking.call("HVALS", "kvlane:pools")
    except IndexUnavailable as error:
        raised.append(error)
    try:
        await asynchronous.call("HVALS", "kvlane:pools")
    except IndexUnavailable as error:
        raised.append(error)
    blocking.close()
    await asynchronous.close()
    if raised:
        assert len(raised) == 2, raised
        assert type(raised[0]) is type(raised[1]), raised
        assert all("\n" not in str(error) for error in raised)
        raise raised[1] from raised[0]


async def test_a_server_is_known_by_its_authority(authority, redis_port):
    with relay(redis_port, authority.server_context()) as tls:
        url = f"rediss://127.0.0.1:{tls.port}"
        await ask(f"{url}?ssl_ca_certs={authority.cafile}")
        with pytest.raises(IndexRefused, match=r"VERIFY_FAILED.*; set ssl_ca_certs in the URL"):
            await ask(url)
        await ask(f"{url}?ssl_cert_reqs=none")


async def test_a_server_of_another_name_is_refused_unless_told_otherwise(authority, redis_port):
    with relay(redis_port, authority.server_context()) as tls:
        url = f"rediss://localhost:{tls.port}?ssl_ca_certs={authority.cafile}"
        with pytest.raises(IndexRefused, match="CERTIFICATE_VERIFY_FAILED"):
            await ask(url)
        await ask(f"{url}&ssl_check_hostname=no")


async def test_a_server_may_want_a_certificate_of_the_client(authority, redis_port):
    with relay(redis_port, authority.server_context(wants_client_certificate=True)) as tls:
        url = f"rediss://127.0.0.1:{tls.port}?ssl_ca_certs={authority.cafile}"
        own = authority.issue("client")
        await ask(f"{url}&ssl_certfile={own.certfile}&ssl_keyfile={own.keyfile}")
        with pytest.raises(IndexUnavailable, match="if it wants a client certificate, set ssl_certfile and"):
            await ask(url)


async def test_a_cluster_is_followed_over_tls(authority):
    (port,) = cluster_ports(1)
    with relay(port, authority.server_context()) as tls:
        announced = ("--cluster-announce-ip", "127.0.0.1", "--cluster-announce-port", str(tls.port))
        with RedisProcess("--cluster-enabled", "yes", *announced, port=port) as node:
            node.wait_until_ready()
            with node.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTS", *range(NUM_SLOTS))
                wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
            await ask(f"rediss+cluster://127.0.0.1:{tls.port}?ssl_ca_certs={authority.cafile}")


async def test_sentinels_are_asked_over_tls(authority, redis_sentinels):
    """What this one names is a port without TLS, so the next step fails, by then at the master."""
    with relay(redis_sentinels.ports[0], authority.server_context()) as tls:
        url = f"rediss+sentinel://127.0.0.1:{tls.port}/kvlane?ssl_ca_certs={authority.cafile}"
        with pytest.raises(IndexUnavailable, match="if it does not speak TLS on this port"):
            await ask(url, timeout_s=0.5)
        with pytest.raises(IndexUnavailable, match="No master found for 'another'"):
            await ask(url.replace("/kvlane", "/another"))
