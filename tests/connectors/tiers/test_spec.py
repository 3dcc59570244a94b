"""`--tiers`: what it says, and what is wrong with it."""

from pathlib import Path

import pytest

from connectors.tiers.s3_location import S3Location
from connectors.tiers.spec import Bucket, Disk, JoinedTiers, Tiers, parse_tiers
from kvindex.errors import ConfigError


def parse(text: str, **environment: str) -> Tiers | JoinedTiers:
    return parse_tiers(text, environment)


def test_all_tiers_of_a_node():
    assert parse("cpu=20GB, disk=/var/kv:200GB, s3=s3://bucket/a/prefix/", AWS_REGION="eu-west-1") == Tiers(
        cpu_bytes=20 * 10**9,
        disk=Disk(Path("/var/kv"), 200 * 10**9),
        s3=Bucket(S3Location("bucket", "a/prefix", "eu-west-1"), 0),
        chunk_size=256,
        port=6555,
    )


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("2kb", 2000),
        ("1.5GB", 1_500_000_000),
        ("4GiB", 4 << 30),
        ("1T", 10**12),
        ("3 MiB", 3 << 20),
    ],
)
def test_sizes(text: str, num_bytes: int):
    assert parse(f"cpu={text}") == Tiers(cpu_bytes=num_bytes)


def test_a_disk_without_a_size_is_filled():
    assert parse("cpu=1GB,disk=/var/kv").disk == Disk(Path("/var/kv"), 0)


@pytest.mark.parametrize(
    ("text", "environment", "bucket"),
    [
        (
            "s3://b?endpoint=http://127.0.0.1:9000",
            {},
            Bucket(S3Location("b", "", "us-east-1", "http://127.0.0.1:9000"), 0),
        ),
        (
            "s3://b/p?endpoint=http://127.0.0.1:9000:2TB",
            {},
            Bucket(S3Location("b", "p", "us-east-1", "http://127.0.0.1:9000"), 2 * 10**12),
        ),
        ("s3://b/p:5GB", {"AWS_DEFAULT_REGION": "x"}, Bucket(S3Location("b", "p", "x"), 5 * 10**9)),
        (
            "s3://b/p?region=y",
            {"AWS_REGION": "x", "AWS_ENDPOINT_URL_S3": "https://s3.here/"},
            Bucket(S3Location("b", "p", "y", "https://s3.here"), 0),
        ),
    ],
)
def test_where_a_bucket_is(text: str, environment: dict[str, str], bucket: Bucket):
    assert parse(f"cpu=1GB,s3={text}", **environment).s3 == bucket


def test_a_server_of_somebody_else():
    assert parse("lmcache=cache.local:6555") == JoinedTiers("cache.local:6555")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not NAME=VALUE"),
        ("cpu", "is not NAME=VALUE"),
        ("cpu=1GB,ssd=/x:1GB", "no tier 'ssd'"),
        ("cpu=1GB,cpu=2GB", "names cpu twice"),
        ("disk=/var/kv:1GB", "needs cpu=SIZE"),
        ("cpu=lots", "'lots' is no size"),
        ("cpu=0", "'0' is no size"),
        ("cpu=-1GB", "is no size"),
        ("cpu=1GB,disk=/var/kv:much", "'much' is no size"),
        ("cpu=1GB,disk=var/kv:1GB", "an absolute path"),
        ("cpu=1GB,s3=bucket/prefix", "write s3://BUCKET"),
        ("cpu=1GB,s3=s3://bucket", "in which region"),
        ("cpu=1GB,s3=s3://bucket?endpoint=host:9000", "is not a URL"),
        ("cpu=1GB,s3=s3://bucket?zone=a", "no option 'zone'"),
        ("cpu=1GB,chunk=0", "chunk=0 is not a number"),
        ("cpu=1GB,chunk=big", "chunk=big is not a number"),
        ("cpu=1GB,port=70000", "port=70000 is not a number"),
        ("lmcache=host", "is not HOST:PORT"),
        ("lmcache=host:0", "is not HOST:PORT"),
        ("lmcache=host:6555,cpu=1GB", "with no tier beside it"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, says: str):
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")) as raised:
        parse(text)
    assert "\n" not in str(raised.value)
