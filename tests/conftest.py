"""Fixtures that tests of more than one package use, and how long properties are searched for.

`pytest --hypothesis-profile long` searches for minutes.
"""

from hypothesis import settings

from tests.support.redis_server import redis_server, redis_url, valkey_server, valkey_url

__all__ = ["redis_server", "redis_url", "valkey_server", "valkey_url"]

# No deadline: how long one example takes says nothing on a busy machine.
settings.register_profile("short", deadline=None)
settings.register_profile("long", deadline=None, max_examples=2_000)
settings.load_profile("short")
