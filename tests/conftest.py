"""Fixtures that tests of more than one package use, and how long properties are searched for.

`pytest --hypothesis-profile long` searches for minutes.
"""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.certificates import Authority
from tests.support.redis_server import (
    cluster_url,
    redis_sentinels,
    redis_server,
    redis_url,
    sentinel_url,
    valkey_cluster,
    valkey_server,
    valkey_url,
)

__all__ = [
    "cluster_url",
    "redis_sentinels",
    "redis_server",
    "redis_url",
    "sentinel_url",
    "valkey_cluster",
    "valkey_server",
    "valkey_url",
]

# How long an example takes, to run or to make, says nothing on a busy machine.
settings.register_profile("short", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("short"), max_examples=2_000)
settings.load_profile("short")


@pytest.fixture(scope="session", autouse=True)
def one_authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have clients of HTTPS know one certificate authority, in processes that tests start as well.

    Each of httpx's reads those of the system, 20 to 90 ms of a core, and tests poll with hundreds. Nothing
    here goes further than this machine.
    """
    with pytest.MonkeyPatch.context() as patch:
        authority = Authority(tmp_path_factory.mktemp("authority"), "nobody's authority")
        patch.setenv("SSL_CERT_FILE", str(authority.cafile))
        yield
