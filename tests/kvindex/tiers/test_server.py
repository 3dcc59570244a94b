"""What a server says of itself, recorded from LMCache 0.5.6, and what is made of it."""

import json
from collections.abc import Callable

import httpx
import pytest

from kvindex.errors import ConfigError, StoreUnavailable
from kvindex.tiers.server import Place, describe_server, list_place
from kvindex.worker import Tier
from tests.support.recordings import DATA

URL = "http://node:6580"
CONFIG = json.loads((DATA / "lmcache_0.5.6_config.json").read_text())
TYPES = {"adapters": [{"index": 0, "type_name": "fs"}, {"index": 1, "type_name": "s3"}]}


def client(config: object = CONFIG, types: object = TYPES) -> httpx.Client:
    answers = {"/config": config, "/config/adapters": types}

    def answer(request: httpx.Request) -> httpx.Response:
        found = answers.get(request.url.path)
        return httpx.Response(200, json=found) if found is not None else httpx.Response(503, text="not now")

    return httpx.Client(transport=httpx.MockTransport(answer))


def changed(change: Callable[[dict], object]) -> dict:
    config = json.loads(json.dumps(CONFIG))
    change(config)
    return config


def adapters(config: dict) -> list[dict]:
    return config["storage_manager"]["l2_adapter_config"]["adapters"]


def test_a_server_names_its_stores():
    description = describe_server(client(), URL)
    assert (description.instance_id, description.chunk_size) == ("idx", 256)
    assert description.memory == Place(name="idx/cpu", backend="dram", tier=Tier.CPU)
    assert description.places == (
        Place(name="idx/fs", backend="fs", tier=Tier.DISK, directory="/var/kv", listed_as="fs"),
        Place(
            name="s3://bucket.localhost:5001",
            backend="s3",
            tier=Tier.OBJECT,
            is_shared=True,
            listed_as="s3",
        ),
    )
    assert description.store_names == ("idx/cpu", "idx/fs", "s3://bucket.localhost:5001")


def test_our_own_adapters_say_what_their_place_is_called():
    config = changed(lambda each: adapters(each)[1].update(s3_endpoint="host:9000", url="s3://kv/prefix"))
    types = {"adapters": [{"type_name": "kvlane_disk"}, {"type_name": "kvlane_s3"}]}
    disk, bucket = describe_server(client(config, types), URL).places
    assert (disk.name, disk.tier, disk.directory) == ("idx/kvlane_disk", Tier.DISK, "/var/kv")
    assert (bucket.name, bucket.tier, bucket.listed_as) == ("s3://kv/prefix", Tier.OBJECT, "kvlane_s3")


def test_a_disk_that_several_servers_share_is_one_place():
    config = changed(lambda each: adapters(each)[0].update(shared=True))
    assert describe_server(client(config), URL).places[0].name == "fs:///var/kv"


def test_of_two_adapters_of_a_type_lmcache_lists_the_first():
    config = changed(lambda each: adapters(each).append(adapters(each)[1] | {"s3_endpoint": "other.host"}))
    types = {"adapters": [*TYPES["adapters"], {"type_name": "s3"}]}
    with client(config, types) as asking:
        *_, second = describe_server(asking, URL).places
        assert second.listed_as is None
        with pytest.raises(StoreUnavailable, match="not the first"):
            list_place(asking, URL, second)


def test_hashes_of_another_kind_are_refused():
    config = changed(lambda each: each["mp"].update(hash_algorithm="sha256_cbor"))
    with pytest.raises(ConfigError, match="--hash-algorithm blake3"):
        describe_server(client(config), URL)


@pytest.mark.parametrize(
    ("config", "types"),
    [(None, TYPES), ({}, TYPES), ([], TYPES), (CONFIG, {"adapters": []}), (CONFIG, {"adapters": [1, 2]})],
)
def test_a_server_that_says_something_else_is_not_believed(config, types):
    with pytest.raises(StoreUnavailable):
        describe_server(client(config, types), URL)


def test_a_directory_that_is_not_there_cannot_be_listed(tmp_path):
    place = Place(name="n/fs", backend="fs", tier=Tier.DISK, directory=str(tmp_path / "none"))
    with client() as asking, pytest.raises(StoreUnavailable, match="cannot be listed"):
        list_place(asking, URL, place)


def test_a_listing_that_cannot_be_read_is_no_listing():
    bucket = describe_server(client(), URL).places[1]

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"entries": [{"key": {"chunk_hash_hex": "zz"}}]})

    with httpx.Client(transport=httpx.MockTransport(answer)) as asking, pytest.raises(StoreUnavailable):
        list_place(asking, URL, bucket)
    with client() as asking, pytest.raises(StoreUnavailable, match="503"):
        list_place(asking, URL, bucket)
