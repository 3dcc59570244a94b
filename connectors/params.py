"""What the gateway puts into `kv_transfer_params` of the two halves of a disaggregated request.

Both halves carry one object under the key `kvlane`, with the same transfer id:

    prefill: {"kvlane": {"transfer_id": ID, "role": "send"}}
    decode:  {"kvlane": {"transfer_id": ID, "role": "receive", "peer": "HOST:PORT", "peer_tp_size": N}}
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from connectors.errors import ProtocolError

KEY = "kvlane"


class TransferParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request's part in a transfer."""

    transfer_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    """Unguessable, and of use once: it is what entitles a peer to the blocks."""
    role: Literal["send", "receive"]
    peer: Annotated[str, msgspec.Meta(pattern=r"^([^\s:/]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}$")] | None = None
    """`host:port` of the sender's first rank, for the receiver; rank n listens at port + n."""
    peer_tp_size: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    """Tensor-parallel ranks of the sender, for the receiver."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the peer's first rank."""
        host, _, port = (self.peer or "").rpartition(":")
        return host.strip("[]"), int(port)


def new_transfer_id() -> str:
    """Return 128 random bits in hex."""
    return secrets.token_hex(16)


def parse_params(given: Mapping[str, Any] | None) -> TransferParams | None:
    """Return our part of a request's `kv_transfer_params`, or None if there is none.

    Raises:
        ProtocolError: it is malformed.
    """
    if not given or KEY not in given:
        return None
    try:
        params = msgspec.convert(given[KEY], TransferParams)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"kv_transfer_params.{KEY}: {error}") from error
    if params.role == "receive" and params.peer is None:
        raise ProtocolError(f"kv_transfer_params.{KEY}: a receiver needs `peer`")
    return params
