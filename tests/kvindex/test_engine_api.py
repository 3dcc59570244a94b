import functools
from collections.abc import Callable

import httpx
import pytest

from kvindex import engine_api
from kvindex.engine_api import EngineApi
from kvindex.errors import EngineUnavailable
from kvindex.worker import Load

MODELS = {
    "data": [
        {"id": "adapter", "parent": "tiny", "root": "/lora"},
        {"id": "tiny", "parent": None, "root": "/m", "max_model_len": 4096, "owned_by": "vllm"},
    ]
}
# Lines of a vLLM 0.32 with two data-parallel ranks; labels that are not read are left out.
METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_running{engine="1",model_name="tiny"} 7.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 2.0
vllm:num_requests_waiting{engine="1",model_name="tiny"} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.5
# TYPE vllm:request_prefill_kv_computed_tokens histogram
vllm:request_prefill_kv_computed_tokens_bucket{engine="0",le="+Inf",model_name="tiny"} 4.0
vllm:request_prefill_kv_computed_tokens_count{engine="0",model_name="tiny"} 4.0
vllm:request_prefill_kv_computed_tokens_sum{engine="0",model_name="tiny"} 1000.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="32",engine="1",num_gpu_blocks="90"} 1.0
"""


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, httpx.Response]:
    answers = {
        "/v1/models": httpx.Response(200, json=MODELS),
        "/metrics": httpx.Response(200, text=METRICS),
    }
    transport = httpx.MockTransport(lambda request: answers[request.url.path])
    monkeypatch.setattr(engine_api.httpx, "Client", functools.partial(httpx.Client, transport=transport))
    return answers


@pytest.mark.usefixtures("answers")
def test_the_worker_is_the_base_model_of_one_rank():
    with EngineApi("127.0.0.1:8000") as api:
        worker = api.read_worker({"zone": "a"})
        again = api.read_worker({})
    assert (worker.endpoint, worker.model, worker.max_model_len) == ("127.0.0.1:8000", "tiny", 4096)
    assert (worker.block_size, worker.num_blocks, worker.labels) == (32, 100, {"zone": "a"})
    assert worker.publisher == "external"
    assert worker.incarnation != again.incarnation


@pytest.mark.usefixtures("answers")
def test_the_load_is_that_of_the_rank_and_token_counts_are_estimates():
    with EngineApi("127.0.0.1:8000") as api:
        assert api.read_load(api.read_worker({})) == Load(
            waiting_requests=2,
            running_requests=3,
            waiting_prefill_tokens=500,
            running_tokens=800,
            kv_usage=0.25,
        )
    with EngineApi("127.0.0.1:8000", dp_rank=1, dp_size=2) as api:
        worker = api.read_worker({})
        assert (worker.worker_id, worker.num_blocks) == ("127.0.0.1:8000/dp1", 90)
        assert api.read_load(worker) == Load(running_requests=7, running_tokens=1440, kv_usage=0.5)


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/v1/models", httpx.Response(503), "503"),
        ("/v1/models", httpx.Response(200, text="<html>"), "/v1/models"),
        ("/v1/models", httpx.Response(200, json={"data": []}), "no base model"),
        ("/metrics", httpx.Response(200, text="vllm:num_requests_running 1\n"), "vllm:cache_config_info"),
        ("/metrics", httpx.Response(200, text='vllm:x{engine="0" 1\n'), "cannot be read"),
        (
            "/metrics",
            httpx.Response(200, text=METRICS.replace('num_gpu_blocks="100"', 'num_gpu_blocks="None"')),
            "vllm:cache_config_info",
        ),
    ],
)
def test_an_answer_that_is_not_vllms_is_named(
    answers: dict[str, httpx.Response], path: str, answer: httpx.Response, message: str
):
    answers[path] = answer
    with EngineApi("127.0.0.1:8000") as api, pytest.raises(EngineUnavailable, match=message):
        api.read_worker({})


def test_an_engine_that_is_not_there_is_unavailable(unused_tcp_port: int):
    with EngineApi(f"127.0.0.1:{unused_tcp_port}") as api, pytest.raises(EngineUnavailable):
        api.read_worker({})


def test_every_transport_error_is_the_named_one(monkeypatch: pytest.MonkeyPatch):
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("", request=request)

    handler: Callable[[httpx.Request], httpx.Response] = refuse
    monkeypatch.setattr(
        engine_api.httpx, "Client", functools.partial(httpx.Client, transport=httpx.MockTransport(handler))
    )
    with EngineApi("127.0.0.1:8000") as api, pytest.raises(EngineUnavailable, match="ReadTimeout"):
        api.read_worker({})
