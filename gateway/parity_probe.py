"""Checks one worker with a probe request, sent straight to it: its tokens, its events, their hashes.

The prompt is unique and salted with a secret, so nobody's request matches the blocks that it leaves.

Source: vLLM 0.24 and 0.32 `vllm/entrypoints/serve/tokenize/protocol.py` (`/tokenize`),
`vllm/entrypoints/openai/engine/protocol.py` (ErrorResponse).
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import msgspec

from gateway.config import GatewayConfig
from gateway.decide import Reader
from gateway.demand import RANK_HEADER
from gateway.errors import ModelNotServed, RequestError, TokenizerError, Unverified
from gateway.parity import Evidence, Parity, Reason, State, Trial, judge, unverified
from gateway.probe import worker_url
from gateway.tokens.bodies import JsonObject
from kvindex.blocks import BlockHash, hash_blocks, root_hash
from kvindex.engine_api import cache_config
from kvindex.errors import EngineUnavailable, IndexUnavailable
from kvindex.index import IndexReader
from kvindex.worker import RegisteredWorker, Worker

MIN_BLOCKS = 2
"""Blocks of a probe, and a part of another: the second shows that hashes are chained as ours."""

LOOK_INTERVAL_S = 0.05
"""How often the index is asked for the probe's blocks."""

_FILLER = "Jaźń, 漢字, naïve 🙂 3.14 don't\ttrim\n"


class _Tokenized(msgspec.Struct):
    """The answer of `/tokenize`."""

    tokens: list[int]


class _Error(msgspec.Struct):
    type: str = ""
    message: str = ""


class _Refusal(msgspec.Struct):
    """vLLM's answer to what it does not serve."""

    error: _Error = msgspec.field(default_factory=_Error)


@dataclass(frozen=True, slots=True)
class _Probe:
    """A request to the engine, and the tokens that we make of it."""

    path: str
    body: JsonObject
    tokens: Sequence[int]
    tokenize: JsonObject | None
    """What to ask `/tokenize` about the same prompt; None if the prompt is token ids."""


_Form = Callable[[str, str, int], _Probe]
"""Model, a unique word, and how many times the filler is repeated, to a probe without its tokens."""


class ParityProber:
    """Checks workers, any number at once, on one event loop.

    Args:
        config: timeout and tries.
        index: where the workers' blocks arrive.
        reader: what tokenises clients' requests; its models must include the checked worker's.
        client: HTTP client for the workers, not closed.
    """

    def __init__(
        self, config: GatewayConfig, index: IndexReader, reader: Reader, client: httpx.AsyncClient
    ) -> None:
        self._config = config
        self._index = index
        self._reader = reader
        self._client = client

    async def check(self, registered: RegisteredWorker, adapter: str | None = None) -> Parity:
        """Return the verdict on a worker; one that is not exact is tried several times.

        Args:
            registered: the worker, as the index has it.
            adapter: a LoRA adapter that it serves, checked as well.
        """
        worker = registered.worker
        parity = Parity()
        try:
            for _ in range(self._config.parity_tries):
                parity = judge(worker, await self.examine(registered, adapter))
                if parity.state is State.EXACT:
                    break
        except Unverified as error:
            parity = unverified(worker, error.reason, str(error))
        except IndexUnavailable as error:
            parity = unverified(worker, Reason.INDEX, str(error))
        return msgspec.structs.replace(parity, checked_at=time.time())

    async def examine(self, registered: RegisteredWorker, adapter: str | None = None) -> Evidence:
        """Send one probe for the base model, and one for `adapter`; return what was seen.

        Raises:
            Unverified: the worker does not answer, or refuses.
            IndexUnavailable: the index does not answer.
        """
        evidence = await self._examine_base(registered)
        if adapter is not None and evidence.trials and evidence.trials[0].is_exact:
            evidence = await self._examine_adapter(registered, adapter, evidence)
        if any(not trial.is_exact for trial in evidence.trials):
            evidence = await self._with_cache_config(registered.worker, evidence)
        return evidence

    async def _examine_base(self, registered: RegisteredWorker) -> Evidence:
        worker = registered.worker
        failure: str | None = None
        for form in _FORMS:
            try:
                probe = await self._compose(form, worker, worker.model)
            except TokenizerError as error:
                failure = failure or str(error)
                continue
            if probe is None:
                continue
            evidence = Evidence(tokens_here=probe.tokens, tokenizer_failure=failure)
            if probe.tokenize is not None:
                evidence = replace(evidence, tokens_there=await self._tokenize(worker, probe.tokenize))
                if evidence.tokens_there not in (None, list(probe.tokens)):
                    return evidence
            try:
                trial = await self._try(registered, probe)
            except ModelNotServed:
                return replace(evidence, missing_model=worker.model)
            if trial is not None:
                return replace(evidence, trials=(trial,))
        raise Unverified(Reason.REFUSED, "it serves neither chats, completions nor embeddings")

    async def _examine_adapter(
        self, registered: RegisteredWorker, adapter: str, evidence: Evidence
    ) -> Evidence:
        # Token ids: that text becomes the same tokens has been seen already.
        probe = await self._compose(_token_ids, registered.worker, adapter)
        assert probe is not None  # noqa: S101 - it was long enough for the base model
        try:
            trial = await self._try(registered, probe, lora_name=adapter)
        except ModelNotServed:  # it was unloaded meanwhile
            return evidence
        return evidence if trial is None else replace(evidence, trials=(*evidence.trials, trial))

    async def _compose(self, form: _Form, worker: Worker, model: str) -> _Probe | None:
        """Return a probe of `MIN_BLOCKS` blocks and a bit, less where the context is shorter.

        None if the model takes no prompt of this form.

        Raises:
            TokenizerError: its tokens cannot be known here.
            Unverified: its context is shorter than a block.
        """
        nonce = secrets.token_hex(8)
        max_tokens = worker.max_model_len - 1
        wanted = min(MIN_BLOCKS * worker.block_size + max(worker.block_size // 4, 1), max_tokens)
        try:
            shortest, longer = [await self._read(form(model, nonce, times)) for times in (1, 2)]
            growth = max(len(longer) - len(shortest), 1)
            times = 1 + max(0, -(-(wanted - len(shortest)) // growth))
            times -= len(shortest) + (times - 1) * growth > max_tokens
            probe = form(model, nonce, times)
            tokens = await self._read(probe)
        except RequestError as error:
            if error.status == 404:
                raise Unverified(Reason.REFUSED, error.message) from error
            return None
        if len(tokens) < worker.block_size:
            raise Unverified(Reason.REFUSED, "its context has no room for a probe of one block")
        return replace(probe, tokens=tokens)

    async def _read(self, probe: _Probe) -> Sequence[int]:
        read = await self._reader.read(probe.path, msgspec.json.encode(probe.body))
        assert read is not None  # noqa: S101 - these paths are understood
        return read.prompts[0].tokens

    async def _tokenize(self, worker: Worker, body: JsonObject) -> list[int] | None:
        response = await self._post(worker, "/tokenize", body)
        if not response.is_success:
            return None
        try:
            return msgspec.json.decode(response.content, type=_Tokenized).tokens
        except msgspec.DecodeError:
            return None

    async def _try(
        self, registered: RegisteredWorker, probe: _Probe, *, lora_name: str | None = None
    ) -> Trial | None:
        """Send `probe` and wait for its blocks; None if the engine does not serve its path.

        Raises:
            ModelNotServed: the engine does not serve its model.
            Unverified: it does not answer, or refuses.
            IndexUnavailable: the index does not answer.
        """
        worker = registered.worker
        salt = f"kvlane-probe-{secrets.token_hex(16)}"
        before = await self._registered(registered)
        response = await self._post(worker, probe.path, probe.body | {"cache_salt": salt})
        if response.status_code in (404, 405):
            if _refusal(response).type == "NotFoundError":
                raise ModelNotServed
            return None
        if not response.is_success:
            said = _refusal(response).message or response.text[:200]
            raise Unverified(Reason.REFUSED, f"it answers {response.status_code} to a probe: {said}")
        return await self._await_blocks(before, probe, lora_name, salt)

    async def _await_blocks(
        self, before: RegisteredWorker, probe: _Probe, lora_name: str | None, salt: str
    ) -> Trial:
        worker = before.worker

        def hashes(lora_name: str | None, salt: str | None) -> list[BlockHash]:
            root = root_hash(worker.model, lora_name=lora_name, cache_salt=salt)
            return hash_blocks(root, probe.tokens, worker.block_size)

        expected = hashes(lora_name, salt)
        stripped: dict[frozenset[Reason], list[BlockHash]] = {
            frozenset({Reason.SALT}): hashes(lora_name, None)
        }
        if lora_name is not None:
            stripped[frozenset({Reason.LORA})] = hashes(None, salt)
            stripped[frozenset({Reason.LORA, Reason.SALT})] = hashes(None, None)
        answered_s = time.monotonic()
        slot = before.slot
        while True:
            match = await self._index.match(worker.pool, expected)
            if slot not in {state.slot for state in match.states}:
                slot = (await self._registered(before)).slot
                match = await self._index.match(worker.pool, expected)
            held = match.overlap_blocks.get(slot, 0)
            found_without = frozenset[Reason]().union(
                *[
                    lacking
                    for lacking, blocks in stripped.items()
                    if slot in (await self._index.match(worker.pool, blocks)).overlap_blocks
                ]
            )
            waited_s = time.monotonic() - answered_s
            if held == len(expected) or found_without or waited_s > self._config.parity_timeout_s:
                break
            await asyncio.sleep(LOOK_INTERVAL_S)
        after = await self._registered(before)
        return Trial(
            model=lora_name or worker.model,
            num_blocks=len(expected),
            num_held_blocks=held,
            num_other_blocks=max(after.num_indexed_blocks - before.num_indexed_blocks - held, 0),
            found_without=found_without,
            waited_s=waited_s,
        )

    async def _registered(self, registered: RegisteredWorker) -> RegisteredWorker:
        """Return the same life of the worker as the index has it now.

        Raises:
            Unverified: it has left.
            IndexUnavailable: the index does not answer.
        """
        worker = registered.worker
        _, live = await self._index.workers(worker.pool)
        for each in live:
            if each.worker.incarnation == worker.incarnation and each.worker.worker_id == worker.worker_id:
                return each
        raise Unverified(Reason.INDEX, "it left the index during the check")

    async def _with_cache_config(self, worker: Worker, evidence: Evidence) -> Evidence:
        """Add what the engine's metrics say of its cache, where they say it."""
        try:
            response = await self._client.get(worker_url(self._client, worker.endpoint, "/metrics"))
            config = await asyncio.to_thread(cache_config, response.text, dp_rank=worker.dp_rank)
        except (httpx.HTTPError, EngineUnavailable):
            return evidence
        block_size, caching = config.get("block_size", ""), config.get("enable_prefix_caching")
        return replace(
            evidence,
            engine_block_size=int(block_size) if block_size.isdigit() else None,
            prefix_caching=None if caching is None else caching == "True",
        )

    async def _post(self, worker: Worker, path: str, body: Mapping[str, Any]) -> httpx.Response:
        headers = {"x-request-id": f"kvlane-probe-{secrets.token_hex(8)}"}
        if worker.dp_size > 1:
            headers[RANK_HEADER] = str(worker.dp_rank)
        try:
            return await self._client.post(
                worker_url(self._client, worker.endpoint, path),
                json=body,
                headers=headers,
                timeout=self._config.parity_timeout_s,
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise Unverified(Reason.NO_ANSWER, f"it does not answer a probe at {path}: {reason}") from error


def _refusal(response: httpx.Response) -> _Error:
    try:
        return msgspec.json.decode(response.content, type=_Refusal).error
    except msgspec.DecodeError:
        return _Error()


def _chat(model: str, nonce: str, times: int) -> _Probe:
    """Several turns, because templates treat the first and the last message in their own ways."""
    prompt = {
        "model": model,
        "messages": [
            {"role": "user", "content": f"{nonce} {_FILLER * times}"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Go on."},
        ],
    }
    return _Probe("/v1/chat/completions", prompt | _ONE_TOKEN, (), tokenize=prompt)


def _completion(model: str, nonce: str, times: int) -> _Probe:
    prompt = {"model": model, "prompt": f"{nonce} {_FILLER * times}"}
    return _Probe("/v1/completions", prompt | _ONE_TOKEN, (), tokenize=prompt)


def _embedding(model: str, nonce: str, times: int) -> _Probe:
    text = f"{nonce} {_FILLER * times}"
    prompt = {"model": model, "prompt": text}
    return _Probe("/v1/embeddings", {"model": model, "input": text}, (), tokenize=prompt)


def _token_ids(model: str, nonce: str, times: int) -> _Probe:
    draw = random.Random(nonce)  # noqa: S311 - unique is enough
    tokens = [draw.randrange(16, 256) for _ in range(16 * times)]
    return _Probe("/v1/completions", {"model": model, "prompt": tokens} | _ONE_TOKEN, (), tokenize=None)


_ONE_TOKEN = {"max_tokens": 1, "temperature": 0}

_FORMS: tuple[_Form, ...] = (_chat, _completion, _embedding, _token_ids)
"""Tried in this order: a chat passes through everything that an engine does to a prompt."""
