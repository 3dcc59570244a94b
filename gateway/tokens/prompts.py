"""The prompts of a parsed request, as the engine will see and check them. Pure but for the CPU it takes.

Source: vLLM 0.32 `vllm/renderers/params.py` (TokenizeParams), `vllm/renderers/online_renderer.py`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gateway.errors import RequestError
from gateway.tokens.bodies import Chat, Input, ParsedRequest
from gateway.tokens.messages import has_billing_header
from gateway.tokens.models import ServedModel
from gateway.tokens.request import Api, Prompt, ReadRequest
from gateway.tokens.segments import Segments
from gateway.tokens.tokenizer import ModelTokenizer, Truncation, cut

# Prompts of the other APIs may be longer than the context, or empty.
_GENERATES = frozenset({Api.CHAT, Api.COMPLETION, Api.GENERATE})


@dataclass(frozen=True, slots=True)
class Draft:
    """One prompt before it is tokenised."""

    text: Segments
    inexact: str | None
    is_partly_known: bool
    """Whether the engine is sure to see only the part of the text that counts."""


def brings_template(parsed: ParsedRequest) -> bool:
    """Say whether the request brings a chat template: a program whose run time nobody knows."""
    return any(isinstance(given, Chat) and given.template is not None for given in parsed.inputs)


def given_prompts(parsed: ParsedRequest, model: ServedModel) -> ReadRequest:
    """Return the prompts of a request that brings token ids; it needs no tokenizer.

    Raises:
        RequestError: 400, a prompt is empty or longer than the context.
    """
    truncation = _truncation(parsed, model)
    given = [cut(array("I", ids), truncation) for ids in parsed.inputs if isinstance(ids, list)]
    prompts = [Prompt(tokens, len(tokens)) for tokens in given]
    return _read(parsed, model, prompts, parsed.inexact)


def draft_prompts(
    parsed: ParsedRequest, model: ServedModel, tokenizer: ModelTokenizer, *, trusts_templates: bool
) -> list[Draft]:
    """Return the prompts of a request that brings text or a conversation, rendered. Thread-safe.

    Args:
        parsed: the request.
        model: what it asks for.
        tokenizer: of that model.
        trusts_templates: a template that comes with the request may run here.

    Raises:
        RequestError: 400, the template refuses the conversation or yields what is not text, or a prompt
            is longer than the context.
        TokenizerError: the engine writes this model's chats in code.
    """
    texts = [_text(given, parsed, tokenizer, trusts_templates) for given in parsed.inputs]
    return [_draft(text, parsed, model, tokenizer) for text in texts]


def tokenized_prompts(
    parsed: ParsedRequest, model: ServedModel, tokenizer: ModelTokenizer, drafts: Sequence[Draft]
) -> ReadRequest:
    """Return the request's prompts, once their drafts are encoded.

    Raises:
        RequestError: 400, a prompt is empty or longer than the context.
    """
    truncation = _truncation(parsed, model)
    prompts = [_prompt(draft, parsed, tokenizer, truncation) for draft in drafts]
    inexact = next((draft.inexact for draft in drafts if draft.inexact), None)
    return _read(parsed, model, prompts, inexact)


class _Text(NamedTuple):
    text: str
    inexact: str | None = None
    num_known_chars: int | None = None
    """Leading characters that the engine is sure to see too; None: all."""


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


def _draft(text: _Text, parsed: ParsedRequest, model: ServedModel, tokenizer: ModelTokenizer) -> Draft:
    is_partly_known = text.num_known_chars is not None
    whole = text.text if is_partly_known else _bounded(text.text, parsed, model, tokenizer)
    try:
        segments = tokenizer.split(whole, counted_chars=text.num_known_chars, cache_salt=parsed.cache_salt)
    except UnicodeEncodeError as error:
        raise RequestError(400, f"The chat template yields what is not text: {error}") from error
    return Draft(segments, text.inexact, is_partly_known)


def _bounded(whole: str, parsed: ParsedRequest, model: ServedModel, tokenizer: ModelTokenizer) -> str:
    """Return what is worth tokenising: the longest tokens cannot hold more."""
    if model.max_model_len_tokens is None or parsed.api not in _GENERATES:
        return whole
    truncation = _truncation(parsed, model)
    max_chars = model.max_model_len_tokens * tokenizer.max_chars_per_token
    if len(whole) <= max_chars:
        return whole
    if truncation is None:
        raise _too_long(model.max_model_len_tokens, f"{len(whole)} characters")
    if truncation.counts_special_tokens:
        return whole[-max_chars:] if truncation.side == "left" else whole[:max_chars]
    return whole


def _prompt(
    draft: Draft, parsed: ParsedRequest, tokenizer: ModelTokenizer, truncation: Truncation | None
) -> Prompt:
    special = parsed.add_special_tokens
    if draft.is_partly_known:
        return tokenizer.counted_prompt(draft.text, add_special_tokens=special)
    tokens = tokenizer.tokens(draft.text, add_special_tokens=special, truncation=truncation)
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
