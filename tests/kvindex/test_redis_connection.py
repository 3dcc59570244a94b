"""What Redis may answer, and what becomes of it; each answer is one of a real server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import redis

from connectors.bench.ports import free_ports
from kvindex.config import IndexConfig
from kvindex.errors import ConfigError, IndexFull, IndexRefused, IndexUnavailable
from kvindex.keys import POOLS
from kvindex.redis_connection import AsyncConnection
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Batch, Load
from tests.support.cli import kvlane
from tests.support.redis_server import valkey_binary
from tests.support.redis_topology import SERVICE, RedisProcess, sentinel, server, wait_until
from tests.support.relay import relay
from tests.support.waiting import eventually
from tests.support.workers import make_worker

WORKER = make_worker(incarnation="one")
POOL = WORKER.pool
LEASE_MS = 600_000
ENGINES = {"redis": lambda: None, "valkey": valkey_binary}
STORED = Batch(sequence=1, stored=(1,))


@pytest.fixture(params=list(ENGINES))
def engine(request) -> Iterator[RedisProcess]:
    with server(binary=ENGINES[request.param]()) as made:
        yield made


@pytest.fixture
def client(engine) -> Iterator[redis.Redis]:
    with engine.client() as made:
        yield made


@contextlib.contextmanager
def writing(url: str, timeout_s: float = 5.0) -> Iterator[RedisIndexWriter]:
    writer = RedisIndexWriter(IndexConfig(redis_url=url, redis_timeout_s=timeout_s))
    yield writer
    writer.close()


@contextlib.asynccontextmanager
async def reading(url: str, timeout_s: float = 5.0):
    reader = RedisIndexReader(IndexConfig(redis_url=url, redis_timeout_s=timeout_s))
    yield reader
    await reader.close()


def refused(url: str, match: str, kind: type[IndexUnavailable] = IndexUnavailable) -> str:
    with writing(url) as writer, pytest.raises(kind, match=match) as caught:
        writer.open_slot(WORKER, lease_ms=LEASE_MS)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert "user_script" not in str(caught.value)
    return str(caught.value)


def beats(writer: RedisIndexWriter, slot: int) -> bool:
    try:
        writer.heartbeat(POOL, slot, "one", Load(), lease_ms=LEASE_MS)
    except IndexUnavailable:
        return False
    return True


# What cures itself


async def test_a_server_that_dies_is_missed_until_it_is_back():
    with server() as engine, writing(engine.url) as writer:
        async with reading(engine.url) as reader:
            slot = writer.open_slot(WORKER, lease_ms=LEASE_MS)
            assert await reader.pools() == [POOL]
            engine.kill()
            with pytest.raises(IndexUnavailable, match=f"Redis at 127.0.0.1:{engine.port}: .*refused"):
                writer.heartbeat(POOL, slot, "one", Load(), lease_ms=LEASE_MS)
            with pytest.raises(IndexUnavailable, match=f"Redis at 127.0.0.1:{engine.port}: "):
                await reader.match(POOL, [1])
            engine.start()
            engine.wait_until_ready()
            assert writer.open_slot(WORKER, lease_ms=LEASE_MS) == 0
            assert await reader.holders(POOL, 1) == []


async def test_a_server_that_hangs_costs_the_timeout_and_no_more():
    with server() as engine, writing(engine.url, 0.2) as writer:
        async with reading(engine.url, 0.2) as reader:
            slot = writer.open_slot(WORKER, lease_ms=LEASE_MS)
            await reader.pools()
            engine.pause()
            assert not beats(writer, slot)
            with pytest.raises(IndexUnavailable, match="no answer"):
                await reader.match(POOL, [1])
            engine.resume()
            await eventually(lambda: beats(writer, slot))
            await eventually(lambda: _answers(reader))


async def _answers(reader: RedisIndexReader) -> bool:
    try:
        await reader.match(POOL, [1])
    except IndexUnavailable:
        return False
    return True


def test_a_server_that_is_loading_says_so():
    # It looks at its clients after every 2 MiB.
    slow = ("--key-load-delay", "25000", "--rdbcompression", "no")
    with RedisProcess("--save", "", *slow) as engine:
        engine.wait_until_ready()
        with engine.client() as client:
            for number in range(40):
                client.set(f"key{number}", "x" * 1_000_000)
            client.save()
        engine.kill()
        engine.start()
        with writing(engine.url) as writer:
            said = ""

            def loads_or_has() -> bool:
                nonlocal said
                try:
                    writer.open_slot(WORKER, lease_ms=LEASE_MS)
                except IndexUnavailable as error:
                    said += f"{error}\n"
                    return False
                return True

            wait_until(loads_or_has)
    assert "loading the dataset in memory; it has started and will be there soon" in said


def test_a_server_that_became_a_replica_says_what_is_wrong(engine, client):
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    refused(engine.url, "You can't write against a read only replica; it is a replica now")
    client.execute_command("REPLICAOF", "NO", "ONE")
    with writing(engine.url) as writer:
        assert writer.open_slot(WORKER, lease_ms=LEASE_MS) == 0


async def test_a_demoted_master_is_left_for_the_new_one_without_an_error(engine):
    """As behind the name of a managed Redis: connections stay, the name leads elsewhere."""
    with server(binary=engine.binary) as successor, relay(engine.port) as name:
        url = f"redis://127.0.0.1:{name.port}"
        with writing(url) as writer:
            async with reading(url) as reader:
                slot = writer.open_slot(WORKER, lease_ms=LEASE_MS)
                await reader.pools()
                with successor.client() as after, engine.client() as before:
                    after.execute_command("REPLICAOF", "127.0.0.1", engine.port)
                    wait_until(lambda: after.exists(POOLS))
                    after.execute_command("REPLICAOF", "NO", "ONE")
                    before.execute_command("REPLICAOF", "127.0.0.1", successor.port)
                name.target_port = successor.port
                writer.apply(POOL, slot, "one", STORED)
                reservation = await reader.reserve(
                    POOL, "d", slot, prefill_tokens=1, seen_backlog_tokens=None, ttl_ms=LEASE_MS
                )
                assert reservation.charged
                assert await reader.holders(POOL, 1) == [slot]


def test_a_busy_server_says_how_to_end_it(engine, client):
    client.config_set("lua-time-limit", 10)
    endless = threading.Thread(target=_run_for_ever, args=(engine,))
    endless.start()
    wait_until(lambda: _is_busy(client))
    refused(engine.url, "BUSY .*SCRIPT KILL ends it")
    client.script_kill()
    endless.join()


def _run_for_ever(engine: RedisProcess) -> None:
    with engine.client() as client, contextlib.suppress(redis.ResponseError):
        client.eval("while true do end", 0)


def _is_busy(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.ResponseError as error:
        return "BUSY" in str(error)
    return False


def test_a_server_that_cannot_save_says_what_to_do(engine, client):
    (engine.folder / "dump.rdb").mkdir()
    client.config_set("save", "3600 1")
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
    refused(engine.url, "MISCONF .*CONFIG SET stop-writes-on-bgsave-error no")
    client.config_set("stop-writes-on-bgsave-error", "no")
    with writing(engine.url) as writer:
        writer.open_slot(WORKER, lease_ms=LEASE_MS)


async def test_a_full_server_keeps_leases_and_forgets_what_it_is_told_to(engine, client):
    with writing(engine.url) as writer:
        async with reading(engine.url) as reader:
            slot = writer.open_slot(WORKER, lease_ms=LEASE_MS)
            writer.apply(POOL, slot, "one", STORED)
            client.config_set("maxmemory", 1)
            with pytest.raises(IndexFull, match=r"it is full: CONFIG SET maxmemory"):
                writer.apply(POOL, slot, "one", Batch(sequence=2, stored=(2,), removed=(1,)))
            refused(engine.url, "it is full", IndexFull)
            state = writer.heartbeat(POOL, slot, "one", Load(running_requests=3), lease_ms=LEASE_MS)
            assert (state.num_blocks, state.digest) == (1, 1)
            assert [each.load.running_requests for each in (await reader.match(POOL, [])).states] == [3]
            assert writer.apply(POOL, slot, "one", Batch(sequence=2, removed=(1,))).num_blocks == 0
            assert await reader.holders(POOL, 1) == []
            writer.close_slot(POOL, slot, "one")
            while await reader.sweep(POOL, max_buckets=10):
                pass
            client.config_set("maxmemory", 0)
            assert writer.open_slot(WORKER, lease_ms=LEASE_MS) == slot


async def test_a_list_of_pools_that_is_lost_alone_is_written_again(engine, client):
    with writing(engine.url) as writer:
        async with reading(engine.url) as reader:
            slot = writer.open_slot(WORKER, lease_ms=1)
            client.delete(POOLS)
            assert await reader.pools() == []

            async def is_back() -> bool:
                writer.heartbeat(POOL, slot, "one", Load(), lease_ms=100)
                return await reader.pools() == [POOL]

            await eventually(is_back)


# What somebody has to change


def test_a_password_that_is_missing_wrong_or_too_many(engine, client):
    host = f"127.0.0.1:{engine.port}"
    refused(f"redis://:s3cret@{host}", "without any password configured.*; take user and", IndexRefused)
    client.config_set("requirepass", "s3cret")
    refused(f"redis://{host}", "Authentication required; write user and password", IndexRefused)
    said = refused(f"redis://:wr0ng@{host}", "correct user and password in the URL", IndexRefused)
    assert "wr0ng" not in said
    with writing(f"redis://:s3cret@{host}") as writer:
        writer.open_slot(WORKER, lease_ms=LEASE_MS)


def test_a_right_that_is_missing(engine, client):
    url = f"redis://limited:pw@127.0.0.1:{engine.port}"
    client.execute_command("ACL", "SETUSER", "limited", "on", ">pw", "~kvlane:*", "+hset")
    refused(url, "no permissions to run the 'evalsha' command.*; give the user the rights", IndexRefused)
    client.execute_command("ACL", "SETUSER", "limited", "+evalsha", "+eval")
    refused(url, "; give the user the rights that docs/operations.md lists", IndexRefused)
    client.execute_command("ACL", "SETUSER", "limited", "+@all", "resetkeys", "~other:*")
    refused(url, "; give the user the rights that docs/operations.md lists", IndexRefused)


def test_a_server_of_another_kind(engine, redis_sentinels, valkey_cluster):
    host = f"127.0.0.1:{engine.port}"
    refused(f"redis://{host}/99", "DB index is out of range; choose a database", IndexRefused)
    refused(f"redis+cluster://{host}", "it is no cluster: write redis://", IndexRefused)
    refused(valkey_cluster.url.split(",")[0].replace("+cluster", ""), "write redis.cluster://", IndexRefused)
    sentinel = redis_sentinels.url.split(",")[0].replace("+sentinel", "")
    refused(sentinel, "unknown command .*kvlane needs Redis 6.2", IndexRefused)
    refused(redis_sentinels.url.replace("/kvlane", "/another"), "No master found for 'another'")
    refused("redis+sentinel://127.0.0.1:1/kvlane", r"for 'kvlane' \(of asking: ConnectionError\)$")
    hint = "if it does not speak TLS on this port, write redis://"
    with writing(f"rediss://{host}", 0.5) as writer, pytest.raises(IndexUnavailable, match=hint):
        writer.open_slot(WORKER, lease_ms=LEASE_MS)


async def test_a_refusal_ends_a_start_as_a_wrong_setting_and_passes_in_a_running_process():
    config = IndexConfig(redis_url="redis+cluster://127.0.0.1:1", redis_timeout_s=0.2)
    with pytest.raises(IndexUnavailable, match=r"Redis at cluster 127\.0\.0\.1:1: "):
        await AsyncConnection(config).call("PING")
    assert issubclass(IndexRefused, ConfigError)
    assert issubclass(IndexRefused, IndexUnavailable)


def test_a_refused_command_ends_with_one_line_and_the_code_of_a_wrong_setting():
    with server() as engine, engine.client() as client:
        client.config_set("requirepass", "s3cret")
        ended = kvlane("inspect", "pools", "--redis-url", f"redis://:wr0ng@127.0.0.1:{engine.port}")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.endswith("correct user and password in the URL")
    assert "wr0ng" not in line


def test_sentinels_have_a_login_of_their_own():
    (port,) = free_ports(1)
    with server() as master, sentinel(port, master.port, "requirepass s", f"sentinel auth-pass {SERVICE} m"):
        with master.client() as client:
            client.config_set("requirepass", "m")
        with redis.Redis(port=port, password="s") as client:
            wait_until(client.ping)
        url = f"redis+sentinel://:m@127.0.0.1:{port}/{SERVICE}"
        for own in ("", "?sentinel_password=wr0ng"):
            said = refused(url + own, "correct sentinel_username and sentinel_password", IndexRefused)
            assert "wr0ng" not in said
            assert len(said) < 250
        refused(
            f"redis+sentinel://:x@127.0.0.1:{port}/{SERVICE}?sentinel_password=s", "correct", IndexRefused
        )
        with writing(f"{url}?sentinel_password=s") as writer:
            assert writer.open_slot(WORKER, lease_ms=LEASE_MS) == 0
