"""The side channel's messages: frames of a length (u32, big-endian) and a msgpack map, over TCP.

The receiver connects. Hello, Welcome, Ready; from then on any number of transfers share the connection, each
from Subscribe to End or Failed. The bytes of the KV go over the transport that was agreed on.
"""

from __future__ import annotations

import msgspec

from connectors.geometry import Chunk, Geometry

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 1 << 20


class Message(msgspec.Struct, frozen=True, tag=True):
    """Any of them."""


class Hello(Message, frozen=True):
    """Receiver: who I am."""

    version: int
    model: str
    """What must be equal for the numbers to mean the same: name and quantisation."""
    geometry: Geometry
    transports: list[str]
    chunk_bytes: int
    """What fits into one of my staging buffers."""


class Welcome(Message, frozen=True):
    """Sender: who I am, and the transport we use."""

    geometry: Geometry
    transport: str
    address: bytes


class Refused(Message, frozen=True):
    """Sender: no, because of this."""

    reason: str


class Ready(Message, frozen=True):
    """Receiver: where the transport reaches me."""

    address: bytes


class Subscribe(Message, frozen=True):
    """Receiver: send me this transfer, from this token on."""

    transfer_id: str
    first_token: int


class ChunkOffered(Message, frozen=True):
    """Sender: a chunk that can be fetched now."""

    transfer_id: str
    chunk: Chunk
    ticket: bytes


class End(Message, frozen=True):
    """Sender: every chunk has been offered."""

    transfer_id: str


class Failed(Message, frozen=True):
    """Sender: no more chunks will come."""

    transfer_id: str
    reason: str


class Cancel(Message, frozen=True):
    """Receiver: no more chunks are wanted. The sender answers with Failed."""

    transfer_id: str


class Ping(Message, frozen=True):
    """Either: I am here."""


class Pong(Message, frozen=True):
    """The answer to Ping."""


AnyMessage = (
    Hello | Welcome | Refused | Ready | Subscribe | ChunkOffered | End | Failed | Cancel | Ping | Pong
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """Return the frame of a message."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


def decode(body: bytes) -> AnyMessage:
    """Return the message of a frame's body.

    Raises:
        msgspec.DecodeError: it is none.
    """
    message: AnyMessage = _decoder.decode(body)
    return message
