"""KV on its way between simulated workers, chunk by chunk as it is computed. Pure: who calls has the clock.

A worker sends one chunk at a time, and receives one at a time; a chunk is what one step computed. Sent blocks
stay in use until the last of them has arrived, or until nobody has asked for them for as long as a lease.

Source: `connectors/sender.py` (what leaves when, leases), `connectors/pace.py` (what receivers measure).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from connectors.pace import Moved, Pace
from kvindex.errors import ConfigError
from kvindex.worker import Role

_WIRE = re.compile(r"([0-9.]+)(?:@([0-9.]+))?")
_ROLES = re.compile(r"(prefill|decode)=([0-9]+)")

LEASE_MS = 10_000.0
"""How long computed blocks wait for their receiver. Source: `connectors/config.py`, `lease_s`."""


@dataclass(frozen=True, slots=True)
class WireSpec:
    """Every worker's link to all others, the same both ways."""

    gb_per_s: float
    latency_ms: float = 0.0
    """From a chunk's last byte on the link to its being there."""


def read_wire(text: str) -> WireSpec:
    """Read what `--wire` says.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        gb_per_s, latency_ms = _WIRE.fullmatch(text).groups()  # type: ignore[union-attr]
        wire = WireSpec(float(gb_per_s), float(latency_ms or 0))
    except (AttributeError, ValueError):
        wire = WireSpec(0.0)
    if wire.gb_per_s <= 0:
        raise ConfigError(f"--wire {text}: write GB_PER_S[@LATENCY_MS], for example 50@2")
    return wire


def read_roles(text: str, num_workers: int) -> tuple[Role, ...]:
    """Read what `--roles` says; who is not counted there is for both.

    Raises:
        ConfigError: it cannot be read, or counts more workers than there are.
    """
    found = [_ROLES.fullmatch(part) for part in text.split(",")]
    roles = tuple(Role(each[1]) for each in found if each for _ in range(int(each[2])))
    if not all(found):
        raise ConfigError(f"--roles {text}: write prefill=COUNT,decode=COUNT, or one of them")
    if len(roles) > num_workers:
        raise ConfigError(f"--roles {text}: there are {num_workers} workers")
    return roles + (Role.BOTH,) * (num_workers - len(roles))


@dataclass(eq=False, slots=True)
class Transfer:
    """One prompt's KV, from the worker that computes it to the one that answers. Times in ms."""

    sender: int
    receiver: int
    num_tokens: int
    first_token: int = -1
    """What the receiver asked for first; -1 until it has asked."""
    num_ready_tokens: int = 0
    num_bytes: int = 0
    wire_ms: float = 0.0
    """With chunks on their way."""
    computed_ms: float = 0.0
    asked_ms: float = 0.0
    arrived_ms: float = 0.0
    """The latest chunk."""
    _num_sent_tokens: int = field(default=0, repr=False)

    @property
    def is_asked_for(self) -> bool:
        """Whether the receiver has room for it."""
        return self.first_token >= 0

    @property
    def waited_ms(self) -> float:
        """Time that the receiver waited when all was computed."""
        return max(0.0, self.arrived_ms - max(self.computed_ms, self.asked_ms))

    def take(self) -> int:
        """Return the tokens that can be sent now and were not; from now on they are."""
        if not self.is_asked_for or self.num_ready_tokens <= (
            begin := max(self.first_token, self._num_sent_tokens)
        ):
            return 0
        self._num_sent_tokens = self.num_ready_tokens
        return self.num_ready_tokens - begin


class Wires:
    """All links of a fleet, and what the workers at their ends measure.

    Args:
        bytes_per_token: KV of a token.
        block_size: whole blocks leave, and at the end what is left.
    """

    def __init__(self, spec: WireSpec, num_workers: int, *, bytes_per_token: int, block_size: int) -> None:
        self._spec = spec
        self._bytes_per_token = bytes_per_token
        self._block_size = block_size
        self._sending_until_ms = [0.0] * num_workers
        self._receiving_until_ms = [0.0] * num_workers
        self._arrived_s = 0.0
        self.paces = [Pace(lambda: self._arrived_s) for _ in range(num_workers)]
        """What each worker has measured as a receiver."""

    def computed(self, transfer: Transfer, num_tokens: int, now_ms: float) -> float | None:
        """Send what a step added to the first `num_tokens`; return when all is there, if it was the rest."""
        is_all = num_tokens == transfer.num_tokens
        transfer.num_ready_tokens = (
            num_tokens if is_all else num_tokens // self._block_size * self._block_size
        )
        transfer.computed_ms = now_ms
        return self._send(transfer, now_ms)

    def asked(self, transfer: Transfer, first_token: int, now_ms: float) -> float | None:
        """Send what was computed before it was asked for; return when all is there, if it was the rest."""
        transfer.first_token, transfer.asked_ms = first_token, now_ms
        return self._send(transfer, now_ms)

    def arrived(self, transfer: Transfer) -> None:
        """Have the receiver measure a transfer that is over."""
        self._arrived_s = transfer.arrived_ms / 1e3
        self.paces[transfer.receiver].observe(Moved(transfer.num_bytes, transfer.wire_ms / 1e3))

    def _send(self, transfer: Transfer, now_ms: float) -> float | None:
        if not (num_tokens := transfer.take()):
            return None
        num_bytes = num_tokens * self._bytes_per_token
        sender, receiver = transfer.sender, transfer.receiver
        began_ms = max(now_ms, self._sending_until_ms[sender], self._receiving_until_ms[receiver])
        ended_ms = began_ms + num_bytes / (self._spec.gb_per_s * 1e6)
        self._sending_until_ms[sender] = self._receiving_until_ms[receiver] = ended_ms
        arrived_ms = ended_ms + self._spec.latency_ms
        transfer.num_bytes += num_bytes
        transfer.wire_ms += arrived_ms - max(now_ms, transfer.arrived_ms)
        transfer.arrived_ms = arrived_ms
        return arrived_ms if transfer.num_ready_tokens == transfer.num_tokens else None
