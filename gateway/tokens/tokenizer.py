"""Tokenizers, loaded once and used as the engines use them.

Source: vLLM 0.32 `vllm/renderers/params.py` (TokenizeParams), `vllm/tokenizers/registry.py`.
"""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog

from gateway.errors import TokenizerError
from gateway.tokens.bodies import Chat, Side
from gateway.tokens.cache import ByteCache
from gateway.tokens.cuts import find_cuts
from gateway.tokens.models import ServedModel
from gateway.tokens.request import Prompt
from gateway.tokens.segments import SegmentEncoder, Segments
from gateway.tokens.template import TemplateTokenizer, render

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = structlog.get_logger(__name__)

RETRY_S = 30.0
"""How long a tokenizer that could not be loaded is not tried again."""

_IMPORTING = threading.Lock()
"""transformers fills its namespace on demand, which fails where two threads ask at once."""

# With these beside each other, the engine takes Mistral's tokenizer instead of the one in tokenizer.json.
_MISTRAL_FILES = ("tekken.json", "consolidated.safetensors")

# The engine writes these models' chats in Python code of its own, not by a template.
_CHATS_IN_CODE = frozenset(
    {
        *("GptOssForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM", "DeepseekV41ForCausalLM"),
        *("DeepseekV4ForConditionalGeneration", "KimiK3ForConditionalGeneration", "MoonshotKimiaForCausalLM"),
        *("InklingForCausalLM", "InklingForConditionalGeneration"),
    }
)


class HfTokenizer(TemplateTokenizer, Protocol):
    """A fast tokenizer of transformers."""

    all_special_tokens: list[str]
    backend_tokenizer: Tokenizer
    chat_template: str | dict[str, str] | None
    split_special_tokens: bool

    def get_added_vocab(self) -> dict[str, int]:
        """Return every added token with its id."""

    def get_vocab(self) -> dict[str, int]:
        """Return every token with its id."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which tokens of a prompt the engine keeps."""

    num_tokens: int
    side: Side
    """From which side tokens are dropped."""
    counts_special_tokens: bool
    """Special tokens are cut like others (a side was asked for), or always kept."""


class ModelTokenizer:
    """A model's tokenizer and chat template. Thread-safe; encoding frees the GIL.

    A text becomes tokens in three steps: `split`, `encode`, `tokens`. Only the second takes long.

    Args:
        tokenizer: a transformers tokenizer with a Rust backend, owned from now on.
        cache: where tokens of texts are remembered.
        chat_template: Jinja text that the engines were given instead of the tokenizer's own.
        chats_in_code: the engine does not use templates for this model.
    """

    def __init__(
        self,
        tokenizer: HfTokenizer,
        cache: ByteCache,
        *,
        chat_template: str | None = None,
        chats_in_code: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._chats_in_code = chats_in_code
        encoder = tokenizer.backend_tokenizer
        encoder.no_padding()
        encoder.no_truncation()
        encoder.encode_special_tokens = tokenizer.split_special_tokens
        self._added = added_tokens(encoder)
        # What stands between the messages of a conversation is in the template, or special.
        template = chat_template or str(tokenizer.chat_template)
        wanted = {token for token in tokenizer.get_added_vocab() if token in template}
        cuts = find_cuts(encoder, wanted | {*tokenizer.all_special_tokens})
        self._segments = SegmentEncoder(encoder, cuts, cache)
        self.max_chars_per_token: int = max(map(len, tokenizer.get_vocab()), default=1)

    @classmethod
    def load(cls, model: ServedModel, cache: ByteCache) -> ModelTokenizer:
        """Load the tokenizer of `model` from its directory or, unless offline, from the hub. Blocking.

        Raises:
            TokenizerError: it cannot be had, or only the engine can apply it.
        """
        with _IMPORTING:
            from transformers import AutoTokenizer, PreTrainedConfig
            from transformers.utils.hub import has_file

        source = model.tokenizer
        where = f"tokenizer of {model.base} ({source})"
        try:
            template = None if model.chat_template is None else model.chat_template.read_text()
            tokenizer = AutoTokenizer.from_pretrained(source)
            config, _ = PreTrainedConfig.get_config_dict(source)
            is_mistral = all(has_file(source, name) for name in _MISTRAL_FILES)
        # The tokenizers library raises Exception itself for files that it cannot read.
        except Exception as error:
            reason = str(error).partition("\n")[0]
            cure = f"give its directory to the gateway, tokenizers: {{{model.base}: DIRECTORY}}"
            raise TokenizerError(f"{where}: {reason}; {cure}") from error
        if is_mistral:
            raise TokenizerError(f"{where}: Mistral's own format, which only the engine reads")
        if not tokenizer.is_fast:
            raise TokenizerError(f"{where}: written in Python, too slow for a gateway")
        chats_in_code = bool(_CHATS_IN_CODE & set(config.get("architectures") or ()))
        try:
            return cls(tokenizer, cache, chat_template=template, chats_in_code=chats_in_code)
        except TokenizerError as error:
            raise TokenizerError(f"{where}: {error}") from error

    def render(self, chat: Chat, *, use_own_template: bool) -> tuple[str, int | None]:
        """Return the prompt's text, and how many of its characters precede the first image, audio or video.

        The second is None where there is none.

        Args:
            chat: a conversation.
            use_own_template: apply the template that came with the request, if any.

        Raises:
            RequestError: 400, no template, or it refuses the conversation.
            TokenizerError: the engine writes this model's chats in code.
        """
        if self._chats_in_code:
            raise TokenizerError("the engine writes this model's chats in code, not by a template")
        template = (chat.template if use_own_template else None) or self._chat_template
        return render(self._tokenizer, chat, template)

    def split(
        self, text: str, *, counted_chars: int | None = None, cache_salt: str | None = None
    ) -> Segments:
        """See `SegmentEncoder.split`."""
        return self._segments.split(text, counted_chars=counted_chars, cache_salt=cache_salt)

    def encode(self, batch: Sequence[Segments]) -> None:
        """See `SegmentEncoder.encode`.

        Raises:
            TokenizerError: the tokenizer fails at this text.
        """
        try:
            self._segments.encode(batch)
        # The tokenizers library raises Exception itself; what its Rust code panics with is not even that.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(f"the tokenizer fails at this text: {error!r}") from error

    def tokens(
        self, text: Segments, *, add_special_tokens: bool, truncation: Truncation | None = None
    ) -> array[int]:
        """Return the tokens of an encoded text, as u32."""
        tokens = array("I", text.packed)
        if not add_special_tokens:
            return cut(tokens, truncation)
        before, after = self._added
        if truncation is not None and not truncation.counts_special_tokens:
            # The tokenizer makes room for the special tokens that it adds.
            room = max(truncation.num_tokens - len(before) - len(after), 0)
            tokens = cut(tokens, replace(truncation, num_tokens=room))
        return cut(before + tokens + after, truncation)

    def counted_prompt(self, text: Segments, *, add_special_tokens: bool) -> Prompt:
        """Return the tokens of an encoded text; comparable are those within the part of it that counts."""
        tokens = self.tokens(text, add_special_tokens=add_special_tokens)
        num_tokens = text.num_counted_tokens
        if add_special_tokens and num_tokens:
            num_tokens += len(self._added[0])
        return Prompt(tokens, num_tokens)


def cut(tokens: array[int], truncation: Truncation | None) -> array[int]:
    """Return what `truncation` leaves of `tokens`."""
    if truncation is None or len(tokens) <= truncation.num_tokens:
        return tokens
    if truncation.side == "right":
        return tokens[: truncation.num_tokens]
    return tokens[len(tokens) - truncation.num_tokens :]


def added_tokens(tokenizer: Tokenizer) -> tuple[array[int], array[int]]:
    """Return the special tokens that `tokenizer` puts before and after a text.

    Raises:
        TokenizerError: it does something else to texts.
    """
    candidates: set[tuple[tuple[int, ...], tuple[int, ...]]] | None = None
    for sample in ("Hello, world!", "a", ""):
        bare, whole = (tokenizer.encode(sample, add_special_tokens=added).ids for added in (False, True))
        num_added = len(whole) - len(bare)
        fitting = {
            (tuple(whole[:size]), tuple(whole[size + len(bare) :]))
            for size in range(num_added + 1)
            if whole[size : size + len(bare)] == bare
        }
        candidates = fitting if candidates is None else candidates & fitting
    if candidates is None or len(candidates) != 1:
        raise TokenizerError("its special tokens are not simply put before and after a text")
    ((before, after),) = candidates
    return array("I", before), array("I", after)


class Tokenizers:
    """Loads each tokenizer once, off the event loop, and remembers failures for a while.

    Args:
        pool: threads that load.
        cache: where all of them remember tokens.
    """

    def __init__(self, pool: Executor, cache: ByteCache) -> None:
        self._pool = pool
        self._cache = cache
        self._loading: dict[tuple[str, Path | None], asyncio.Future[ModelTokenizer]] = {}

    async def get(self, model: ServedModel) -> ModelTokenizer:
        """Return the tokenizer of `model`; at once if it was loaded before.

        A caller that gives up does not stop the loading.

        Raises:
            TokenizerError: see `ModelTokenizer.load`; a failure is repeated for `RETRY_S`.
        """
        key = (model.tokenizer, model.chat_template)
        loading = self._loading.get(key)
        if loading is None:
            loop = asyncio.get_running_loop()
            loading = loop.run_in_executor(self._pool, ModelTokenizer.load, model, self._cache)
            self._loading[key] = loading
            loading.add_done_callback(lambda done: self._loaded(model, key, done))
        return await asyncio.shield(loading)

    def _loaded(
        self, model: ServedModel, key: tuple[str, Path | None], done: asyncio.Future[ModelTokenizer]
    ) -> None:
        if done.cancelled() or (error := done.exception()) is None:
            return
        log.error("no tokenizer: requests are routed by load alone", model=model.base, reason=str(error))
        done.get_loop().call_later(RETRY_S, self._loading.pop, key, None)
