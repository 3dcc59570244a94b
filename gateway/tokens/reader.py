"""Reads a request's body into the token ids that the engine will see."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Self, TypeVar

from gateway.config import GatewayConfig
from gateway.errors import TokenizerError
from gateway.tokens.bodies import parse
from gateway.tokens.cache import ByteCache
from gateway.tokens.hashing import BlockHasher
from gateway.tokens.models import Models
from gateway.tokens.prompts import brings_template, draft_prompts, given_prompts, tokenized_prompts
from gateway.tokens.request import ReadRequest
from gateway.tokens.tokenizer import Tokenizers

LONG_BODY_BYTES = 1 << 20
"""Rendering and looking up this much takes the event loop a few milliseconds."""

Result = TypeVar("Result")


class PromptReader:
    """Reads prompts on one event loop; what takes long is done in threads.

    Args:
        models: tells what the fleet serves now.
        num_threads: threads that tokenise and load tokenizers.
        inline_bytes: up to this much text that is not remembered is tokenised on the event loop, where
            the way to a thread and back would take longer.
        cache_bytes: memory for tokens of texts and hashes of prompts.
        trust_request_chat_template: engines run with `--trust-request-chat-template`; templates that come
            with requests are programs, and run here only then.
    """

    def __init__(
        self,
        models: Callable[[], Models],
        *,
        num_threads: int = 2,
        inline_bytes: int = 2_048,
        cache_bytes: int = 256 << 20,
        trust_request_chat_template: bool = False,
    ) -> None:
        self._models = models
        self._inline_bytes = inline_bytes
        self._trusts_templates = trust_request_chat_template
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokens")
        cache = ByteCache(cache_bytes)
        self._tokenizers = Tokenizers(self._pool, cache)
        self._hasher = BlockHasher(cache)

    @classmethod
    def configured(cls, config: GatewayConfig, models: Callable[[], Models]) -> Self:
        """Return the reader of a process with these settings."""
        return cls(
            models,
            num_threads=config.tokenizer_threads,
            inline_bytes=config.tokenize_inline_bytes,
            cache_bytes=config.token_cache_bytes,
            trust_request_chat_template=config.trust_request_chat_template,
        )

    def close(self) -> None:
        """Let go of the threads; what they are doing is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def prepare(self) -> None:
        """Load the tokenizer of every served model, so that no request has to wait for it."""
        for model in self._models():
            with contextlib.suppress(TokenizerError):
                await self._tokenizers.get(model)

    async def read(self, path: str, body: bytes) -> ReadRequest | None:
        """Return the prompts of a POST request, or None if the path's prompts are not understood.

        Raises:
            RequestError: 400, malformed, empty or longer than the model's context; 404, unknown model.
            TokenizerError: the tokens cannot be known here.
        """
        parsed = parse(path, body)
        if parsed is None:
            return None
        model = self._models().find(parsed.model)
        if all(isinstance(given, list) for given in parsed.inputs):
            return self._hashing(given_prompts(parsed, model))
        tokenizer = await self._tokenizers.get(model)
        rendering = partial(draft_prompts, parsed, model, tokenizer, trusts_templates=self._trusts_templates)
        runs_program = self._trusts_templates and brings_template(parsed)
        drafts = await self._do(rendering, in_thread=runs_program or len(body) > LONG_BODY_BYTES)
        texts = [draft.text for draft in drafts]
        num_new_bytes = sum(text.num_new_bytes for text in texts)
        await self._do(partial(tokenizer.encode, texts), in_thread=num_new_bytes > self._inline_bytes)
        return self._hashing(tokenized_prompts(parsed, model, tokenizer, drafts))

    async def _do(self, work: Callable[[], Result], *, in_thread: bool) -> Result:
        if in_thread:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        return work()

    def _hashing(self, read: ReadRequest) -> ReadRequest:
        """Let the prompts be hashed with what is remembered of earlier ones."""
        return replace(read, prompts=tuple([replace(prompt, hasher=self._hasher) for prompt in read.prompts]))
