import json
import os
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from connectors.tiers.spec import parse_tiers
from kvindex.config import publisher_config
from kvindex.errors import ConfigError
from vllm_plugin import serve
from vllm_plugin.serve import app, complete_arguments

RUNNER = CliRunner()


def parsed(arguments: list[str], flag: str) -> dict[str, object]:
    assert arguments.count(flag) == 1
    value: dict[str, object] = json.loads(arguments[arguments.index(flag) + 1])
    return value


def test_the_connector_and_its_events_are_filled_in():
    arguments = complete_arguments(["--port", "9000", "--host", "10.0.0.7", "-tp", "2"], None)
    assert arguments[:6] == ["--port", "9000", "--host", "10.0.0.7", "-tp", "2"]
    assert parsed(arguments, "--kv-transfer-config") == {
        "kv_connector": "KvlaneConnector",
        "kv_connector_module_path": "vllm_plugin.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kvlane.endpoint": "10.0.0.7:9000"},
    }
    assert parsed(arguments, "--kv-events-config") == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "inproc://kvlane",
    }


def test_given_values_win_key_by_key():
    transfer = {"kv_role": "kv_consumer", "kv_connector_extra_config": {"kvlane.flush_ms": 3, "other": 1}}
    events = {"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}
    arguments = complete_arguments(
        [f"--kv-transfer-config={json.dumps(transfer)}", "--kv-events-config", json.dumps(events)],
        "1.2.3.4:80",
    )
    merged = parsed(arguments, "--kv-transfer-config")
    assert merged["kv_role"] == "kv_consumer"
    assert merged["kv_connector"] == "KvlaneConnector"
    extra = {"kvlane.endpoint": "1.2.3.4:80", "kvlane.flush_ms": 3, "other": 1}
    assert merged["kv_connector_extra_config"] == extra
    assert parsed(arguments, "--kv-events-config") == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        **events,
    }


def test_labels_are_given_one_by_one():
    given = ["tiny", "--dry-run", "--endpoint", "1.2.3.4:80", "--label", "gpu=h200", "--label", "note="]
    shown = shlex.split(RUNNER.invoke(app, given).stdout)
    extra = parsed(shown, "--kv-transfer-config")["kv_connector_extra_config"]
    assert extra == {"kvlane.endpoint": "1.2.3.4:80", "kvlane.labels": {"gpu": "h200", "note": ""}}
    config = publisher_config(extra)
    assert config.labels == {"gpu": "h200", "note": ""}


@pytest.mark.parametrize("wrong", ["gpu", "=h200", "gpu=a=b", "gpu=a,b", "-a=b", "gpu=a b"])
def test_what_is_no_label_is_refused(wrong: str):
    error = RUNNER.invoke(app, ["tiny", "--dry-run", "--label", wrong], standalone_mode=False).exception
    assert isinstance(error, ConfigError)
    assert str(error).startswith(f"--label {wrong}: write KEY=VALUE")
    name, _, value = wrong.partition("=")
    if "=" in wrong:
        with pytest.raises(ConfigError, match="labels"):
            publisher_config({"kvlane.labels": {name: value}})


@pytest.mark.parametrize(
    ("arguments", "endpoint"),
    [
        ([], "192.0.2.9:8000"),
        (["--host", "0.0.0.0", "--port=81"], "192.0.2.9:81"),
        (["--host=worker-3", "--port", "82"], "worker-3:82"),
        (["--port", "1", "--port", "2"], "192.0.2.9:2"),
    ],
)
def test_the_endpoint_is_where_the_server_will_listen(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], endpoint: str
):
    monkeypatch.setenv("VLLM_HOST_IP", "192.0.2.9")
    transfer = parsed(complete_arguments(arguments, None), "--kv-transfer-config")
    assert transfer["kv_connector_extra_config"] == {"kvlane.endpoint": endpoint}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-enable-prefix-caching"], "remove --no-enable-prefix-caching"),
        (["--kv-transfer-config", '{"kv_connector": "NixlConnector"}'], "kvlane publish"),
        (["--kv-transfer-config", "{"], "--kv-transfer-config is not JSON"),
        (["--kv-transfer-config", "[]"], "must be a JSON object"),
        (["--kv-transfer-config.kv_role", "kv_both"], "one JSON object"),
        (["--kv-events-config", '{"enable_kv_cache_events": false}'], "turn them on"),
        (["--kv-events-config", '{"publisher": "null"}'], "turn them on"),
    ],
)
def test_contradictions_are_named(arguments: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        complete_arguments(arguments, "a:1")


def test_a_dry_run_prints_the_command_and_takes_unknown_arguments_as_they_are():
    result = RUNNER.invoke(
        app, ["m", "--max-model-len", "4096", "-tp", "2", "--dry-run", "--endpoint", "h:1"]
    )
    assert result.exit_code == 0
    assert result.output.startswith("vllm serve m --max-model-len 4096 -tp 2 --kv-transfer-config '{")
    assert '"kvlane.endpoint": "h:1"' in result.output
    assert result.output.count("\n") == 1


def test_it_is_a_program_where_no_script_is_installed():
    command = [sys.executable, "-m", "vllm_plugin.serve", "m", "-tp", "2", "--dry-run", "--endpoint", "h:1"]
    shown = subprocess.run(
        command, env={**os.environ, "PATH": ""}, capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("vllm serve m -tp 2 --kv-transfer-config '{")


def test_the_model_comes_first():
    result = RUNNER.invoke(app, ["--port", "1", "m"])
    assert result.exit_code == 2
    assert "MODEL comes first" in result.output


def test_a_missing_vllm_is_one_clear_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    result = RUNNER.invoke(app, ["m", "--endpoint", "h:1"])
    assert isinstance(result.exception, ConfigError)
    assert "vLLM is not installed here" in str(result.exception)


class TestTiers:
    def test_the_connector_is_told_where_the_server_is(self):
        arguments = complete_arguments([], "1.2.3.4:80", tiers=parse_tiers("cpu=1GB,port=7000", {}))
        extra = parsed(arguments, "--kv-transfer-config")["kv_connector_extra_config"]
        assert extra == {"kvlane.endpoint": "1.2.3.4:80", "kvlane.tiers": "127.0.0.1:7000"}

    def test_a_server_of_somebody_else_is_joined_by_its_address(self):
        arguments = complete_arguments([], "1.2.3.4:80", tiers=parse_tiers("lmcache=cache:6555", {}))
        extra = parsed(arguments, "--kv-transfer-config")["kv_connector_extra_config"]
        assert extra == {"kvlane.endpoint": "1.2.3.4:80", "kvlane.tiers": "cache:6555"}

    def test_chunks_are_whole_blocks(self):
        with pytest.raises(ConfigError, match="256 tokens are not whole blocks of 48"):
            complete_arguments(["--block-size", "48"], "1.2.3.4:80", tiers=parse_tiers("cpu=1GB", {}))

    @pytest.mark.parametrize(
        ("tiers", "says"),
        [
            ("ssd=1GB", "no tier 'ssd'"),
            ("cpu=1GB,disk=/proc/1", "cannot be written to"),
            ("lmcache=127.0.0.1:1", "no LMCache server"),
            ("cpu=1GB,chunk=100", "set --block-size, or chunk= to a multiple of 128"),
        ],
    )
    def test_what_is_wrong_is_said_before_vllm_starts(self, tiers: str, says: str, monkeypatch):
        monkeypatch.setattr(serve.os, "execv", lambda *_: pytest.fail("vLLM was started"))
        outcome = RUNNER.invoke(app, ["model", "--tiers", tiers])
        assert isinstance(outcome.exception, ConfigError)
        assert says in str(outcome.exception)
