"""One fleet of simulated engines for the tests that leave it as they found it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gateway.local_fleet import LocalFleet
from tests.support.fleet import charges, eventually, indexed_blocks, simulated_fleet


@pytest.fixture(scope="session")
def shared_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    logs: Path = tmp_path_factory.mktemp("fleet")
    with simulated_fleet(logs, "--lora", "sql", "--lora", "poetry", num_workers=3) as fleet:
        yield fleet


@pytest.fixture
def fleet(shared_fleet: LocalFleet) -> Iterator[LocalFleet]:
    """A fleet with cold caches; afterwards nothing may be charged to a worker."""
    for engine in shared_fleet.engines:
        assert httpx.post(f"http://{engine}/reset_prefix_cache").json()["success"]
    eventually(lambda: indexed_blocks(shared_fleet) == 0)
    yield shared_fleet
    eventually(lambda: charges(shared_fleet) == 0)


@pytest.fixture
def client(fleet: LocalFleet) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.url, timeout=30) as client:
        yield client
