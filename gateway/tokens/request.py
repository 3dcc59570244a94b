"""What the router needs to know of a request, whatever API it came by."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvindex.blocks import BlockHash, Tokens, hash_blocks

Hasher = Callable[[BlockHash, Tokens, int], Sequence[BlockHash]]
"""Hashes like `hash_blocks`, which may remember what it has hashed before."""


class Api(enum.StrEnum):
    """The APIs whose prompts are understood; everything else passes to any live worker."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"
    TOKENIZE = "tokenize"
    GENERATE = "generate"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the engine will cache it.

    `num_comparable_tokens` counts the leading tokens whose content is known here: everything, or what
    comes before the first image, audio or video, whose cache keys only the engine can compute.
    """

    tokens: Tokens
    num_comparable_tokens: int
    hasher: Hasher = field(default=hash_blocks, repr=False, compare=False)

    def hashes(self, root: BlockHash, block_size: int) -> Sequence[BlockHash]:
        """Return the hashes of the full blocks of comparable tokens."""
        return self.hasher(root, self.tokens[: self.num_comparable_tokens], block_size)


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A parsed request.

    `model` is the name in the body: a base model or a LoRA adapter. A list of prompts (completions,
    embeddings) goes to one worker as a whole, as its client sent it.
    """

    api: Api
    model: str
    prompts: tuple[Prompt, ...]
    cache_salt: str | None = None
    stream: bool = False
    max_output_tokens: int | None = None
    inexact: str | None = None
    """Why the tokens may differ from the engine's; None where they are exact."""

    @property
    def num_tokens(self) -> int:
        """Prompt tokens over all prompts."""
        return sum(len(prompt.tokens) for prompt in self.prompts)
