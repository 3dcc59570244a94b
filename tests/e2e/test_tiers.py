"""Real engines, LMCache servers, a disk and S3 behind real Redis, gateway and Envoy.

What one engine has computed the index knows, the plan weighs, and another engine loads.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import httpx
import pytest
import redis

from connectors.bench.ports import adjacent_ports
from deploy.demo.model import ENGINE_ENV, NAME
from gateway.local_fleet import FleetOptions, LocalFleet, kvlane, local_fleet
from kvindex.stores import LOAD_KEY
from tests.support.cli import kvlane as run_kvlane
from tests.support.fleet import eventually, registered
from tests.support.tiers import BUCKET, TierNode, s3_server, tier_node
from tests.support.vllm_engine import tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.envoy]

ENGINE = ("--served-model-name", NAME, "--enforce-eager", "--max-model-len", "4096", "--block-size", "32")
PATIENCE_S = 120
NUM_TOKENS = 8 * 256
draw = random.Random(16)


class Tiers(NamedTuple):
    """Two nodes with an engine each; they share a bucket, the first has a disk as well."""

    fleet: LocalFleet
    nodes: Sequence[TierNode]
    disk: str
    """What `--tiers` says of it."""

    def stores(self) -> dict[str, int]:
        """Return chunks by the name of the store, as `kvlane inspect` knows them."""
        told = run_kvlane("inspect", "stores", "--json", "--redis-url", self.fleet.redis_url)
        return {
            each["registered"]["store"]["name"]: each["registered"]["num_indexed_blocks"]
            for each in json.loads(told.stdout)
        }

    def tier_tokens(self, prompt: list[int]) -> dict[str, dict[str, int]]:
        """Return what the gateway knows of a prompt, by worker and tier."""
        body = {"model": NAME, "text": prompt}
        found = httpx.post(f"{self.fleet.admin_url}/prefix", json=body, timeout=PATIENCE_S).json()
        return {each["worker"]: each["tier_tokens"] for each in found["workers"]}


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiers]:
    folder = tmp_path_factory.mktemp("tiers")
    nodes = [TierNode(adjacent_ports(2)) for _ in range(2)]
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        s3 = stack.enter_context(s3_server())
        bucket = f"s3=s3://{BUCKET}/e2e?endpoint={s3.url}"
        disk = f"cpu=256MiB,disk={folder / 'disk'}:1GB"
        specs = iter((f"{disk},{bucket},port={nodes[0].port}", f"cpu=256MiB,{bucket},port={nodes[1].port}"))

        def command(port: int, redis_url: str) -> Sequence[str]:
            listen = ("--host", "127.0.0.1", "--port", str(port), "--redis-url", redis_url)
            return kvlane("serve", str(tiny_model()), *ENGINE, *listen, "--tiers", next(specs))

        # Computing this model's tokens costs so little that nothing would be loaded at S3's usual speed, nor
        # perhaps at what a busy machine's is measured to be.
        speeds = {tier: {"gb_per_s": 100, "latency_ms": 0} for tier in ("cpu", "disk", "object")}
        given = {"KVLANE_TIER_SPEEDS": json.dumps(speeds), "VLLM_SERVER_DEV_MODE": "1"}
        given["KVLANE_PREFILL_TOKENS_PER_S"] = "200"
        for name, value in {**ENGINE_ENV, **given}.items():
            patch.setenv(name, value)
        for node in nodes:
            stack.callback(node.stop)
        options = FleetOptions(command, start_timeout_s=300)
        fleet = stack.enter_context(local_fleet(options, tmp_path_factory.mktemp("logs")))
        fleet.wait_until_ready()
        yield Tiers(fleet, nodes, disk)


def ask(url: str, prompt: list[int], **fields: Any) -> httpx.Response:
    body = {"model": NAME, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S).raise_for_status()


def tokens_of(answer: httpx.Response) -> list[int]:
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def num_loaded(engine: str) -> float:
    """Return vLLM's own count of prompt tokens that came from outside of the engine."""
    text = httpx.get(f"http://{engine}/metrics", timeout=PATIENCE_S).text
    found = re.search(r"^vllm:external_prefix_cache_hits_total{.*} ([\d.e+]+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_what_a_dead_engine_has_computed_is_known_and_loaded_by_another(tiers: Tiers):
    first, second = tiers.fleet.engines
    prompt = [draw.randrange(100, 1_000) for _ in range(NUM_TOKENS)]
    ask(f"http://{first}", prompt)
    held = {"device": 0, "object": NUM_TOKENS}
    eventually(lambda: tiers.tier_tokens(prompt)[second] == held, timeout_s=PATIENCE_S)
    assert tiers.tier_tokens(prompt)[first].keys() == {"device", "cpu"}  # the fastest that has a chunk
    tiers.fleet.processes.kill("worker-0")
    eventually(lambda: registered(tiers.fleet).keys() == {second}, timeout_s=PATIENCE_S)

    turn = [*prompt, *(draw.randrange(100, 1_000) for _ in range(40))]
    before = num_loaded(second)
    answer = ask(tiers.fleet.url, turn)
    assert answer.headers["x-kvlane-worker"] == second
    receipt = httpx.get(f"{tiers.fleet.admin_url}/decisions/{answer.headers['x-kvlane-decision']}").json()
    [candidate] = receipt["candidates"]
    assert [(load["tier"], load["num_tokens"]) for load in candidate["loads"]] == [("object", NUM_TOKENS)]
    assert (candidate["loaded_tokens"], candidate["uncached_tokens"]) == (NUM_TOKENS, 40)
    assert num_loaded(second) - before == NUM_TOKENS

    # So the heatmap shows it, beside what the engines hold themselves.
    where = ("--redis-url", tiers.fleet.redis_url, "--admin", tiers.fleet.admin_url)
    blocks, chunks = json.loads(run_kvlane("inspect", "heatmap", "--json", *where).stdout)
    assert [(row["holder"], row["tier"]) for row in blocks["rows"]] == [(second, "device")]
    shares = {row["tier"]: row["shares"] for row in chunks["rows"]}
    assert shares["object"] == [1] * (NUM_TOKENS // 256)
    assert sum(chunks["num_blocks"]) == NUM_TOKENS // 256

    # The same tokens as if nothing had been loaded.
    httpx.post(f"http://{second}/reset_prefix_cache", timeout=PATIENCE_S).raise_for_status()
    computed = ask(f"http://{second}", turn, kv_transfer_params={LOAD_KEY: 0})
    assert tokens_of(computed) == tokens_of(answer)
    assert num_loaded(second) - before == NUM_TOKENS


def test_after_a_restart_of_everything_but_the_disk_it_is_known_before_a_request(tiers: Tiers):
    [disk] = [name for name in tiers.stores() if name.endswith("disk")]
    num_chunks = tiers.stores()[disk]
    assert num_chunks >= NUM_TOKENS // 256
    tiers.nodes[0].stop()
    with redis.Redis.from_url(tiers.fleet.redis_url) as client:
        client.flushall()
    assert disk not in tiers.stores()
    with tier_node(tiers.disk, tiers.nodes[0].port, redis_url=tiers.fleet.redis_url):
        eventually(lambda: tiers.stores().get(disk) == num_chunks, timeout_s=PATIENCE_S)
