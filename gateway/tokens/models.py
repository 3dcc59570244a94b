"""Which models the fleet serves, and how their prompts become tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import RequestError


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One name that requests may ask for: a base model or a LoRA adapter on it."""

    name: str
    base: str
    """The model of the pool whose workers serve it; equals `name` unless this is an adapter."""
    tokenizer: str
    """Directory or hub id of the base model's tokenizer."""
    lora_name: str | None = None
    max_model_len_tokens: int | None = None
    chat_template: Path | None = None
    """Jinja file that the engines were given by `--chat-template`; None: the tokenizer's own."""


class Models:
    """The models of the live fleet, by the name that requests use. Immutable.

    Args:
        served: of two with the same name the first one wins.
    """

    def __init__(self, served: Iterable[ServedModel] = ()) -> None:
        self._by_name: dict[str, ServedModel] = {}
        for model in served:
            self._by_name.setdefault(model.name, model)

    def __iter__(self) -> Iterator[ServedModel]:
        """Iterate over every served name."""
        return iter(self._by_name.values())

    def find(self, name: str) -> ServedModel:
        """Return the model that requests call `name`.

        Raises:
            RequestError: 404, nobody serves it.
        """
        if model := self._by_name.get(name):
            return model
        served = ", ".join(sorted(self._by_name)) or "none"
        raise RequestError(
            404,
            f"The model `{name}` does not exist. Served here: {served}.",
            kind="NotFoundError",
            param="model",
        )
