import pytest

from gateway.config import load_config, split_address
from kvindex.errors import ConfigError


def test_command_line_beats_environment_beats_file(tmp_path, monkeypatch):
    file = tmp_path / "kvlane.yaml"
    file.write_text("listen: 10.0.0.1:1\nadmin_listen: 10.0.0.1:2\nredis_url: redis://file\n")
    monkeypatch.setenv("KVLANE_ADMIN_LISTEN", "10.0.0.2:2")
    monkeypatch.setenv("KVLANE_REDIS_URL", "redis://environment")
    config = load_config(file, redis_url="redis://option", listen=None)
    assert config.listen == "10.0.0.1:1"
    assert config.admin_listen == "10.0.0.2:2"
    assert config.redis_url == "redis://option"


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("redis_ulr: x", "redis_ulr"),
        ("listen: nowhere", "listen: .*'nowhere'"),
        ("stop_grace_s: soon", "stop_grace_s"),
        ("- listen", "not a YAML mapping"),
        ("listen: [", "not a YAML mapping"),
        ("word", "not a YAML mapping"),
    ],
)
def test_wrong_file_is_one_line(tmp_path, text, finding):
    file = tmp_path / "kvlane.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=finding) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "kvlane.yaml")


@pytest.mark.parametrize(
    ("address", "parts"),
    [("host:1", ("host", 1)), ("[::1]:65535", ("::1", 65535)), ("127.0.0.1:0", ("127.0.0.1", 0))],
)
def test_address_splits_into_host_and_port(address, parts):
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:x", "host:65536", "host:-1"])
def test_address_needs_host_and_port(address):
    with pytest.raises(ValueError, match="expected host:port"):
        split_address(address)


@pytest.mark.parametrize("secret", [None, "", "short"])
def test_tenants_need_a_secret_that_cannot_be_guessed(tmp_path, secret):
    with pytest.raises(ConfigError, match="openssl rand") as caught:
        load_config(tenants=tmp_path / "tenants.yaml", cache_salt_secret=secret)
    assert not secret or secret not in str(caught.value)


def test_secrets_are_shown_nowhere(monkeypatch):
    monkeypatch.setenv("KVLANE_CACHE_SALT_SECRET", "sesame" * 8)
    monkeypatch.setenv("KVLANE_WORKER_API_KEY", "sesame")
    assert "sesame" not in repr(load_config())
