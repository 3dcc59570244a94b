import pytest

from gateway.tenants.limits import Limiter
from gateway.tenants.roster import Key, Tenant


def tenant(**limits):
    return Tenant(name="acme", keys=(Key(sha256="a" * 64),), **limits)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def passed(limiters, each, clock, seconds, *, step=0.01):
    """Send far more than is allowed, dealt out to the gateways in turn; return how many passed."""
    count = 0
    for number in range(int(seconds / step)):
        clock.now += step
        count += limiters[number % len(limiters)].request_wait_s(each) == 0
    return count


@pytest.mark.parametrize("num_gateways", [1, 2, 4])
def test_gateways_together_keep_the_rate(clock, num_gateways):
    limiters = [Limiter(lambda: num_gateways, clock=clock) for _ in range(num_gateways)]
    count = passed(limiters, tenant(requests_per_s=20), clock, 60)
    assert 20 * 60 * 0.95 <= count <= 20 * 60 + 20 + num_gateways


def test_a_rate_below_one_per_gateway_lets_requests_through(clock):
    limiters = [Limiter(lambda: 4, clock=clock) for _ in range(4)]
    assert 55 <= passed(limiters, tenant(requests_per_s=1), clock, 60) <= 60 + 4


def test_a_gateway_that_joins_takes_its_part_of_the_limit(clock):
    gateways = [1]
    limiter = Limiter(lambda: gateways[0], clock=clock)
    each = tenant(requests_per_s=20)
    alone = passed([limiter], each, clock, 30)
    gateways[0] = 2
    assert passed([limiter], each, clock, 30) == pytest.approx(alone / 2, rel=0.05)


def test_tokens_are_charged_by_estimate_and_then_by_count(clock):
    limiter, each = Limiter(clock=clock), tenant(prompt_tokens_per_s=1000)
    assert limiter.tokens_wait_s(each, 600) == 0
    assert limiter.tokens_wait_s(each, 600) == pytest.approx(0.2)
    limiter.correct_tokens(each, -300)
    assert limiter.tokens_wait_s(each, 600) == 0
    limiter.correct_tokens(each, 1000)
    assert limiter.tokens_wait_s(each, 100) == pytest.approx(1.0)


def test_a_tenant_without_limits_never_waits(clock):
    limiter, each = Limiter(clock=clock), tenant()
    limiter.running["acme"] = 10_000
    assert [limiter.request_wait_s(each) for _ in range(1000)] == [0] * 1000
    assert limiter.tokens_wait_s(each, 1 << 30) == 0
    limiter.correct_tokens(each, 5)
    assert limiter.has_room(each)


def test_room_is_the_gateways_part_rounded_up():
    limiter, each = Limiter(lambda: 4), tenant(max_concurrent=10)
    limiter.running["acme"] = 2
    assert limiter.has_room(each)
    limiter.running["acme"] = 3
    assert not limiter.has_room(each)
