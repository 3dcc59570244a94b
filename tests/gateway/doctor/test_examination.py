"""Whole examinations: real Redis and HTTP, simulated engines, with and without a gateway's admin API."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest
from starlette.responses import JSONResponse, PlainTextResponse

from connectors.bench.ports import free_ports
from gateway.config import GatewayConfig
from gateway.doctor.examination import examine
from gateway.doctor.finding import Finding, Level
from gateway.parity import Reason, degraded
from kvindex.config import PublisherConfig
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.worker import Batch
from tests.support.engine_here import simulated
from tests.support.envoy import serve
from tests.support.waiting import eventually
from tests.support.workers import make_worker

NOBODY = "http://127.0.0.1:9"


class Patient:
    """An examination of the fleet on a real Redis."""

    def __init__(self, redis_url: str) -> None:
        self.redis_url = redis_url
        self.config = GatewayConfig(redis_url=redis_url, parity_tries=1, redis_timeout_s=10)

    async def examine(
        self, admin: str = NOBODY, *, replays: Mapping[str, str] = {}, timeout_s: float = 30
    ) -> list[Finding]:
        config = self.config.model_copy(update={"parity_timeout_s": timeout_s})
        return await examine(config, admin=admin, replays=replays)

    async def worker(self):
        """Return the one live worker, once it is registered."""

        async def registered():
            found = [each for pool in await index.pools() for each in (await index.workers(pool))[1]]
            return found and found[0]

        index = RedisIndexReader(self.config)
        try:
            return await eventually(registered)
        finally:
            await index.close()


@pytest.fixture
def patient(redis_url):
    return Patient(redis_url)


def of(findings, subject):
    return [(each.level, each.what) for each in findings if each.subject.startswith(subject)]


async def test_a_worker_that_is_well_and_no_gateway(patient):
    async with simulated(patient.redis_url, "--lora", "sql"):
        await patient.worker()
        findings = await patient.examine()
    assert [level for level, _ in of(findings, "Redis")] == [Level.OK]
    ((level, what),) = of(findings, "gateway")
    assert level is Level.WARNING
    assert "no gateway answers" in what
    ((level, what),) = of(findings, "worker")
    assert level is Level.OK
    assert "`sql`" in what


async def test_the_verdict_of_a_gateway_is_shown_beside_our_own(patient):
    async with simulated(patient.redis_url):
        worker = (await patient.worker()).worker
        verdict = degraded(worker, Reason.TOKENS, "its template differs")
        known = {"worker_id": worker.worker_id, "worker": worker, "reachable": True, "parity": verdict}
        fleet = {"failure": None, "parity_probe": True, "workers": [known]}

        async def admin(request):
            assert request.url.path == "/fleet"
            return JSONResponse(msgspec.to_builtins(fleet))

        async with serve(admin) as address:
            findings = await patient.examine(f"http://{address}")
    assert [level for level, _ in of(findings, "gateway")] == [Level.OK]
    assert [level for level, _ in of(findings, "worker")] == [Level.PROBLEM, Level.OK]
    assert "its template differs" in of(findings, "worker")[0][1]


@pytest.mark.parametrize("answer", [PlainTextResponse("nginx"), JSONResponse({"workers": 1})])
async def test_what_is_no_gateway_is_not_taken_for_one(patient, answer):
    async def other(_):
        return answer

    async with serve(other) as address:
        findings = await patient.examine(f"http://{address}")
    ((level, what),) = of(findings, "gateway")
    assert level is Level.WARNING
    assert "no gateway of this version" in what


async def test_a_wrong_worker_is_a_problem_whoever_looks(patient):
    async with simulated(patient.redis_url, "--ignore-salt"):
        await patient.worker()
        findings = await patient.examine()
    ((level, what),) = of(findings, "worker")
    assert level is Level.PROBLEM
    assert "as if it had none" in what


async def test_a_worker_that_nobody_can_reach(patient):
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    writer = RedisIndexWriter(PublisherConfig(redis_url=patient.redis_url))
    worker = make_worker(endpoint, num_blocks=1)
    slot = writer.open_slot(worker, lease_ms=60_000)
    writer.apply(worker.pool, slot, worker.incarnation, Batch(sequence=1, stored=(1, 2)))
    writer.close()
    (refused, counted) = of(await patient.examine(), "worker")
    assert refused[0] is counted[0] is Level.PROBLEM
    assert "nothing accepts connections" in refused[1]
    assert "2 blocks" in counted[1]


async def test_replay_tells_block_size_count_and_digest(patient):
    (port,) = free_ports(1)
    replay = f"tcp://127.0.0.1:{port}"
    async with simulated(patient.redis_url, "--replay", replay) as endpoint:
        await patient.worker()
        findings = await patient.examine(replays={endpoint: replay})
    exact, answers, agrees = of(findings, "worker")
    assert exact[0] is answers[0] is agrees[0] is Level.OK
    assert "all events since its start" in answers[1]
    assert "count (2 blocks) and digest" in agrees[1]


async def test_replay_shows_what_the_index_never_heard_of(patient):
    ports = free_ports(2)
    replay, silent = (f"tcp://127.0.0.1:{port}" for port in ports)
    flags = ("--replay", replay, "--registered-block-size", "16")
    async with simulated(patient.redis_url, *flags) as endpoint:
        await patient.worker()
        findings = await patient.examine(replays={endpoint: replay}, timeout_s=1)
        (_, said) = of(findings, "worker")
        assert said[0] is Level.PROBLEM
        assert "blocks of 32 tokens, but it registered with 16" in said[1]
        findings = await patient.examine(replays={endpoint: silent}, timeout_s=1)
        assert "does not answer" in of(findings, "worker")[1][1]


async def test_a_redis_that_is_away_is_the_only_problem():
    config = GatewayConfig(redis_url=f"redis://127.0.0.1:{free_ports(1)[0]}")
    (finding,) = await examine(config, admin=NOBODY, replays={})
    assert (finding.level, finding.subject) == (Level.PROBLEM, "Redis")
    assert "KVLANE_REDIS_URL" in finding.cure
