import pytest

from gateway.tenants import metrics
from gateway.tenants.keys import hash_key, new_key
from gateway.tenants.roster_file import RosterFile
from kvindex.errors import ConfigError
from tests.support.waiting import eventually

OLD, NEW = new_key(), new_key()


def content(key):
    return f"tenants: [{{name: acme, keys: [{{sha256: {hash_key(key)}}}]}}]"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tenants.yaml"
    path.write_text(content(OLD))
    return path


@pytest.fixture
async def watched(file):
    roster_file = RosterFile(file)
    roster_file.start(interval_s=0.01)
    yield roster_file
    await roster_file.stop()


def loads(outcome):
    return metrics.FILE_LOADS.labels(outcome)._value.get()


async def test_a_changed_file_is_taken_while_the_process_runs(file, watched):
    assert watched.roster.caller(OLD)
    # As a mounted secret is replaced: by renaming.
    new = file.with_name("new")
    new.write_text(content(NEW))
    new.replace(file)
    await eventually(lambda: watched.roster.caller(NEW))
    assert watched.roster.caller(OLD) is None


@pytest.mark.parametrize("bad", ["tenants: [", "tenants: [{name: acme, keys: []}]", None])
async def test_a_bad_file_is_refused_once_and_the_old_tenants_stay(file, watched, bad):
    before = loads("refused")
    if bad is None:
        file.unlink()
    else:
        new = file.with_name("new")
        new.write_text(bad)
        new.replace(file)
    await eventually(lambda: loads("refused") == before + 1)
    watched.reload()
    assert loads("refused") == before + 1
    assert watched.roster.caller(OLD)
    file.write_text(content(NEW))
    await eventually(lambda: watched.roster.caller(NEW))


def test_at_the_start_a_bad_file_ends_the_process(file):
    file.write_text("tenants: [")
    with pytest.raises(ConfigError):
        RosterFile(file)
