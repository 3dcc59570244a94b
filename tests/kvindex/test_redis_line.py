"""One connection for many calls, on a real Redis."""

import asyncio
import socket

import pytest
import redis
import redis.asyncio
from redis.backoff import NoBackoff

from kvindex.redis_line import BlockingLine, Line


def line_to(url: str, timeout_s: float = 10) -> Line:
    pool = redis.asyncio.ConnectionPool.from_url(url)
    return Line(pool, timeout_s=timeout_s, backoff=NoBackoff(), num_retries=2)


@pytest.fixture
async def line(redis_url):
    made = line_to(redis_url)
    yield made
    await made.close()


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as made:
        yield made


async def test_every_call_gets_its_own_answer_over_one_connection(line, client):
    before = client.info("stats")["total_connections_received"]
    answers = await asyncio.gather(*(line.call("ECHO", number) for number in range(1000)))
    assert answers == [b"%d" % number for number in range(1000)]
    assert client.info("stats")["total_connections_received"] == before + 1


async def test_an_error_goes_to_its_caller_alone(line):
    answers = await asyncio.gather(
        line.call("ECHO", "a"), line.call("NOSUCH"), line.call("ECHO", "b"), return_exceptions=True
    )
    assert answers[::2] == [b"a", b"b"]
    assert isinstance(answers[1], redis.ResponseError)


async def test_a_cancelled_caller_disturbs_nobody(line, client):
    await line.call("PING")
    before = client.info("stats")["total_connections_received"]
    calls = [asyncio.create_task(line.call("ECHO", number)) for number in range(10)]
    await asyncio.sleep(0)
    calls[3].cancel()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(answers.pop(3), asyncio.CancelledError)
    assert answers == [b"%d" % number for number in range(10) if number != 3]
    assert client.info("stats")["total_connections_received"] == before


async def test_calls_in_flight_survive_a_dropped_connection(line, client):
    await line.call("PING")
    waiting = [asyncio.create_task(line.call("BLPOP", "list", 60)) for _ in range(2)]
    while client.info("clients")["blocked_clients"] == 0:
        await asyncio.sleep(0.001)
    client.client_kill_filter(_type="normal", skipme=True)
    while client.info("clients")["blocked_clients"] == 0:
        await asyncio.sleep(0.001)
    client.rpush("list", "x", "y")
    assert sorted([answer[1] for answer in await asyncio.gather(*waiting)]) == [b"x", b"y"]


async def test_a_silent_redis_fails_the_call_and_the_next_call_connects_anew(redis_url, client):
    line = line_to(redis_url, timeout_s=0.1)
    with pytest.raises(redis.TimeoutError):
        await line.call("BLPOP", "nothing", 60)
    assert await line.call("ECHO", "a") == b"a"
    await line.close()


async def test_nobody_there_is_a_connection_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(redis.ConnectionError):
        await line_to(f"redis://127.0.0.1:{port}").call("PING")


async def test_a_closed_line_opens_again(line):
    await line.call("PING")
    await line.close()
    assert await line.call("ECHO", "a") == b"a"


async def test_all_who_wait_share_one_attempt_to_connect():
    """Or a dead Redis would cost the last of many callers the timeouts of all before it."""
    num_attempts = 0

    class Pool(redis.asyncio.ConnectionPool):
        async def get_connection(self, *args, **kwargs):
            nonlocal num_attempts
            num_attempts += 1
            await asyncio.sleep(0.01)
            raise redis.ConnectionError("nobody there")

    line = Line(Pool(), timeout_s=1, backoff=NoBackoff(), num_retries=2)
    calls = [asyncio.create_task(line.call("PING")) for _ in range(10)]
    await asyncio.sleep(0)
    calls[0].cancel()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(answer) for answer in answers] == [asyncio.CancelledError, *[redis.ConnectionError] * 9]
    assert num_attempts == 1


def test_calls_after_one_that_was_given_up_get_their_own_answers(redis_url):
    def give_up() -> None:
        raise KeyboardInterrupt

    line = BlockingLine(redis.ConnectionPool.from_url(redis_url), backoff=NoBackoff(), num_retries=2)
    with pytest.raises(KeyboardInterrupt):
        line.call_each([("ECHO", "one"), ("ECHO", "two")], give_up)
    assert line.call("ECHO", "three") == b"three"
    line.close()
