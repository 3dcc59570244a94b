"""What the simulated engines are like: a built-in default, or a YAML file."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gateway.errors import TraceError
from gateway.profile import Profile
from gateway.replay.engine import EngineSpec
from kvindex.config import describe
from kvindex.errors import ConfigError

Count = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class EngineFile(Profile):
    """An engine as a file describes it: the costs of its steps, its cache, its scheduler's limits.

    The defaults stand for a dense model of 70 billion parameters with grouped-query attention, in 16 bits on
    eight H100 of one host: the size of Mooncake's own fleet. They are computed, not measured. Prefill: 140
    GFLOP a token at 40 % of the peak. Attention: 2.6 MFLOP a pair at the same. A step: 140 GB of weights at
    70 % of the memory's rate, and the exchange between the GPUs. A decoding request's context: 328 KB a token
    at the same. Cache: what the weights leave of 90 % of the memory, at 328 KB a token.
    """

    prefill_tokens_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 23_000.0
    attention_ns_per_pair: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8
    step_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 13.0
    decode_us_per_request: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 50.0
    decode_ns_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 17.0
    kv_tokens: Count = 1_360_000
    max_num_batched_tokens: Count = 8_192
    max_num_seqs: Count = 256
    kv_bytes_per_token: Count = 327_680

    def spec(self, block_size: int) -> EngineSpec:
        """Return the engine for a trace that is cut into blocks of this size."""
        return EngineSpec(
            profile=Profile(**{each.name: getattr(self, each.name) for each in fields(Profile)}),
            num_blocks=self.kv_tokens // block_size,
            block_size=block_size,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            bytes_per_token=self.kv_bytes_per_token,
        )


def read_engine(file: Path | None) -> EngineFile:
    """Return the engine that `file` describes, the default without one.

    Raises:
        ConfigError: the file cannot be read, names an unknown setting or has a value that no engine has.
    """
    if file is None:
        return EngineFile()
    try:
        engine = TypeAdapter(EngineFile).validate_python(yaml.safe_load(file.read_text()) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--engine {file}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"--engine {file}: {describe(error)}") from error
    if engine.max_num_seqs >= engine.max_num_batched_tokens:
        raise ConfigError(f"--engine {file}: max_num_seqs must be below max_num_batched_tokens")
    return engine


def check_fits(spec: EngineSpec, longest_tokens: int) -> None:
    """Refuse a trace whose longest request would wait for room for ever.

    Raises:
        TraceError: it has more tokens than an engine has room for.
    """
    room_tokens = spec.num_blocks * spec.block_size
    if longest_tokens > room_tokens:
        raise TraceError(
            f"the longest request has {longest_tokens:,} tokens with its answer, "
            f"an engine's cache {room_tokens:,}: "
            "set kv_tokens in the --engine file"
        )
