"""Every error of the index.

KvlaneError
|- ConfigError            a setting is wrong; the message says which and what to do
|- AdminUnavailable       a gateway's admin API does not answer, or refuses
|- EngineUnavailable      an engine's API does not answer, or not as vLLM does
|- StoreUnavailable       an LMCache server or one of its stores does not answer, or cannot be listed
`- KvIndexError
   |- IndexUnavailable    Redis cannot be reached or cannot answer; the call may be tried again
   |  |- IndexFull        Redis has no memory for more; nothing was changed, what it holds stays right
   |  `- IndexRefused     also a ConfigError: it will go on refusing until somebody changes a setting
   |- SlotLost            the slot is not ours any more: open a fresh one and resend the state
   |- WorkerConflict      a live worker already publishes under this name
   |- MalformedEvent      an event of an engine or of an LMCache server cannot be read
   `- EventsLost          KV events are missing: what the engine holds is not known any more
"""

from __future__ import annotations


class KvlaneError(Exception):
    """Root of everything that kvlane raises on purpose."""


class ConfigError(KvlaneError):
    """A setting is wrong. The message is one line: what is wrong and what to do."""


class AdminUnavailable(KvlaneError):
    """The admin API of a gateway cannot be reached, or refuses what it was asked."""


class EngineUnavailable(KvlaneError):
    """An engine's HTTP API cannot be reached, or does not answer as vLLM does."""


class StoreUnavailable(KvlaneError):
    """An LMCache server's HTTP API does not answer as LMCache does, or a store of it cannot be listed."""


class KvIndexError(KvlaneError):
    """Root of the index's errors."""


class IndexUnavailable(KvIndexError):
    """Redis cannot be reached or refuses to answer for now; nothing is known to have changed."""


class IndexFull(IndexUnavailable):
    """Redis has reached its maxmemory: nothing was changed. Leases and loads may still be written."""


class IndexRefused(IndexUnavailable, ConfigError):
    """Redis refuses us: a wrong password, a missing right, the wrong kind of server.

    At the start of a process that is a wrong setting. In a running one it is an outage like any other,
    which ends when the setting has been corrected, here or in Redis.
    """


class SlotLost(KvIndexError):
    """The slot is fenced, swept or unknown: open a fresh one and send the whole state again."""


class WorkerConflict(KvIndexError):
    """Another live process publishes under the same worker id."""


class MalformedEvent(KvIndexError):
    """A message of an engine's event stream is not an event batch, or one of an LMCache server is none."""


class EventsLost(KvIndexError):
    """Events of an engine are missing or unreadable: forget its blocks and follow it anew."""
