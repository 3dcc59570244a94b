"""The prompts of a parsed request, as the engine will see and check them. Pure but for the CPU it takes.

Source: vLLM 0.32 `vllm/renderers/params.py` (TokenizeParams), `vllm/renderers/online_renderer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gateway.errors import RequestError
from gateway.tokens.bodies import Chat, Input, ParsedRequest
from gateway.tokens.messages import has_billing_header
from gateway.tokens.models import ServedModel
from gateway.tokens.request import Api, Prompt, ReadRequest
from gateway.tokens.tokenizer import ModelTokenizer, Truncation, cut

# Prompts of the other APIs may be longer than the context, or empty.
_GENERATES = frozenset({Api.CHAT, Api.COMPLETION, Api.GENERATE})


class _Text(NamedTuple):
    text: str
    inexact: str | None = None
    num_known_chars: int | None = None
    """Leading characters that the engine is sure to see too; None: all."""


def given_prompts(parsed: ParsedRequest, model: ServedModel) -> ReadRequest:
    """Return the prompts of a request that brings token ids; it needs no tokenizer.

    Raises:
        RequestError: 400, a prompt is empty or longer than the context.
    """
    truncation = _truncation(parsed, model)
    prompts = [cut(given, truncation) for given in parsed.inputs if isinstance(given, list)]
    return _read(parsed, model, [Prompt(tokens, len(tokens)) for tokens in prompts], parsed.inexact)


def tokenized_prompts(
    parsed: ParsedRequest, model: ServedModel, tokenizer: ModelTokenizer, *, trusts_templates: bool
) -> ReadRequest:
    """Return the prompts of a request that brings text or a conversation. Thread-safe.

    Args:
        parsed: the request.
        model: what it asks for.
        tokenizer: of that model.
        trusts_templates: a template that comes with the request may run here.

    Raises:
        RequestError: 400, the template refuses the conversation, or a prompt is empty or longer than
            the context.
        TokenizerError: the engine writes this model's chats in code.
    """
    texts = [_text(given, parsed, tokenizer, trusts_templates) for given in parsed.inputs]
    prompts = [_prompt(text, parsed, model, tokenizer) for text in texts]
    return _read(parsed, model, prompts, next((text.inexact for text in texts if text.inexact), None))


def _text(given: Input, parsed: ParsedRequest, tokenizer: ModelTokenizer, trusts_templates: bool) -> _Text:
    if not isinstance(given, Chat):
        return _Text(str(given), parsed.inexact, 0 if parsed.inexact else None)
    text, num_known_chars = tokenizer.render(given, use_own_template=trusts_templates)
    if parsed.inexact:
        return _Text(text, parsed.inexact, 0)
    if given.template is not None and not trusts_templates:
        return _Text(text, "the request brings its own chat template", 0)
    if num_known_chars is not None:
        return _Text(text, "only the engine knows the tokens of images, audio and video", num_known_chars)
    if has_billing_header(given.messages):
        return _Text(text, "vLLM before 0.32 keeps the first line of this system prompt")
    return _Text(text)


def _prompt(text: _Text, parsed: ParsedRequest, model: ServedModel, tokenizer: ModelTokenizer) -> Prompt:
    if text.num_known_chars is not None:
        return tokenizer.encode_until(
            text.text, text.num_known_chars, add_special_tokens=parsed.add_special_tokens
        )
    truncation = _truncation(parsed, model)
    whole = text.text
    if model.max_model_len_tokens is not None and parsed.api in _GENERATES:
        # More text than the longest tokens can hold is not worth tokenising.
        max_chars = model.max_model_len_tokens * tokenizer.max_chars_per_token
        if truncation is None and len(whole) > max_chars:
            raise _too_long(model.max_model_len_tokens, f"{len(whole)} characters")
        if truncation is not None and truncation.counts_special_tokens and len(whole) > max_chars:
            whole = whole[-max_chars:] if truncation.side == "left" else whole[:max_chars]
    tokens = tokenizer.encode(whole, add_special_tokens=parsed.add_special_tokens, truncation=truncation)
    return Prompt(tokens, len(tokens))


def _truncation(parsed: ParsedRequest, model: ServedModel) -> Truncation | None:
    num_tokens = parsed.truncate_prompt_tokens
    if num_tokens == -1:
        # The engine holds one token of the context back for its answer.
        reserved = 1 if parsed.max_output_tokens else 0
        num_tokens = model.max_model_len_tokens and model.max_model_len_tokens - reserved
    if num_tokens is None or parsed.api is Api.TOKENIZE:
        return None
    side = parsed.truncation_side or ("right" if parsed.api is Api.EMBEDDING else "left")
    return Truncation(num_tokens, side, counts_special_tokens=parsed.truncation_side is not None)


def _read(
    parsed: ParsedRequest, model: ServedModel, prompts: Sequence[Prompt], inexact: str | None
) -> ReadRequest:
    if parsed.truncate_prompt_tokens == -1 and parsed.max_output_tokens and not inexact:
        inexact = "versions of vLLM differ in where truncate_prompt_tokens = -1 cuts"
    if not inexact and parsed.api in _GENERATES:
        for prompt in prompts:
            if not prompt.tokens:
                raise RequestError(400, "The prompt must not be empty.", param="prompt")
            if model.max_model_len_tokens is not None and len(prompt.tokens) > model.max_model_len_tokens:
                raise _too_long(model.max_model_len_tokens, f"{len(prompt.tokens)} tokens")
    return ReadRequest(
        parsed.api,
        parsed.model,
        tuple(prompts),
        cache_salt=parsed.cache_salt,
        stream=parsed.stream,
        max_output_tokens=parsed.max_output_tokens,
        inexact=inexact,
    )


def _too_long(limit_tokens: int, length: str) -> RequestError:
    return RequestError(
        400,
        f"This model's maximum context length is {limit_tokens} tokens, but the prompt has {length}. "
        "Shorten the prompt.",
        param="input_tokens",
    )
