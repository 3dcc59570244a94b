"""Every error of the gateway.

KvlaneError
|- ConfigError             from kvindex: a setting is wrong
`- GatewayError
   |- ProcessEnded         a process of a local fleet is gone or did not get ready
   |- BenchFailed          a bench cannot be run here, or was not answered as its figures need it
   |- TraceError           a file is no trace, or its requests fit no worker
   |- ModelNotServed       a worker does not serve a model under its name
   |- Unverified           a worker cannot be checked now: nothing is known to be wrong with it
   |- ProtocolViolation    the proxy sends what the ext_proc protocol or our use of it does not allow
   |- RequestError         the client's request cannot be served; carries the OpenAI answer
   `- TokenizerError       a model's tokenizer or chat template cannot be used here
"""

from __future__ import annotations

import msgspec

from gateway.parity import Reason
from kvindex.errors import KvlaneError


class GatewayError(KvlaneError):
    """Root of the gateway's errors."""


class ProcessEnded(GatewayError):
    """A process of a local fleet ended by itself or did not become ready in time."""


class BenchFailed(GatewayError):
    """A bench cannot be run here, or was not answered as it must be: its figures would mean nothing."""


class TraceError(GatewayError):
    """A file cannot be replayed; the message says why."""


class ModelNotServed(GatewayError):
    """A worker knows the API that it was asked by, and not the model."""


class Unverified(GatewayError):
    """A worker does not answer a check, or refuses to; nothing is known to be wrong with it.

    Args:
        reason: for metrics and messages.
        message: what was seen, for people.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ProtocolViolation(GatewayError):
    """An ext_proc stream breaks the protocol, or is configured so that no pick can be made."""


class TokenizerError(GatewayError):
    """A tokenizer or chat template cannot be loaded or applied; routing goes on without overlap."""


class RequestError(GatewayError):
    """The request cannot be served.

    Args:
        status: HTTP status to answer with.
        message: what is wrong and what to do, for the client.
        kind: `type` of the OpenAI error object, as vLLM names it (`BadRequestError`, `NotFoundError`).
        param: the request field at fault.
        retry_after_s: sent as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "BadRequestError",
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """Return the OpenAI error object as JSON.

        Source: vLLM 0.32 `vllm/entrypoints/openai/engine/protocol.py`, ErrorResponse.
        """
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return msgspec.json.encode({"error": error})


DEFECTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    KvlaneError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a defect of ours shows as where it must not cost a request its answer. Anything else ends the
request's stream with an error, and Envoy goes by its own failure mode."""
