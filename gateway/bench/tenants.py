"""`kvlane bench tenants`: what telling tenants apart adds to a request in the gateway's own process.

Measured is the gate with a router behind it that does nothing: the key is looked up, limits are charged, the
body is taken apart, salted and put together. The reference decodes the same body whole and encodes it again.
Both in CPU time.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable

import msgspec

from gateway.bench.conversations import chat_body, conversation
from gateway.decision import Decision, End, HttpRequest, Served
from gateway.tenants.gate import TenantGate
from gateway.tenants.keys import hash_key, new_key
from gateway.tenants.limits import Limiter
from gateway.tenants.roster import Roster, Tenant
from kvindex.figures import Figure

SEED = 20
NUM_TENANTS = 1_000
NUM_ROUNDS = 9
REFERENCE = "decode, encode"


class _Idle:
    """A router that sends everything to one place."""

    def admit(self, _: HttpRequest) -> None:
        """See `Router`."""

    async def decide(self, _: HttpRequest) -> Decision:
        """See `Router`."""
        return Decision("0" * 16, ("127.0.0.1:1",))

    async def finish(self, decision_id: str, end: End) -> None:
        """See `Router`."""

    def record(self, served: Served) -> None:
        """See `Router`."""


def run(*, scale: float) -> list[Figure]:
    """Measure and return the figures.

    Args:
        scale: share of the usual number of requests.
    """
    return asyncio.run(_run(scale))


async def _run(scale: float) -> list[Figure]:
    draw = random.Random(SEED)  # noqa: S311 (the same requests every time)
    keys = [new_key() for _ in range(NUM_TENANTS)]
    limits = {"requests_per_s": 1e9, "prompt_tokens_per_s": 1e12, "max_concurrent": 1_000_000}
    roster = Roster(
        Tenant.model_validate({"name": f"tenant-{number}", "keys": [{"sha256": hash_key(key)}], **limits})
        for number, key in enumerate(keys)
    )
    gate = TenantGate(_Idle(), lambda: roster, Limiter(), secret=b"s" * 32)
    tokens = msgspec.json.encode({"model": "m", "prompt": [draw.randrange(100_000) for _ in range(60_000)]})
    figures = []
    for name, path, body, count, aim_ms in (
        ("2kb", "/v1/chat/completions", chat_body("m", conversation(2_000, draw)), 2_000, 0.1),
        ("400kb", "/v1/chat/completions", chat_body("m", conversation(400_000, draw)), 100, 1.0),
        ("400kb_tokens", "/v1/completions", tokens, 100, 1.0),
    ):
        request = HttpRequest("POST", path, {"authorization": f"Bearer {draw.choice(keys)}"}, body)

        async def through_the_gate(request: HttpRequest = request) -> None:
            gate.admit(request)
            decision = await gate.decide(request)
            await gate.finish(decision.decision_id, End.COMPLETE)

        async def whole(body: bytes = body) -> None:
            msgspec.json.encode(msgspec.json.decode(body))

        num_calls = max(1, round(count * scale))
        gate_ms, whole_ms = await _medians_ms(through_the_gate, whole, num_calls=num_calls)
        figures.append(
            Figure(
                f"tenants.gate_ms_{name}",
                value=gate_ms,
                unit="ms",
                target=f"<= {aim_ms:g}",
                reference=REFERENCE,
                reference_value=whole_ms,
            )
        )
    return figures


async def _medians_ms(*works: Callable[[], Awaitable[None]], num_calls: int) -> list[float]:
    """Return each work's median over rounds in which they take turns."""
    rounds: list[list[float]] = [[] for _ in works]
    for _ in range(NUM_ROUNDS):
        for work, measured in zip(works, rounds, strict=True):
            started_s = time.process_time()
            for _ in range(num_calls):
                await work()
            measured.append((time.process_time() - started_s) / num_calls * 1000)
    return [statistics.median(measured) for measured in rounds]
