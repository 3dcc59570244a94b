"""Files of prompts, and what is said of those that cannot be sent; sent they are in `test_tiers`."""

from pathlib import Path

import pytest

from connectors.bench.ports import free_ports
from connectors.tiers.warm import Warming, read_prompts, warm
from kvindex.errors import ConfigError
from tests.support.cli import kvlane


def test_bodies_are_read_line_by_line(tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"model": "m", "prompt": "a", "max_tokens": 9}\n\n{"messages": [], "stream": true}\n')
    assert read_prompts(file) == [
        Warming(1, "/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 1, "stream": False}),
        Warming(3, "/v1/chat/completions", {"messages": [], "max_tokens": 1, "stream": False}),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no prompts"),
        ('{"prompt": "a"}\nprompt', "line 2: not JSON"),
        ('{"text": "a"}', "line 1: neither `messages` nor `prompt`"),
        ('"prompt"', "line 1: neither"),
    ],
)
def test_what_is_no_body_is_named(tmp_path: Path, text: str, said: str):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_prompts(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="none cannot be read"):
        read_prompts(tmp_path / "none")


async def test_requests_that_nobody_answers_are_counted():
    (port,) = free_ports(1)
    requests = [Warming(number, "/v1/completions", {"prompt": "a"}) for number in (1, 2)]
    done: list[int] = []
    outcome = await warm(requests, f"http://127.0.0.1:{port}", concurrency=1, on_done=lambda: done.append(1))
    assert (outcome.num_done, len(outcome.failures), len(done)) == (0, 2, 2)
    assert outcome.failures[0].startswith("line 1: ")


def test_a_server_that_is_not_there_is_said():
    (port,) = free_ports(1)
    result = kvlane("tier", "clear", "cpu", "--server", f"http://127.0.0.1:{port}", "--yes")
    assert result.returncode == 1
    assert "does not answer" in result.stderr
