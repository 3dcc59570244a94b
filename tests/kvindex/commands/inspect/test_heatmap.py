"""`kvlane inspect heatmap` over a real Redis."""

import json
import subprocess
import sys

import pytest

from connectors.bench.ports import free_ports
from kvindex.commands.inspect.admin_api import Chain
from kvindex.commands.inspect.heatmap import BLOCKS_PER_COLUMN, look_up
from kvindex.config import IndexConfig
from kvindex.errors import AdminUnavailable, ConfigError, IndexUnavailable
from kvindex.redis_index import RedisIndexReader, RedisIndexWriter
from kvindex.stores import Store
from kvindex.worker import Batch, Tier
from tests.kvindex.commands.inspect.views import view_of_chain, view_of_prompt


@pytest.fixture
def gateway(admin, publisher):
    """Two prompts of 8 blocks that share 4; one worker holds one of them, another half of the common part."""
    url, answers, _ = admin
    whole, half = publisher.open(1), publisher.open(2)
    publisher.change(whole, stored=range(1, 9))
    publisher.change(half, stored=(1, 2))
    prompts = [view_of_prompt(whole, range(1, 9)), view_of_prompt(whole, (1, 2, 3, 4, 15, 16, 17, 18))]
    answers["GET", "/prompts?limit=200"] = (200, prompts)
    return url


def test_shares_by_depth(inspect, redis_url, gateway):
    arguments = ("heatmap", "--columns", "4", "--redis-url", redis_url, "--admin", gateway)
    shown = inspect(*arguments).stdout
    assert "blocks of 2 prompts, a column is 32 tokens" in shown
    assert "██▒▒" in shown
    assert "█   " in shown
    (found,) = json.loads(inspect(*arguments, "--json").stdout)
    assert found["depths_blocks"] == [0, 2, 4, 6, 8]
    assert found["num_blocks"] == [2, 2, 4, 4]
    first, second = found["rows"]
    assert (first["holder"], first["tier"], first["shares"]) == ("10.0.0.1:8000", "device", [1, 1, 0.5, 0.5])
    assert second["shares"] == [1, 0, 0, 0]
    assert "and 1 more" in inspect(*arguments, "--rows", "1").stdout


def test_tiers_have_a_table_of_their_own(inspect, redis_url, admin, publisher):
    """Whoever tells of a store: a node's server and a listing tell of one bucket."""
    url, answers, _ = admin
    worker = publisher.open(1)
    writer = RedisIndexWriter(IndexConfig(redis_url=redis_url, redis_timeout_s=10))
    for name, teller, tier, chunks in (
        ("s3://kv", "", Tier.OBJECT, (0xC1, 0xC2)),
        ("s3://kv", "node", Tier.OBJECT, (0xC3,)),
        ("node/cpu", "", Tier.CPU, (0xC1,)),
    ):
        store = Store(name=name, teller=teller, tier=tier, model="tiny-1", chunk_size=256, incarnation="1")
        slot = writer.open_slot(store, lease_ms=60_000)
        writer.apply(store.pool, slot, store.incarnation, Batch(sequence=1, stored=chunks))
    writer.close()
    chains = [view_of_chain(worker, (1, 2)), view_of_chain(store, (0xC1, 0xC2, 0xC3, 0xC4))]
    answers["GET", "/prompts?limit=200"] = (200, [{"model": "tiny", "chains": chains}])
    arguments = ("heatmap", "--redis-url", redis_url, "--admin", url)
    blocks, chunks = json.loads(inspect(*arguments, "--json").stdout)
    assert [row["tier"] for row in blocks["rows"]] == ["device"]
    assert (chunks["what"], chunks["block_size"]) == ("chunks", 256)
    assert [(row["holder"], row["tier"], row["shares"]) for row in chunks["rows"]] == [
        ("s3://kv", "object", [1, 1, 1, 0]),
        ("node/cpu", "cpu", [1, 0, 0, 0]),
    ]
    assert "tiny-1: chunks of 1 prompts, a column is 256 tokens" in inspect(*arguments, COLUMNS="200").stdout


def test_of_a_given_prompt(inspect, redis_url, gateway, admin, publisher):
    _, answers, received = admin
    worker = publisher.open(3)
    answers["POST", "/prefix"] = (200, {"chains": [view_of_chain(worker, (1, 2, 3))]})
    arguments = ("heatmap", "--prompt", "Once", "--model", "tiny", "--columns", "2", "--json")
    (found,) = json.loads(inspect(*arguments, "--redis-url", redis_url, "--admin", gateway).stdout)
    assert received == [{"text": "Once", "model": "tiny"}]
    assert found["num_prompts"] == 1
    assert [row["shares"] for row in found["rows"]] == [[1, 1], [1, 0], [0, 0]]


def test_other_models_are_left_out(inspect, redis_url, gateway):
    shown = inspect("heatmap", "--model", "other", "--redis-url", redis_url, "--admin", gateway).stdout
    assert "No prompt with a full block is known" in shown


def test_a_picture(inspect, redis_url, gateway, tmp_path):
    file = tmp_path / "map.png"
    inspect("heatmap", "--png", str(file), "--redis-url", redis_url, "--admin", gateway)
    assert file.read_bytes().startswith(b"\x89PNG")
    nowhere = str(tmp_path / "no" / "map.png")
    error = inspect("heatmap", "--png", nowhere, "--redis-url", redis_url, "--admin", gateway).exception
    assert isinstance(error, ConfigError)
    assert nowhere in str(error)


def test_a_picture_of_nothing(inspect, redis_url, gateway, admin, tmp_path):
    _, answers, _ = admin
    answers["GET", "/prompts?limit=200"] = (200, [])
    error = inspect("heatmap", "--png", "x.png", "--redis-url", redis_url, "--admin", gateway).exception
    assert isinstance(error, ConfigError)
    assert "nothing to draw" in str(error)


def test_without_matplotlib_it_says_what_to_install(redis_url, gateway):
    """In a process of its own, where the import fails as it does where the extra is not installed."""
    program = (
        "import sys; sys.modules['matplotlib'] = None; from kvindex.cli import main; "
        f"sys.argv = ['kvlane', 'inspect', 'heatmap', '--png', 'x.png', '--redis-url', {redis_url!r}, "
        f"'--admin', {gateway!r}]; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr.strip() == "--png needs matplotlib: pip install 'kvlane[plot]'"


def test_nobody_there(inspect, redis_url, gateway):
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    error = inspect("heatmap", "--redis-url", redis_url, "--admin", f"http://{nobody}").exception
    assert isinstance(error, AdminUnavailable)
    error = inspect("heatmap", "--redis-url", f"redis://{nobody}/0", "--admin", gateway).exception
    assert isinstance(error, IndexUnavailable)


async def test_many_blocks_are_sampled(redis_url, publisher):
    worker = publisher.open()
    chains = [Chain(worker.pool.pool_id, 2, 1, (number, 10_000 + number)) for number in range(1000)]
    publisher.change(worker, stored=[block for chain in chains[::2] for block in chain.hashes])
    reader = RedisIndexReader(IndexConfig(redis_url=redis_url, redis_timeout_s=10))
    found = await look_up(reader, worker.pool, chains, 2)
    await reader.close()
    assert all(BLOCKS_PER_COLUMN // 2 < num_blocks <= BLOCKS_PER_COLUMN for num_blocks in found.num_blocks)
    assert found.rows[0].shares == pytest.approx([0.5, 0.5], abs=0.51)
