from dataclasses import dataclass

import pytest

from gateway import metrics
from gateway.admission import AdmissionDesk
from gateway.config import GatewayConfig
from gateway.decision import Caller, Served
from gateway.errors import RequestError
from gateway.receipts import Receipt
from gateway.service import Verdict

ACME = Caller("acme")


@dataclass(frozen=True)
class Terms:
    queue_ms: float
    prefill_ms: float

    @property
    def ttft_ms(self) -> float:
        return self.queue_ms + self.prefill_ms


@dataclass(frozen=True)
class Choice:
    terms: Terms


def receipt(decision_id="1", *, queue_ms=0.0, tenant="acme", **fields):
    choices = (Choice(Terms(queue_ms, 100.0)),)
    return Receipt(
        decision_id=decision_id, request_id="r", path="/", tenant=tenant, choices=choices, **fields
    )


def desk(mode, **options):
    return AdmissionDesk(GatewayConfig(admission=mode, **options))


def count(tenant, verdict):
    return metrics.ADMISSIONS.labels(tenant, verdict)._value.get()


def test_off_judges_nothing():
    assert desk("off").judge(receipt(ttft_target_ms=1.0)) is None


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (receipt(tenant=None), None),
        (receipt(tenant=None, ttft_target_ms=100.0), Verdict.IN_TIME),
        (receipt(ttft_target_ms=99.0), Verdict.LATE),
        (receipt(queue_ms=50_000), Verdict.IN_TIME),
    ],
)
def test_shadow_counts_and_sends(given, verdict):
    labels = (given.tenant or "-", verdict or Verdict.IN_TIME)
    before = count(*labels)
    assert desk("shadow").judge(given) is verdict
    assert count(*labels) == before + (verdict is not None)


def test_enforce_refuses_with_the_time_by_which_it_would_be_late():
    before = count("acme", Verdict.LATE)
    with pytest.raises(RequestError) as caught:
        desk("enforce").judge(receipt(queue_ms=4_000, ttft_target_ms=600.0))
    error = caught.value
    assert (error.status, error.kind, error.retry_after_s) == (429, "RateLimitError", 4)
    assert "600 ms" in error.message
    assert "4100 ms" in error.message
    assert count("acme", Verdict.LATE) == before + 1


def test_shares_count_only_while_every_worker_has_a_queue():
    judge = desk("enforce", fair_share_queue_ms=500)
    judge.take(Caller("beta"), receipt("1", tenant="beta"))
    for number in ("2", "3"):
        judge.take(ACME, receipt(number))
    assert judge.judge(receipt(queue_ms=499)) is Verdict.IN_TIME
    with pytest.raises(RequestError, match="more than its share"):
        judge.judge(receipt(queue_ms=500))
    assert judge.judge(receipt(queue_ms=500, tenant="beta")) is Verdict.IN_TIME
    for _ in range(2):
        judge.give_back(receipt("3"))
    assert judge.judge(receipt(queue_ms=500)) is Verdict.IN_TIME


@pytest.mark.parametrize(("ttft_ms", "outcome"), [(80.0, "met"), (120.0, "missed")])
def test_what_was_measured_is_counted_against_the_target(ttft_ms, outcome):
    served = Served("1", 200, "a:1", ttft_ms, 500.0, 10, 10)
    counter = metrics.TTFT_TARGETS.labels("acme", outcome)
    before = counter._value.get()
    desk("off").measure(receipt(ttft_target_ms=100.0, streamed=True, served=served))
    desk("off").measure(receipt(ttft_target_ms=100.0, streamed=False, served=served))
    desk("off").measure(receipt(streamed=True, served=served))
    assert counter._value.get() == before + 1
