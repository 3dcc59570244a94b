import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.tenants.buckets import TokenBucket

AMOUNTS = st.floats(0.1, 50)


@given(st.lists(st.tuples(st.floats(0, 5), AMOUNTS), min_size=1, max_size=60), st.floats(0.1, 20), AMOUNTS)
def test_over_any_time_no_more_is_taken_than_the_bucket_held_and_grew(arrivals, rate, capacity):
    bucket = TokenBucket(capacity, 0.0)
    now, taken = 0.0, []
    for pause, amount in arrivals:
        now += pause
        if bucket.wait_s(amount, now, rate=rate, capacity=capacity) == 0:
            bucket.take(amount)
            taken.append((now, amount))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            span = taken[first : last + 1]
            overdraft = max(span[-1][1] - capacity, 0)
            limit = capacity + rate * (span[-1][0] - span[0][0]) + overdraft
            assert sum(amount for _, amount in span) <= limit + 1e-6


@given(AMOUNTS, st.floats(0.1, 20), AMOUNTS)
def test_after_the_time_it_says_it_has_enough(amount, rate, capacity):
    bucket = TokenBucket(capacity, 0.0)
    bucket.take(2 * capacity)
    wait_s = bucket.wait_s(amount, 0.0, rate=rate, capacity=capacity)
    assert wait_s > 0
    assert bucket.wait_s(amount, wait_s, rate=rate, capacity=capacity) == pytest.approx(0, abs=1e-9)


def test_what_is_larger_than_the_bucket_passes_when_it_is_full_and_is_paid_for():
    bucket = TokenBucket(10, 0.0)
    assert bucket.wait_s(100, 0.0, rate=10, capacity=10) == 0
    bucket.take(100)
    assert bucket.wait_s(1, 0.0, rate=10, capacity=10) == pytest.approx(9.1)


def test_what_is_given_back_can_be_taken_again():
    bucket = TokenBucket(10, 0.0)
    bucket.take(10)
    bucket.take(-10)
    assert bucket.wait_s(10, 0.0, rate=10, capacity=10) == 0


def test_a_clock_that_goes_back_gives_nothing():
    bucket = TokenBucket(0, 10.0)
    assert bucket.wait_s(1, 5.0, rate=1, capacity=1) == 1
