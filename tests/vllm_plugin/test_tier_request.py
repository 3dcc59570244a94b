"""What LMCache's keys are made of separates what must not be shared."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_plugin.tier_request import TierRequest, model_name


def request(lora: str | None = None, salt: str | None = None, embeds: object = None) -> Any:
    return SimpleNamespace(
        request_id="r",
        lora_request=SimpleNamespace(lora_name=lora) if lora else None,
        cache_salt=salt,
        prompt_embeds=embeds,
        num_prompt_tokens=7,
    )


def test_adapters_and_salts_have_salts_of_their_own():
    owners = [(None, None), ("a", None), (None, "a"), ("a", "b"), ("b", "a"), ("ab", None), ("a", "a")]
    salts = [TierRequest(request(*owner)).cache_salt for owner in owners]
    assert salts[0] == ""
    assert len(set(salts)) == len(owners)
    assert TierRequest(request("a", "b")).cache_salt == salts[3]


@pytest.mark.parametrize("salt", ["with/slash", "with@at", "back\\slash", "nul\0", "long" * 200, "ünïcode"])
def test_every_salt_fits_into_lmcaches_key(salt: str):
    from lmcache.v1.distributed.api import ObjectKey

    ObjectKey(
        chunk_hash=b"h", model_name="m", kv_rank=0, cache_salt=TierRequest(request("a", salt)).cache_salt
    )


def test_all_else_is_the_requests_own():
    given = request("a")
    wrapped = TierRequest(given)
    assert (wrapped.request_id, wrapped.num_prompt_tokens) == ("r", 7)
    given.num_prompt_tokens = 8
    assert wrapped.num_prompt_tokens == 8


def test_embeddings_are_never_shared_and_never_stored():
    first, second = (TierRequest(request(embeds=object())) for _ in range(2))
    assert first.cache_salt != second.cache_salt
    assert first.num_prompt_tokens == 0


def test_lmcache_reads_no_settings_from_a_client():
    from lmcache.integration.vllm.utils import extract_request_configs_from_request

    given = request()
    params = {"kv_transfer_params": {"lmcache.max_offload_tokens": "many"}}
    given.sampling_params = SimpleNamespace(extra_args=params)
    assert extract_request_configs_from_request(given)
    assert extract_request_configs_from_request(TierRequest(given)) is None


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_models_name_is_the_same_in_every_process(weights: Path):
    assert model_name("org/model", ("bf16",), weights) == model_name("org/model", ("bf16",), weights)


def test_a_models_name_tells_apart_what_makes_kv_differ(weights: Path):
    names = {model_name("m", ("bf16",), weights), model_name("m", ("fp16",), weights)}
    names.add(model_name("other", ("bf16",), weights))
    with (weights / "model.safetensors").open("r+b") as file:
        file.seek(1 << 19)
        file.write(b"trained")
    names.add(model_name("m", ("bf16",), weights))
    (weights / "config.json").write_text('{"rope_theta": 2}')
    names.add(model_name("m", ("bf16",), weights))
    assert len(names) == 5


@pytest.mark.parametrize("served", ["/models/llama", "a@b", "/x" * 200])
def test_a_models_name_fits_file_names_and_keys(served: str, weights: Path):
    name = model_name(served, (), weights)
    assert not name.startswith("/")
    assert "@" not in name
    assert len(name) < 100
