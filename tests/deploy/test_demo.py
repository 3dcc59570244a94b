"""The demo's workload and figures; the demo itself is too long for a test."""

import asyncio

import httpx
import msgspec
import pytest
from tokenizers import Tokenizer

from deploy.demo import play as demo_play
from deploy.demo.__main__ import WORKLOAD, Figures, Result, figures
from deploy.demo.conversations import conversations
from deploy.demo.play import ANSWER_TOKENS, Played, play
from tests.support.vllm_engine import MAX_MODEL_LEN_TOKENS, tiny_model


def test_the_workload_is_the_same_at_every_run():
    assert conversations(**WORKLOAD, seed=7) == conversations(**WORKLOAD, seed=7)
    assert conversations(**WORKLOAD, seed=7) != conversations(**WORKLOAD, seed=8)


def test_people_share_their_assistants_prompt_and_ask_different_things():
    made = conversations(**WORKLOAD, seed=7)
    assert len(made) == WORKLOAD["num_assistants"] * WORKLOAD["num_people"]
    assert len({each.system for each in made}) == WORKLOAD["num_assistants"]
    assert len({each.questions for each in made}) == len(made)
    assert all(len(each.questions) == WORKLOAD["num_turns"] for each in made)


def test_conversations_fit_into_the_models_context():
    tokenizer = Tokenizer.from_file(str(tiny_model() / "tokenizer.json"))
    for each in conversations(**WORKLOAD, seed=7):
        texts = tokenizer.encode_batch([each.system, *each.questions])
        # An answer read back may make more tokens than were sampled.
        answers = 2 * ANSWER_TOKENS * len(each.questions)
        assert sum(len(text.ids) + 16 for text in texts) + answers < MAX_MODEL_LEN_TOKENS


def test_figures_are_differences_of_the_engines_counters():
    played = Played(ttft_ms=[float(each) for each in range(1, 101)], errors=["503"])
    assert figures(played, before=(1000, 100), after=(3000, 1600)) == Figures(
        prompt_tokens=2000, cached_tokens=1500, hit_rate=0.75, ttft_p50_ms=50.5, ttft_p90_ms=90.9, errors=1
    )


def test_a_run_without_a_single_answer_still_has_figures():
    assert figures(Played(errors=["refused"]), (5, 5), (5, 5)).hit_rate == 0


def test_the_result_has_the_documented_form():
    run = Figures(prompt_tokens=2, cached_tokens=1, hit_rate=0.5, ttft_p50_ms=1.0, ttft_p90_ms=2.0, errors=0)
    names = {"prompt_tokens", "cached_tokens", "hit_rate", "ttft_p50_ms", "ttft_p90_ms", "errors"}
    written = msgspec.json.decode(msgspec.json.encode(Result(kvlane=run, round_robin=run)))
    assert written.keys() == {"kvlane", "round_robin"}
    assert all(each.keys() == names for each in written.values())


@pytest.mark.parametrize("failing", [False, True])
def test_each_turn_carries_the_answers_before_it_and_errors_are_counted(monkeypatch, failing):
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(msgspec.json.decode(request.content))
        if failing:
            return httpx.Response(503, text="no worker")
        chunk = {"choices": [{"delta": {"content": f"answer {len(asked)}"}}]}
        return httpx.Response(200, text=f"data: {msgspec.json.encode(chunk).decode()}\n\ndata: [DONE]\n\n")

    class Client(httpx.AsyncClient):
        def __init__(self, **options: object) -> None:
            super().__init__(**options, transport=httpx.MockTransport(answer))

    monkeypatch.setattr(demo_play.httpx, "AsyncClient", Client)
    [conversation] = conversations(num_assistants=1, num_people=1, num_turns=2, system_chars=100, seed=1)
    progress = []
    played = asyncio.run(
        play(
            "http://demo", "tiny", [conversation], concurrency=2, seed=1, progress=lambda: progress.append(1)
        )
    )
    assert len(progress) == len(asked) == 2
    assert [each["role"] for each in asked[1]["messages"]] == ["system", "user", "assistant", "user"]
    if failing:
        assert played.errors == ["503: no worker"] * 2
        assert not played.ttft_ms
    else:
        assert asked[1]["messages"][2]["content"] == "answer 1"
        assert len(played.ttft_ms) == 2
        assert not played.errors
