"""What LMCache is told of a request and of a model, so that its keys separate what must not be shared."""

from __future__ import annotations

import secrets
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvindex.chunks import chunk_salt

if TYPE_CHECKING:
    from vllm.v1.request import Request

_MAX_NAME = 80
_SAMPLE_BYTES = 64 << 10


class TierRequest:
    """A request whose salt names the LoRA adapter as well; all else is the request's own.

    LMCache would read settings from the parameters of a client, and end the engine at one of the wrong kind:
    it sees none.

    A prompt of embeddings has no tokens that tell it from another: it gets a salt that nobody else has, and
    no prompt that could be stored.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self.sampling_params = None
        lora = request.lora_request
        self.cache_salt = chunk_salt(lora.lora_name if lora else None, request.cache_salt)
        if request.prompt_embeds is not None:
            self.cache_salt = secrets.token_hex(16)
            self.num_prompt_tokens = 0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401, D105 - the request's
        return getattr(self._request, name)


def model_name(served: str, traits: tuple[str, ...], weights: Path | None) -> str:
    """Return the name under which a model's chunks are kept.

    LMCache's keys have no more of a model than its name, and what it has stored outlives the engine. So the
    name tells apart all that makes KV differ.

    Args:
        served: the name that a person knows it by.
        traits: dtypes, quantisation, revision, layout; the name of a model that is no directory.
        weights: the directory of its files. A sample of each tells them from others.
    """
    digest = blake2b("\0".join(traits).encode(), digest_size=6)
    for file in sorted((weights or Path()).glob("*")) if weights else ():
        if file.suffix in (".safetensors", ".bin", ".gguf") or file.name == "config.json":
            size = file.stat().st_size
            digest.update(f"\0{file.name} {size}".encode())
            with file.open("rb") as opened:
                for start in {0, size // 2, max(0, size - _SAMPLE_BYTES)}:
                    opened.seek(start)
                    digest.update(opened.read(_SAMPLE_BYTES))
    name = served.replace("@", "_").strip("/")[-_MAX_NAME:].strip("/")
    return f"{name}-{digest.hexdigest()}"
