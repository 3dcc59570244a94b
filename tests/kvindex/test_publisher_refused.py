"""The publisher on a real Redis that refuses what it is told."""

from contextlib import closing

import structlog

from tests.support.publishing import Impatient
from tests.support.redis_topology import server
from tests.support.scripted_engine import prompt, removal
from tests.support.waiting import eventually


async def test_a_full_redis_keeps_the_worker_and_gets_the_rest_when_it_has_room():
    event, hashes = prompt(1, 2, 3, 4)
    with server() as engine, closing(Impatient(engine.url)) as published, engine.client() as client:
        published.source.put(event)
        await eventually(lambda: published.holds(hashes))
        client.config_set("maxmemory", 1)
        flapping, _ = prompt(5, 6)
        more, more_hashes = prompt(7, 8)
        with structlog.testing.capture_logs() as logs:
            for _ in range(1_000):
                published.source.put(flapping, removal(prompt(5, 6)[1]))
            published.source.put(more)
            beats = len(published.writer.answers)
            # Longer than a lease: at least every half of one is a heartbeat.
            await eventually(lambda: len(published.writer.answers) > beats + 4)
            assert await published.holds(hashes)
            (line,) = [log for log in logs if log["log_level"] == "warning"]
            assert "it is full: CONFIG SET maxmemory to more" in line["reason"]
            assert published.num_unwritten <= 3  # the batch refused, what undoes it, and the last prompt
            client.config_set("maxmemory", 0)
            await eventually(lambda: published.holds([*hashes, *more_hashes]))


async def test_a_password_may_be_changed_under_a_publisher():
    event, hashes = prompt(1, 2, 3, 4)
    with server() as engine, engine.client() as client:
        client.execute_command("ACL", "SETUSER", "engine", "on", ">pw", "~*", "+@all")
        with closing(Impatient(engine.url.replace("://", "://engine:pw@"))) as published:
            published.source.put(event)
            await eventually(lambda: published.holds(hashes))
            with structlog.testing.capture_logs() as logs:
                client.execute_command("ACL", "SETUSER", "engine", "resetpass", ">other")
                client.client_kill_filter(_type="normal", skipme=True)
                await eventually(lambda: logs)
            assert "correct user and password in the URL" in logs[0]["reason"]
            assert "pw" not in logs[0]["reason"].replace("password", "")
            client.execute_command("ACL", "SETUSER", "engine", ">pw")
            await eventually(lambda: published.holds(hashes))
