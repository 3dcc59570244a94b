"""What a node cannot keep is said before anything starts."""

import socket
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from connectors.bench.ports import free_ports
from connectors.tiers import checks
from connectors.tiers.s3_location import S3Location
from connectors.tiers.spec import Bucket, Disk, JoinedTiers, Tiers
from kvindex.errors import ConfigError
from tests.support.tiers import S3Server, s3_server


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server:
        yield server


def check(disk: Disk | None = None, s3: Bucket | None = None, cpu_bytes: int = 1 << 20) -> None:
    checks.check_tiers(Tiers(cpu_bytes, disk, s3), has_gpu=False)


def test_what_can_be_kept_passes(tmp_path: Path, s3: S3Server):
    check(Disk(tmp_path / "new" / "folder", 1 << 20), Bucket(s3.location("prefix"), 0))
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_memory_that_is_not_there():
    with pytest.raises(ConfigError, match="is more than /dev/shm holds"):
        check(cpu_bytes=1 << 50)
    checks.check_tiers(Tiers(1 << 50), has_gpu=True)


def test_a_directory_that_cannot_be_written_to(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written to: Not a directory"):
        check(Disk(tmp_path / "file" / "folder", 0))
    with pytest.raises(ConfigError, match=r"disk=/proc/1 cannot be written to"):
        check(Disk(Path("/proc/1"), 0))


def test_a_disk_that_is_smaller(tmp_path: Path):
    with pytest.raises(ConfigError, match="more than its file system holds"):
        check(Disk(tmp_path, 1 << 60))


def test_a_bucket_that_is_not_there(s3: S3Server):
    with pytest.raises(ConfigError, match="there is no bucket 'nowhere'"):
        check(s3=Bucket(S3Location("nowhere", "", "us-east-1", s3.url), 0))


def test_an_s3_that_does_not_answer():
    (port,) = free_ports(1)
    with pytest.raises(ConfigError, match="Could not connect"):
        check(s3=Bucket(S3Location("bucket", "", "us-east-1", f"http://127.0.0.1:{port}"), 0))


def test_no_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="Unable to locate credentials"):
        check(s3=Bucket(s3.location(""), 0))


@pytest.mark.parametrize(
    ("found", "is_refused"),
    [("0.5.6", False), ("0.5.10", False), ("0.5.5", True), ("0.6.0", True), ("1.5.6", True), ("0.4.9", True)],
)
def test_versions_of_lmcache(found: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "version", lambda _: found)
    if not is_refused:
        checks.check_lmcache()
        return
    with pytest.raises(ConfigError, match=f"here is {found}"):
        checks.check_lmcache()


def test_no_lmcache(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(checks, "version", version)
    with pytest.raises(ConfigError, match="pip install --no-deps lmcache=="):
        checks.check_lmcache()


def test_chunks_are_whole_blocks():
    checks.check_block_size(256, 32)
    with pytest.raises(ConfigError, match="256 tokens are not whole blocks of 48"):
        checks.check_block_size(256, 48)
    checks.check_block_size(384, None)
    with pytest.raises(ConfigError, match="100 tokens may not be whole blocks: set --block-size, or chunk="):
        checks.check_block_size(100, None)


def test_a_server_to_join():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        checks.check_join(JoinedTiers(f"127.0.0.1:{port}"))
    with pytest.raises(ConfigError, match=f"no LMCache server answers at 127.0.0.1:{port}"):
        checks.check_join(JoinedTiers(f"127.0.0.1:{port}"))
