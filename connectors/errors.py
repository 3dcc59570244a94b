"""Every error of moving KV between engines, and to and from tiers.

KvlaneError
|- BenchFailed            a measurement could not be made
|- TiersUnavailable       the node's LMCache server does not come up, or does not answer
`- TransferError          a transfer ends here; the decode engine computes what is missing
   |- PeerRefused         the other engine will not: other model, other version, unknown transfer
   |- PeerLost            the other engine died, was cut off, or is silent
   |  `- TransferTimeout  it is there, but this did not happen in time
   |- ProtocolError       what it sent is no message of ours
   |- TransferAborted     this engine ended the request, or took its blocks back
   `- StagingExhausted    every staging buffer is in quarantine
"""

from __future__ import annotations

from kvindex.errors import KvlaneError


class BenchFailed(KvlaneError):
    """A measurement could not be made."""


class TiersUnavailable(KvlaneError):
    """The node's LMCache server does not come up, or does not answer."""


class TransferError(KvlaneError):
    """Root of the errors of a transfer. The message names the peer."""


class PeerRefused(TransferError):
    """The peer refuses; its reason is the message."""


class PeerLost(TransferError):
    """The peer is dead, unreachable or silent. Everything under way with it is lost."""


class TransferTimeout(PeerLost):
    """Something did not happen in time."""


class ProtocolError(TransferError):
    """A frame is too large, cut off, or not one of ours."""


class TransferAborted(TransferError):
    """The request has ended at this engine, or its blocks were taken back."""


class StagingExhausted(TransferError):
    """No staging buffer is left or will come back: unfinished requests hold them all."""
