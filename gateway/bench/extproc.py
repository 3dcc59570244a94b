"""`kvlane bench extproc`: what kvlane adds to a request's time, over the same Envoy without ext_proc.

Envoys of one bootstrap share the same engines, which answer at once: without ext_proc, with an ext_proc
server that does nothing, and with kvlane (a gateway process, a real Redis, a real tokenizer). Every request
goes to all three in turn; reported are the differences of the medians and of the 99th
percentiles.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress

from gateway.bench.conversations import Message, chat_body, conversation, next_turn
from gateway.bench.load import Client, Sample, cpu_s, interleave, saturate
from gateway.bench.stack import KVLANE, MODEL, PLAIN, TRIVIAL, TWO, SimulatedCache, Stack, run_stack
from gateway.bench.streams import NUM_STREAMS, hold_open
from gateway.errors import BenchFailed
from kvindex.figures import Figure

SEED = 20
REFERENCE = "trivial ext_proc"
NUM_WARM_CONVERSATIONS = 4
NUM_CLIENTS = 16
NUM_ROUNDS = 3
ROUND_S = 4.0
MIN_ROUND_S = 0.5
"""A process's CPU time is counted in steps of 10 ms."""
TOKENIZER_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Case:
    """Requests of one size. Warm: the next turns of conversations that a worker holds."""

    name: str
    num_bytes: int
    num_requests: int
    warm: bool = False
    aim_p50_ms: float | None = None
    aim_p99_ms: float | None = None


WARM = Case("400kb_warm", 400_000, 120, warm=True, aim_p50_ms=4, aim_p99_ms=8)
CASES = (
    Case("2kb", 2_000, 2_000, aim_p50_ms=1.3, aim_p99_ms=3),
    Case("32kb", 32_000, 500),
    Case("400kb_cold", 400_000, 120),
    WARM,
)
RATE_TARGETS = {"2kb": ">= 1200", "400kb_warm": ">= 400"}
NUM_BODIES = 8_000
NUM_WARM_BODIES = 400


def run(tokenizer: Path, *, scale: float, console: Console) -> list[Figure]:
    """Measure everything and return the figures.

    Args:
        tokenizer: directory of the tokenizer, with a chat template.
        scale: share of the usual number of requests to send.

    Raises:
        BenchFailed: a request was not answered as the measurement needs it.
    """
    if not (tokenizer / "tokenizer_config.json").exists():
        raise BenchFailed(f"no tokenizer in {tokenizer}: `make demo` makes one, or give --tokenizer")
    draw = random.Random(SEED)  # noqa: S311 (the same requests every time)
    figures: list[Figure] = []
    fallbacks = 0
    with run_stack(tokenizer) as stack, Progress(console=console, transient=True) as progress:
        for name in (KVLANE, TWO):
            _load_tokenizer(stack.addresses[name], draw)
        round_s = max(MIN_ROUND_S, ROUND_S * min(scale, 1))
        # Before the large bodies, whose memory the gateway gives back at times of its own.
        rounds = progress.track(range(NUM_ROUNDS), description="2kb: as many as possible")
        num_bodies = max(100, round(NUM_BODIES * scale))
        small = [chat_body(MODEL, conversation(2_000, draw)) for _ in range(num_bodies)]
        figures += _rates(stack, "2kb", small, rounds, round_s)
        figures += _streams(stack, draw, num_streams=max(50, round(NUM_STREAMS * min(scale, 1))))
        compared = {name: stack.addresses[name] for name in (PLAIN, TRIVIAL, KVLANE)}
        for case in CASES:
            num_requests = max(2, round(case.num_requests * scale))
            bodies = list(_bodies(case, num_requests + 1, stack.cache, draw))
            steps = progress.track(bodies, description=f"{case.name}: one at a time")
            samples = interleave(steps, compared, draw)
            fallbacks += _check(case, samples[KVLANE])
            figures += _added(case, samples)
        rounds = progress.track(range(NUM_ROUNDS), description=f"{WARM.name}: as many as possible")
        num_bodies = NUM_WARM_CONVERSATIONS + max(NUM_CLIENTS, round(NUM_WARM_BODIES * min(scale, 1)))
        turns = list(_bodies(WARM, num_bodies, stack.cache, draw))
        interleave(turns[:NUM_WARM_CONVERSATIONS], {KVLANE: stack.addresses[KVLANE]}, draw)
        figures += _rates(stack, WARM.name, turns[NUM_WARM_CONVERSATIONS:], rounds, round_s)
    figures.append(Figure("extproc.fallbacks", fallbacks, "requests", "<= 0"))
    return figures


def _load_tokenizer(address: str, draw: random.Random) -> None:
    """Send requests until one is routed by its tokens."""
    body = chat_body(MODEL, conversation(2_000, draw))
    deadline = time.monotonic() + TOKENIZER_TIMEOUT_S
    with closing(Client(address)) as client:
        while reason := client.post(body).headers.get("x-kvlane-fallback"):
            if time.monotonic() > deadline:
                raise BenchFailed(f"after {TOKENIZER_TIMEOUT_S:.0f} s still routed by load alone: {reason}")


def _bodies(case: Case, count: int, cache: SimulatedCache, draw: random.Random) -> Iterator[bytes]:
    held: list[list[Message]] = []
    if case.warm:
        held = [conversation(case.num_bytes, draw) for _ in range(NUM_WARM_CONVERSATIONS)]
        for messages in held:
            cache.hold(messages)
    for number in range(count):
        if held:
            yield chat_body(MODEL, next_turn(held[number % len(held)], draw))
        else:
            yield chat_body(MODEL, conversation(case.num_bytes, draw))


def _check(case: Case, samples: Sequence[Sample]) -> int:
    """Return how many requests were routed by load alone.

    Raises:
        BenchFailed: the others did not match what the index holds, or matched what it does not.
    """
    routed = [sample.headers for sample in samples if "x-kvlane-fallback" not in sample.headers]
    for headers in routed:
        matched_tokens = int(headers.get("x-kvlane-matched-tokens", -1))
        if matched_tokens < 0 or (matched_tokens > 0) != case.warm:
            raise BenchFailed(f"{case.name}: a request matched {matched_tokens} tokens")
    return len(samples) - len(routed)


def _added(case: Case, samples: Mapping[str, Sequence[Sample]]) -> Iterator[Figure]:
    for what, percentile, aim_ms in (("p50", 50, case.aim_p50_ms), ("p99", 99, case.aim_p99_ms)):
        ms = {
            name: _percentile((sample.took_ms for sample in each), percentile)
            for name, each in samples.items()
        }
        yield Figure(
            f"extproc.added_{what}_ms_{case.name}",
            value=ms[KVLANE] - ms[PLAIN],
            unit="ms",
            target=None if aim_ms is None else f"<= {aim_ms:g}",
            reference=REFERENCE,
            reference_value=ms[TRIVIAL] - ms[PLAIN],
        )


def _percentile(values: Iterable[float], percentile: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percentile - 1]


def _rates(
    stack: Stack, name: str, bodies: list[bytes], rounds: Iterable[int], round_s: float
) -> Iterator[Figure]:
    """Yield the requests that one CPU second of the ext_proc server serves under load.

    Two gateways beside one: twice what a CPU second of the two serves, over what one of the one serves.
    That is the ratio of their rates where each has a core, and can be measured where they share one: it
    falls short of 2 by what they cost each other.
    """
    setups = (TRIVIAL, KVLANE, TWO) if name == "2kb" else (TRIVIAL, KVLANE)
    rates: dict[str, list[float]] = {setup: [] for setup in setups}
    for _ in rounds:
        for setup, measured in rates.items():
            before_s = cpu_s(stack.pids[setup])
            count = saturate(stack.addresses[setup], bodies, num_clients=NUM_CLIENTS, duration_s=round_s)
            measured.append(count / (cpu_s(stack.pids[setup]) - before_s))
    rate = {setup: statistics.median(measured) for setup, measured in rates.items()}
    yield Figure(
        f"extproc.rps_per_core_{name}",
        value=rate[KVLANE],
        unit="1/CPU s",
        target=RATE_TARGETS[name],
        reference=REFERENCE,
        reference_value=rate[TRIVIAL],
    )
    if TWO in rate:
        yield Figure("extproc.scaling_2", 2 * rate[TWO] / rate[KVLANE], "times", ">= 1.8")


def _streams(stack: Stack, draw: random.Random, *, num_streams: int) -> Iterator[Figure]:
    fields = {"model": MODEL, "messages": conversation(2_000, draw), "stream": True, "max_tokens": 16}
    body = msgspec.json.encode(fields)
    (pid,) = stack.pids[KVLANE]
    held = hold_open(stack.addresses[KVLANE], stack.engines[0], pid, body, num_streams=num_streams)
    yield Figure("extproc.errors_2000_streams", held.num_errors, "requests", "<= 0")
    yield Figure("extproc.kb_per_open_request", held.kb_per_stream, "KB", "<= 64")
