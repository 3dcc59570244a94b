"""What passes between the protocol servers (ext_proc, access log) and the router behind them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from gateway.labels import ANY_LABELS, Selector


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and for what service, where tenants are told apart."""

    tenant: str
    weight: float = 1.0
    """Share of the fleet under load, against the weights of other tenants."""
    priority: int = 0
    """vLLM's `priority` of the soonest that its requests may be; lower is sooner."""
    ttft_target_ms: float | None = None
    """Time to first token to aim for, where the request names none."""
    labels: Selector = ANY_LABELS
    """What a worker's labels must be, where the request does not say."""


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A client's request as ext_proc saw it. Header names are lower case; `body` is whole."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    candidates: frozenset[str] | None = None
    """`ip:port` subset that the endpoint picker protocol allows; None where it sets none."""
    caller: Caller | None = None
    """None where tenants are not told apart."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes. `destinations` are `ip:port`, to be tried in this order, never empty."""

    decision_id: str
    destinations: tuple[str, ...]
    request_headers: Mapping[str, str] = field(default_factory=dict)
    """Headers to set on the way to the engine."""
    removed_headers: tuple[str, ...] = ()
    """Headers that the engine must not see, such as the client's credentials."""
    body: bytes | None = None
    """What the engine gets in place of the client's body; None: the client's bytes, untouched."""
    response_headers: Mapping[str, str] = field(default_factory=dict)
    """Headers to add to the client's answer: worker, matched tokens, decision id, fallback reason."""
    num_prompt_tokens: int = 0
    """Of the request; estimated where they could not be read."""


class End(enum.StrEnum):
    """How a request's stream ended."""

    COMPLETE = "complete"
    ABORTED = "aborted"
    """The client or Envoy went away before the response was over."""


@dataclass(frozen=True, slots=True)
class Served:
    """What Envoy's access log, or a response that passed through here, says of a finished request.

    None where it was not measured.
    """

    decision_id: str
    status: int
    worker: str | None
    ttft_ms: float | None
    """From the first byte of the request to the first byte of the response body."""
    duration_ms: float | None
    request_bytes: int
    response_bytes: int
    end: End = End.COMPLETE
    """ABORTED where the response broke off, which the stream of `Router.finish` cannot always tell."""


class Router(Protocol):
    """The brain behind the servers; safe for any number of concurrent requests on one event loop."""

    def admit(self, head: HttpRequest, /) -> None:
        """Let a request go on to its body, which `head` is without.

        Raises:
            RequestError: whatever its body, the request cannot be served.
        """

    async def decide(self, request: HttpRequest) -> Decision:
        """Choose a worker and charge it.

        Raises:
            RequestError: the request cannot be served; nothing is charged.
        """

    async def finish(self, decision_id: str, end: End) -> None:
        """Settle what `decide` charged. Idempotent; an unknown id is ignored."""

    def record(self, served: Served) -> None:
        """Add what was measured to the decision's receipt; an unknown id is ignored."""


class Endpoints(Protocol):
    """The workers that Envoy may reach, for EDS."""

    @property
    def version(self) -> int:
        """Grows whenever `addresses` or `draining` changes; 0 until the workers are first known."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """`ip:port` of every live worker, sorted, without duplicates."""

    @property
    def draining(self) -> frozenset[str]:
        """Those of `addresses` that are to get no more requests."""

    async def changed(self, seen: int) -> None:
        """Return as soon as `version` differs from `seen`."""
