"""What the doctor says of gateway, pools and registrations."""

import pytest

from gateway.doctor.finding import Level
from gateway.doctor.fleet_checks import (
    GatewayFleet,
    GatewayWorker,
    agreement_finding,
    count_findings,
    gateway_findings,
    lease_findings,
    pool_findings,
    sorted_workers,
)
from gateway.parity import Parity
from kvindex.blocks import Pool
from kvindex.worker import Load, RegisteredWorker, Role
from tests.support.workers import make_worker

ADMIN = "http://gateway:9003"


def registered(endpoint="10.0.0.1:8000", *, lease_left_ms=2_800, num_indexed_blocks=3, **fields):
    return RegisteredWorker(
        role=Role.BOTH,
        worker=make_worker(endpoint, **fields),
        slot=0,
        lease_ms=3_000,
        lease_left_ms=lease_left_ms,
        num_indexed_blocks=num_indexed_blocks,
        digest=f"{7:016x}",
        load=Load(),
        charged_tokens=0,
        charged_requests=0,
    )


def seen_by_gateway(*known, **fields):
    workers = [
        GatewayWorker(worker_id=each.worker.worker_id, worker=each.worker, reachable=True, parity=Parity())
        for each in known
    ]
    return GatewayFleet(**({"failure": None, "parity_probe": True, "workers": workers} | fields))


A, B = registered("a:1"), registered("b:1")


@pytest.mark.parametrize(
    ("fleet", "level", "said"),
    [
        (seen_by_gateway(A, B), Level.OK, "knows the 2 registered workers"),
        (seen_by_gateway(A, B, failure="Redis at x: gone"), Level.PROBLEM, "Redis at x: gone"),
        (seen_by_gateway(registered("c:1")), Level.PROBLEM, "none of the 2"),
        (seen_by_gateway(), Level.PROBLEM, "knows 0 workers"),
        (seen_by_gateway(A), Level.WARNING, "does not know b:1"),
        (seen_by_gateway(A, B, parity_probe=False), Level.WARNING, "parity_probe is off"),
    ],
)
def test_gateway(fleet, level, said):
    (finding,) = gateway_findings(ADMIN, fleet, [A, B])
    assert (finding.level, finding.subject) == (level, f"gateway {ADMIN}")
    assert said in finding.what
    assert bool(finding.cost and finding.cure) is (level is not Level.OK)


def test_the_gateways_verdict_is_of_this_life_of_a_worker():
    fleet = seen_by_gateway(A)
    assert fleet.parity_of(A.worker) == Parity()
    assert fleet.parity_of(make_worker("a:1", incarnation="another")) is None


@pytest.mark.parametrize(
    ("pools", "level", "said"),
    [
        ([], Level.PROBLEM, "no worker is live"),
        ([Pool("tiny", 16), Pool("tiny", 32)], Level.WARNING, "16 and 32"),
        ([Pool("tiny", 16), Pool("tiny", 16, "xxh3-64/0")], Level.WARNING, "2 schemes"),
    ],
)
def test_pools_that_share_nothing(pools, level, said):
    (finding,) = pool_findings(pools)
    assert finding.level is level
    assert said in finding.what


def test_pools_of_different_models_have_nothing_to_share():
    assert [*pool_findings([Pool("tiny", 16), Pool("large", 32)])] == []


@pytest.mark.parametrize(("left_ms", "is_late"), [(2_900, False), (1_600, False), (900, True), (1, True)])
def test_an_old_heartbeat(left_ms, is_late):
    found = [*lease_findings(registered(lease_left_ms=left_ms))]
    assert bool(found) is is_late
    assert all("lease 3.0 s" in each.what and "KVLANE_LEASE_MS=6000" in each.cure for each in found)


def test_more_blocks_than_the_cache_has():
    assert [*count_findings(registered(num_indexed_blocks=1000))] == []
    assert [*count_findings(registered(num_indexed_blocks=1001, num_blocks=0))] == []
    (finding,) = count_findings(registered(num_indexed_blocks=1001))
    assert finding.level is Level.PROBLEM
    assert "1,001 blocks" in finding.what


@pytest.mark.parametrize(
    ("num_blocks", "digest", "level"), [(3, 7, Level.OK), (4, 7, Level.PROBLEM), (3, 8, Level.PROBLEM)]
)
def test_count_and_digest_against_the_events(num_blocks, digest, level):
    assert agreement_finding(A, num_blocks, digest, "the events").level is level


def test_workers_are_shown_by_model_and_name():
    shown = sorted_workers([B, A, registered("a:2", model="large")])
    assert [each.worker.worker_id for each in shown] == ["a:2", "a:1", "b:1"]
