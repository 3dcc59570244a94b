"""What the simulated engines are like: a built-in default, or a YAML file."""

from __future__ import annotations

from pathlib import Path

import msgspec
import msgspec.yaml

from gateway.errors import TraceError
from gateway.profile import Profile
from gateway.replay.engine import EngineSpec
from kvindex.errors import ConfigError


class EngineFile(Profile, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine as a file describes it: the costs of its steps, its cache, its scheduler's limits.

    The defaults stand for a dense model of 70 billion parameters with grouped-query attention, in 16 bits on
    eight H100 of one host: the size of Mooncake's own fleet. They are computed, not measured. Prefill: 140
    GFLOP a token at 40 % of the peak. Attention: 2.6 MFLOP a pair at the same. A step: 140 GB of weights at
    70 % of the memory's rate, and the exchange between the GPUs. A decoding request's context: 328 KB a token
    at the same. Cache: what the weights leave of 90 % of the memory.
    """

    prefill_tokens_per_s: float = 23_000.0
    attention_ns_per_pair: float = 0.8
    step_ms: float = 13.0
    decode_us_per_request: float = 50.0
    decode_ns_per_token: float = 17.0
    kv_tokens: int = 1_360_000
    max_num_batched_tokens: int = 8_192
    max_num_seqs: int = 256

    def spec(self, block_size: int) -> EngineSpec:
        """Return the engine for a trace that is cut into blocks of this size."""
        return EngineSpec(
            profile=Profile(**{name: getattr(self, name) for name in Profile.__struct_fields__}),
            num_blocks=self.kv_tokens // block_size,
            block_size=block_size,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
        )


def read_engine(file: Path | None) -> EngineFile:
    """Return the engine that `file` describes, the default without one.

    Raises:
        ConfigError: the file cannot be read, names an unknown setting or has a value that no engine has.
    """
    if file is None:
        return EngineFile()
    try:
        engine = msgspec.yaml.decode(file.read_bytes(), type=EngineFile)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"--engine {file}: {error}") from error
    positive = ("prefill_tokens_per_s", "step_ms", "kv_tokens", "max_num_batched_tokens", "max_num_seqs")
    for name in EngineFile.__struct_fields__:
        value = getattr(engine, name)
        if value < 0 or (value == 0 and name in positive):
            raise ConfigError(f"--engine {file}: {name} is {value}; it must be above 0")
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
