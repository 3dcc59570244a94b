"""Real engines, LMCache servers, a disk and S3: what one engine has computed another reads, or computes."""

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from connectors.bench.ports import adjacent_ports, free_ports
from connectors.params import new_transfer_id
from kvindex.blocks import Pool
from kvindex.chunks import chunk_blocks, chunk_pool, hash_chunks
from kvindex.config import index_config
from kvindex.redis_index import RedisIndexReader
from kvindex.stores import LOAD_KEY
from kvindex.worker import Tier
from tests.support import s3_faults
from tests.support.cli import kvlane
from tests.support.lora_adapter import make_adapter
from tests.support.pair import Pair, TransferEngine
from tests.support.s3_faults import Fault, FaultyS3, faulty_s3_server
from tests.support.tiers import BUCKET, TierEngine, TierNode, environment, tier_node
from tests.support.vllm_engine import BLOCK_SIZE, MODEL_NAME, start_engine, tiny_model
from tests.support.waiting import eventually

pytestmark = pytest.mark.vllm

PATIENCE_S = 120.0
CHUNK = 256
PREFIX = "fleet/one"
MOST_RUNNING = 16
# On a busy machine a server that is slow to answer is given up for a while, and nothing is stored then.
PATIENT = {"lmcache.mp.heartbeat_interval": 5, "lmcache.mp.mq_timeout": 10}

draw = random.Random(11)


def settings(transfer_port: int) -> dict[str, object]:
    transfer = {"transfer_port": transfer_port, "transfer_metrics_port": transfer_port + 1, "lease_s": 60}
    return {**PATIENT, **{f"kvlane.{name}": value for name, value in transfer.items()}}


def prompt(num_tokens: int) -> list[int]:
    return [draw.randrange(100, 1_000) for _ in range(num_tokens)]


class Fleet(NamedTuple):
    """Two nodes that share a bucket: the first has a disk as well, the second only memory."""

    first: TierEngine
    second: TierEngine
    disk: Path
    s3: FaultyS3
    transfer: Pair
    """The same engines: the second prefills for the first."""

    def files(self) -> list[Path]:
        return sorted(self.disk.glob("*.data"))


@pytest.fixture(scope="module")
def fleet(redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    model = tiny_model()
    folder = tmp_path_factory.mktemp("tiers")
    for seed, name in enumerate(("one", "two")):
        make_adapter(folder / name, model, seed=seed)
    lora = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--lora-modules"]
    lora += [f"{name}={folder / name}" for name in ("one", "two")]
    ports = free_ports(2)
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        s3 = stack.enter_context(faulty_s3_server())
        bucket = f"s3=s3://{BUCKET}/{PREFIX}?endpoint={s3.url}"
        first = TierNode(adjacent_ports(2))
        stack.callback(first.stop)
        second = stack.enter_context(
            tier_node(f"cpu=256MiB,{bucket}", adjacent_ports(2), redis_url=redis_server)
        )
        tiers = (
            # The first engine starts its node's server, the second joins one.
            f"cpu=256MiB,disk={folder / 'disk'}:1GB,{bucket},port={first.port}",
            f"lmcache={second.address},api=127.0.0.1:{second.port + 1}",
        )
        transfer_port = adjacent_ports(4)
        transfer_ports = (transfer_port, transfer_port + 2)
        starts = [
            pool.submit(
                stack.enter_context,
                start_engine(
                    port,
                    *("--tiers", spec, "--max-num-batched-tokens", "1024", *lora),
                    *("--max-num-seqs", str(MOST_RUNNING)),
                    *("--kv-transfer-config", json.dumps({"kv_connector_extra_config": settings(transfer)})),
                    command=("kvlane", "serve"),
                    env={**environment(redis_server), "UCX_TLS": "tcp,self"},
                ),
            )
            for port, transfer, spec in zip(ports, transfer_ports, tiers, strict=True)
        ]
        engines = [start.result() for start in starts]
        decode, prefill = (
            TransferEngine(engine, port, port + 1)
            for engine, port in zip(engines, transfer_ports, strict=True)
        )
        yield Fleet(
            TierEngine(engines[0], first),
            TierEngine(engines[1], second),
            folder / "disk",
            s3,
            Pair(prefill, decode),
        )


async def stored(fleet: Fleet, prompts: list[list[int]], **fields: object) -> list[list[int]]:
    """Have the first engine compute prompts; return its outputs once all chunks are on disk and in S3."""
    num_files, num_keys = len(fleet.files()), len(fleet.s3.keys(PREFIX))
    outputs = await fleet.first.complete_all(prompts, **fields)
    num_chunks = sum(len(each) // CHUNK for each in prompts)
    await eventually(
        lambda: (
            len(fleet.files()) == num_files + num_chunks
            and len(fleet.s3.keys(PREFIX)) == num_keys + num_chunks
        ),
        PATIENCE_S,
    )
    return outputs


async def loaded(
    engine: TierEngine, prompts: list[list[int]], **fields: object
) -> tuple[list[list[int]], int]:
    """Return an engine's outputs, and how many tokens it did not compute itself, with its own cache empty."""
    await engine.forget()
    before = await engine.num_hit_tokens()
    outputs = await engine.complete_all(prompts, **fields)
    return outputs, int(await engine.num_hit_tokens() - before)


async def test_another_node_loads_from_s3_what_it_never_computed(fleet: Fleet):
    prompts = [prompt(2 * CHUNK + 40) for _ in range(100)]
    computed = await stored(fleet, prompts)
    before = fleet.second.node.num_loads("s3")
    # A few at a time: what a busy machine's S3 does not answer in time is computed.
    for start in range(0, 100, 10):
        few = slice(start, start + 10)
        assert await loaded(fleet.second, prompts[few]) == (computed[few], 10 * 2 * CHUNK)
    await eventually(lambda: fleet.second.node.num_loads("s3") > before, PATIENCE_S)


async def test_the_index_says_which_tiers_have_a_prompt_and_who_reaches_them(fleet: Fleet, redis_server: str):
    tokens = prompt(2 * CHUNK)
    reader = RedisIndexReader(index_config(redis_server))
    _, workers = await reader.workers(Pool(MODEL_NAME, BLOCK_SIZE))
    first, second = (
        next(each.worker.tiers for each in workers if each.worker.endpoint == engine.engine.endpoint)
        for engine in (fleet.first, fleet.second)
    )
    assert first is not None
    assert second is not None
    assert (first.model, first.chunk_size) == (second.model, second.chunk_size) == (second.model, CHUNK)
    assert len(set(first.stores)) == 3
    (shared,) = set(first.stores) & set(second.stores)
    assert shared == fleet.s3.location(PREFIX).url
    pool = chunk_pool(first.model, CHUNK)
    blocks = chunk_blocks(hash_chunks(tokens, CHUNK), "", 1)

    async def holders() -> list[set[str]]:
        _, stores = await reader.stores(pool)
        names = {each.slot: each.store.name for each in stores}
        found = await reader.holders_of(pool, blocks)
        return [{names[slot] for slot in found[block] if slot in names} for block in blocks]

    async def everywhere() -> bool:
        return await holders() == [set(first.stores)] * 2

    async def in_the_bucket() -> bool:
        return await holders() == [{shared}] * 2

    await stored(fleet, [tokens])
    await eventually(everywhere, PATIENCE_S)
    fleet.first.node.clear_memory()
    for file in fleet.files():
        file.unlink()
    await eventually(in_the_bucket, PATIENCE_S)
    await reader.close()


async def test_an_engine_that_lost_its_memory_loads_from_disk(fleet: Fleet, redis_server: str):
    prompts = [prompt(3 * CHUNK + 1) for _ in range(4)]
    computed = await stored(fleet, prompts)
    fleet.first.node.clear_memory()
    disk, s3 = fleet.first.node.num_loads("disk"), fleet.first.node.num_loads("s3")
    assert await loaded(fleet.first, prompts) == (computed, 4 * 3 * CHUNK)
    await eventually(lambda: fleet.first.node.num_loads("disk") > disk, PATIENCE_S)
    assert fleet.first.node.num_loads("s3") == s3
    reader = RedisIndexReader(index_config(redis_server))
    worker = next(
        each
        for each in (await reader.workers(Pool(MODEL_NAME, BLOCK_SIZE)))[1]
        if each.worker.endpoint == fleet.first.engine.endpoint
    )
    # How loads were is in the index: into memory by the server, and from there by the worker.
    assert worker.load.tier_gb_per_s > 0
    access = worker.worker.tiers
    assert access is not None

    async def is_measured() -> bool:
        _, stores = await reader.stores(chunk_pool(access.model, CHUNK))
        speeds = {each.store.tier: each.speed for each in stores if each.store.name in access.stores}
        assert speeds[Tier.CPU] is None
        disk = speeds[Tier.DISK]
        return disk is not None and disk.gb_per_s > 0 and access.server != ""

    await eventually(is_measured, PATIENCE_S)
    await reader.close()


async def test_a_prompt_is_loaded_as_far_as_it_was_stored(fleet: Fleet):
    start = prompt(2 * CHUNK)
    await stored(fleet, [start])
    longer = start + prompt(3 * CHUNK)
    _, num_hit_tokens = await loaded(fleet.first, [longer])
    assert num_hit_tokens == 2 * CHUNK
    # The whole of a prompt is never loaded: its last token is computed.
    assert (await loaded(fleet.first, [start]))[1] == 2 * CHUNK - 1


async def test_a_prompt_is_loaded_no_further_than_told(fleet: Fleet):
    tokens = prompt(4 * CHUNK + 7)
    [computed] = await stored(fleet, [tokens])
    told = {0: 0, CHUNK - 1: 0, 2 * CHUNK: 2 * CHUNK, 3 * CHUNK + 5: 3 * CHUNK, 10_000: 4 * CHUNK}
    for engine in (fleet.first, fleet.second):
        for limit_tokens, num_hit_tokens in told.items():
            params = {LOAD_KEY: limit_tokens}
            assert await loaded(engine, [tokens], kv_transfer_params=params) == ([computed], num_hit_tokens)


BYTES_PER_BLOCK = BLOCK_SIZE * 4 * 2 * 2 * 32 * 2
RECEIVED = "kvlane_transfer_moved_bytes_total{role=receive}"

OWNERS = [{}, {"model": "one"}, {"model": "two"}, {"cache_salt": "a"}, {"model": "one", "cache_salt": "a"}]


@pytest.mark.parametrize("tier", ["cpu", "disk", "s3"])
async def test_adapters_and_salts_share_nothing(fleet: Fleet, tier: str):
    tokens = prompt(2 * CHUNK + 9)
    engine = fleet.second if tier == "s3" else fleet.first

    def num_kept() -> int:
        return len(fleet.s3.keys(PREFIX) if tier == "s3" else fleet.files())

    outputs = []
    for owner in OWNERS:
        before = num_kept()
        # The same tokens are there, of all owners before.
        computed, num_hit_tokens = await loaded(engine, [tokens], **owner)
        assert num_hit_tokens == 0
        outputs += computed
        await eventually(lambda wanted=before + 2: num_kept() == wanted, PATIENCE_S)
        if tier != "cpu":
            engine.node.clear_memory()
    assert len({tuple(output) for output in outputs}) == 3, "the adapters make a difference"
    for owner, output in zip(OWNERS, outputs, strict=True):
        assert await loaded(engine, [tokens], **owner) == ([output], 2 * CHUNK)


async def test_what_lies_in_s3_comes_near_while_a_request_waits_for_its_turn(fleet: Fleet):
    tokens = prompt(3 * CHUNK + 9)
    [computed] = await stored(fleet, [tokens])
    await fleet.second.forget()
    before = fleet.second.node.num_loads("s3")
    # As many as may run do, for longer than anybody waits here.
    running = [asyncio.create_task(fleet.second.complete(prompt(20), 4000)) for _ in range(MOST_RUNNING)]

    async def is_full() -> bool:
        return await fleet.second.num_running() == MOST_RUNNING

    await eventually(is_full, PATIENCE_S)
    hits = await fleet.second.num_hit_tokens()
    waiting = asyncio.create_task(fleet.second.complete(tokens))
    try:
        await eventually(lambda: fleet.second.node.num_loads("s3") > before, PATIENCE_S)
        assert not any(task.done() for task in (*running, waiting))
        assert await fleet.second.num_hit_tokens() == hits
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    assert await waiting == computed
    assert await fleet.second.num_hit_tokens() == hits + 3 * CHUNK
    assert fleet.second.node.num_loads("s3") == before + 1


def damage(files: list[Path]) -> None:
    """Damage files in every way that a disk or a person can."""
    flipped, truncated, longer, emptied, mistaken, other = files
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    os.truncate(truncated, truncated.stat().st_size - 1)
    with longer.open("ab") as file:
        file.write(b"0")
    emptied.write_bytes(b"")
    mistaken.write_bytes(other.read_bytes())


async def test_damaged_files_are_computed_again_and_replaced(fleet: Fleet):
    before, keys = set(fleet.files()), set(fleet.s3.keys(PREFIX))
    prompts = [prompt(CHUNK + 20) for _ in range(6)]
    computed = await stored(fleet, prompts)
    files = sorted(set(fleet.files()) - before)
    contents = [file.read_bytes() for file in files]
    client = fleet.s3.client()
    for key in set(fleet.s3.keys(PREFIX)) - keys:
        client.delete_object(Bucket=BUCKET, Key=key)
    damage(files)
    fleet.first.node.clear_memory()
    # One is whole.
    assert await loaded(fleet.first, prompts) == (computed, CHUNK)
    assert fleet.first.node.num_damaged("disk") > 0
    await eventually(lambda: [file.exists() and file.read_bytes() for file in files] == contents, PATIENCE_S)


async def test_damaged_and_missing_objects_are_computed(fleet: Fleet):
    before = set(fleet.s3.keys(PREFIX))
    prompts = [prompt(CHUNK + 20) for _ in range(6)]
    computed = await stored(fleet, prompts)
    flipped, truncated, longer, mistaken, missing, whole = sorted(set(fleet.s3.keys(PREFIX)) - before)
    client = fleet.s3.client()

    def content(key: str) -> bytes:
        return client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    first = content(flipped)
    for key, body in {
        flipped: first[:100] + bytes([first[100] ^ 1]) + first[101:],
        truncated: content(truncated)[:-1],
        longer: content(longer) + b"0" * 100_000,
        mistaken: content(whole),
    }.items():
        client.put_object(Bucket=BUCKET, Key=key, Body=body)
    client.delete_object(Bucket=BUCKET, Key=missing)
    assert await loaded(fleet.second, prompts) == (computed, CHUNK)


async def split(fleet: Fleet, tokens: list[int], peer: str = "", **told: int) -> tuple[list[int], int]:
    """Have the second engine prefill for the first; return the output, and how many blocks were sent.

    Args:
        fleet: whose first engine has nothing of the prompt in its own cache.
        tokens: the prompt.
        peer: who is to send, if not the second engine.
        told: what else the first engine is told in its `kv_transfer_params`.
    """
    prefill, decode = fleet.transfer.prefill, fleet.transfer.decode
    before = (await decode.metrics())[RECEIVED]
    send = {"transfer_id": new_transfer_id(), "role": "send"}
    receive = {**send, "role": "receive", "peer": peer or prefill.peer}
    answer = asyncio.create_task(decode.complete(tokens, 8, kv_transfer_params={"kvlane": receive, **told}))
    if not peer:

        async def has_looked_up() -> bool:
            return (await decode.metrics())["kvlane_transfer_live{role=receive}"] > 0

        # Before the other stores what it computes in the bucket, where the first would find it.
        await eventually(has_looked_up, PATIENCE_S)
        await prefill.complete(tokens, 1, kv_transfer_params={"kvlane": send})
    output = await answer
    num_bytes = (await decode.metrics())[RECEIVED] - before
    return output, round(num_bytes / BYTES_PER_BLOCK)


async def test_what_tiers_have_of_a_split_prompt_is_not_sent_and_the_rest_is_stored(fleet: Fleet):
    start = prompt(2 * CHUNK)
    await stored(fleet, [start])
    await fleet.first.forget()
    tokens = start + prompt(2 * CHUNK + 40)
    num_files, before = len(fleet.files()), await fleet.first.num_hit_tokens()
    output, num_sent_blocks = await split(fleet, tokens)
    assert num_sent_blocks == 2 * CHUNK // BLOCK_SIZE + 2
    assert await fleet.first.num_hit_tokens() - before == 4 * CHUNK + 40
    assert [output] == await fleet.second.complete_all([tokens], cache_salt="whole")
    # The first engine computed none of it, and has all of it on its disk.
    await eventually(lambda: len(fleet.files()) == num_files + 2, PATIENCE_S)
    fleet.first.node.clear_memory()
    assert await loaded(fleet.first, [tokens]) == ([output], 4 * CHUNK)


async def test_a_split_request_reads_tiers_as_far_as_it_is_told(fleet: Fleet):
    start = prompt(3 * CHUNK)
    await stored(fleet, [start])
    tokens = start + prompt(40)
    outputs = []
    for limit_tokens in (0, CHUNK, 2 * CHUNK + 1):
        await fleet.first.forget()
        output, num_sent_blocks = await split(fleet, tokens, **{LOAD_KEY: limit_tokens})
        assert num_sent_blocks == (3 * CHUNK - limit_tokens // CHUNK * CHUNK) // BLOCK_SIZE + 2
        outputs.append(output)
    assert outputs == 3 * await fleet.second.complete_all([tokens], cache_salt="whole")


async def test_a_split_prompt_of_whole_chunks_ends_on_the_wire(fleet: Fleet):
    tokens = prompt(2 * CHUNK)
    computed = await stored(fleet, [tokens])
    await fleet.first.forget()
    assert await split(fleet, tokens) == (computed[0], CHUNK // BLOCK_SIZE)


async def test_what_tiers_have_is_used_where_nobody_sends_the_rest(fleet: Fleet):
    start = prompt(2 * CHUNK)
    await stored(fleet, [start])
    tokens = start + prompt(CHUNK + 40)
    await fleet.first.forget()
    num_files = len(fleet.files())
    output, num_sent_blocks = await split(fleet, tokens, peer=f"127.0.0.1:{free_ports(1)[0]}")
    assert num_sent_blocks == 0
    assert [output] == await fleet.second.complete_all([tokens], cache_salt="whole")
    await eventually(lambda: len(fleet.files()) == num_files + 1, PATIENCE_S)
    fleet.first.node.clear_memory()
    assert await loaded(fleet.first, [tokens]) == ([output], 3 * CHUNK)


async def test_split_requests_that_are_aborted_leave_nothing_in_use(fleet: Fleet):
    starts = [prompt(2 * CHUNK) for _ in range(6)]
    await stored(fleet, starts)
    fleet.first.node.clear_memory()
    await fleet.first.forget()
    tasks = [
        asyncio.create_task(fleet.transfer.complete(start + prompt(2 * CHUNK + 9), 200)) for start in starts
    ]
    for task in tasks:
        await asyncio.sleep(0.05)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await eventually(fleet.transfer.prefill.is_clean, PATIENCE_S)
    await eventually(fleet.transfer.decode.is_clean, PATIENCE_S)
    await fleet.first.forget()  # refused while a block is in use


async def test_a_server_that_is_killed_costs_hits_and_no_answers(fleet: Fleet):
    prompts = [prompt(2 * CHUNK + 5) for _ in range(4)]
    computed = await stored(fleet, prompts)
    node = fleet.first.node
    died = node.server_pid()
    os.kill(died, signal.SIGKILL)
    # Halves of split prompts get all over the wire.
    tokens = prompts[0][:CHUNK] + prompt(CHUNK)
    output, _ = await split(fleet, tokens)
    outputs, _ = await loaded(fleet.first, prompts)
    assert outputs == computed
    assert [output] == await fleet.second.complete_all([tokens], cache_salt="whole")
    await eventually(lambda: node.is_up() and node.server_pid() != died, PATIENCE_S)

    async def hits() -> bool:
        outputs, num_hit_tokens = await loaded(fleet.first, prompts)
        assert outputs == computed
        return num_hit_tokens == 4 * 2 * CHUNK

    await eventually(hits, PATIENCE_S)


async def test_requests_that_are_aborted_leave_nothing_in_use(fleet: Fleet):
    prompts = [prompt(3 * CHUNK) for _ in range(6)]
    await stored(fleet, prompts)
    fleet.first.node.clear_memory()
    await fleet.first.forget()
    tasks = [asyncio.create_task(fleet.first.complete(each, 200)) for each in prompts]
    for task in tasks:
        await asyncio.sleep(0.02)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await fleet.first.forget()  # refused while a block is in use


def test_chunks_of_a_server_that_do_not_fit_are_refused_before_an_engine_starts(fleet: Fleet):
    node = fleet.second.node
    spec = f"lmcache={node.address},api=127.0.0.1:{node.port + 1}"
    refused = kvlane("serve", "no-model", "--block-size", "48", "--tiers", spec)
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        "--tiers: chunks of 256 tokens are not whole blocks of 48: set chunk= to a multiple"
    )


async def test_tiers_are_warmed_and_emptied_by_command(fleet: Fleet, tmp_path: Path):
    prompts = [prompt(2 * CHUNK + 5) for _ in range(3)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"model": MODEL_NAME, "prompt": each}) for each in prompts))
    num_files = len(fleet.files())
    warmed = kvlane("tier", "warm", str(file), "--url", fleet.first.engine.url)
    assert warmed.returncode == 0, warmed.stderr
    assert f"3 of 3 prompts, {sum(map(len, prompts))} tokens" in warmed.stdout
    await eventually(lambda: len(fleet.files()) == num_files + 6, PATIENCE_S)
    server = ("--server", fleet.first.node.api)
    assert kvlane("tier", "clear", "disk", *server, stdin="n").returncode == 1
    assert len(fleet.files()) == num_files + 6
    cleared = kvlane("tier", "clear", "cpu", "disk", "object", "--yes", *server)
    assert cleared.returncode == 0, cleared.stderr
    assert f"{num_files + 6} objects deleted" in cleared.stdout
    assert (fleet.files(), fleet.s3.keys(PREFIX)) == ([], [])
    _, num_tokens = await loaded(fleet.first, prompts)
    assert num_tokens == 0


FAULTS = {
    "403": s3_faults.FORBIDDEN,
    "expired": s3_faults.EXPIRED,
    "500": s3_faults.FAILING,
    "silent": s3_faults.SILENT,
    "loads cut": s3_faults.CUT.of("GET"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_bucket_that_fails_is_left_alone_and_comes_back_by_itself(fleet: Fleet, fault: Fault):
    prompts = [prompt(2 * CHUNK + 5) for _ in range(2)]
    computed = await stored(fleet, prompts)
    node = fleet.second.node
    with fleet.s3.failing(fault):
        assert await loaded(fleet.second, prompts) == (computed, 0)
        await eventually(lambda: node.is_off("s3"), PATIENCE_S)

    async def is_back() -> bool:
        node.clear_memory()
        outputs, num_tokens = await loaded(fleet.second, prompts)
        assert outputs == computed
        # A request of before may still fail and switch it off once more.
        return num_tokens == 2 * 2 * CHUNK and not node.is_off("s3")

    await eventually(is_back, PATIENCE_S)


async def test_a_bucket_that_is_gone_switches_itself_off(fleet: Fleet):
    fleet.s3.process.kill()
    prompts = [prompt(2 * CHUNK + 5) for _ in range(4)]
    computed = await fleet.first.complete_all(prompts)
    await eventually(lambda: len(fleet.files()) >= 8, PATIENCE_S)
    assert (await loaded(fleet.second, prompts)) == (computed, 0)
    fleet.first.node.clear_memory()
    assert (await loaded(fleet.first, prompts))[0] == computed
