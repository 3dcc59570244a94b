import pytest

from gateway.decision import Caller
from gateway.labels import parse_selector
from gateway.tenants.keys import hash_key, new_key
from gateway.tenants.roster import load_roster
from kvindex.errors import ConfigError

KEY, BATCH_KEY = new_key(), new_key()
HASH, BATCH_HASH = hash_key(KEY), hash_key(BATCH_KEY)

FILE = f"""
tenants:
  - name: acme
    weight: 2
    ttft_target_ms: 800
    keys:
      - sha256: {HASH}
        note: the web shop
      - sha256: {BATCH_HASH}
        ttft_target_ms: 5000
        priority: 10
        labels: "!gpu"
    labels: gpu=h200,zone!=a
    requests_per_s: 20
  - name: beta
    keys: [{{sha256: {"a" * 64}}}]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tenants.yaml"
    path.write_text(FILE)
    return path


def test_a_key_is_known_by_its_hash_and_has_its_own_level_before_its_tenants(file):
    roster = load_roster(file)
    assert roster.caller(KEY) == Caller(
        "acme", weight=2, priority=0, ttft_target_ms=800, labels=parse_selector("gpu=h200,zone!=a")
    )
    assert roster.caller(BATCH_KEY) == Caller(
        "acme", weight=2, priority=10, ttft_target_ms=5000, labels=parse_selector("!gpu")
    )
    assert roster.tenants["acme"].requests_per_s == 20
    assert roster.tenants["beta"].max_concurrent is None


@pytest.mark.parametrize("key", ["", HASH, KEY[:-1], KEY + "x", new_key()])
def test_nothing_else_is_a_key(file, key):
    assert load_roster(file).caller(key) is None


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("tenants: [", "not YAML"),
        ("[]", "valid dictionary"),
        ("tenants: []\nlimits: 1", "limits: Extra"),
        ("tenants: [{name: a, keys: []}]", "keys: "),
        ("tenants: [{name: a/b, keys: [{sha256: KEYHASH}]}]", "name: "),
        ("tenants: [{name: a, keys: [{sha256: abc}]}]", "64 hex digits"),
        ("tenants: [{name: a, labels: gpu>1, keys: [{sha256: KEYHASH}]}]", "no condition on a label"),
        ("tenants: [{name: a, weight: 0, keys: [{sha256: KEYHASH}]}]", "weight"),
        ("tenants: [{name: a, requests_per_s: 0, keys: [{sha256: KEYHASH}]}]", "requests_per_s"),
        ("tenants: [{name: a, keys: [{sha256: KEYHASH}, {sha256: KEYHASH}]}]", "the same key twice"),
        (
            "tenants: [{name: a, keys: [{sha256: KEYHASH}]}, {name: a, keys: [{sha256: OTHER}]}]",
            "name twice: a",
        ),
    ],
)
def test_a_wrong_file_is_one_line(file, text, finding):
    file.write_text(text.replace("KEYHASH", HASH).replace("OTHER", BATCH_HASH))
    with pytest.raises(ConfigError, match=finding) as caught:
        load_roster(file)
    assert "\n" not in str(caught.value)


def test_a_key_in_place_of_its_hash_is_refused_and_not_repeated(file):
    file.write_text(FILE.replace(HASH, KEY))
    with pytest.raises(ConfigError, match="write its hash") as caught:
        load_roster(file)
    assert KEY not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_roster(tmp_path / "none.yaml")
