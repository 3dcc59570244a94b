"""Reads a request's body into the token ids that the engine will see."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from gateway.errors import TokenizerError
from gateway.tokens.bodies import parse
from gateway.tokens.models import Models
from gateway.tokens.prompts import given_prompts, tokenized_prompts
from gateway.tokens.request import ReadRequest
from gateway.tokens.tokenizer import Tokenizers


class PromptReader:
    """Reads prompts on one event loop; long ones are tokenised in threads.

    Args:
        models: tells what the fleet serves now.
        num_threads: threads that tokenise long prompts and load tokenizers.
        inline_bytes: bodies up to this size are tokenised on the event loop, where the way to a thread
            and back would take longer.
        trust_request_chat_template: engines run with `--trust-request-chat-template`; templates that come
            with requests are programs, and run here only then.
    """

    def __init__(
        self,
        models: Callable[[], Models],
        *,
        num_threads: int = 2,
        inline_bytes: int = 2_048,
        trust_request_chat_template: bool = False,
    ) -> None:
        self._models = models
        self._inline_bytes = inline_bytes
        self._trusts_templates = trust_request_chat_template
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokens")
        self._tokenizers = Tokenizers(self._pool)

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
            return given_prompts(parsed, model)
        tokenizer = await self._tokenizers.get(model)
        tokenize = partial(
            tokenized_prompts, parsed, model, tokenizer, trusts_templates=self._trusts_templates
        )
        if len(body) <= self._inline_bytes:
            return tokenize()
        return await asyncio.get_running_loop().run_in_executor(self._pool, tokenize)
