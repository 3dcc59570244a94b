"""Fixtures that tests of more than one package use."""

from tests.support.redis_server import redis_server, redis_url, valkey_server, valkey_url

__all__ = ["redis_server", "redis_url", "valkey_server", "valkey_url"]
