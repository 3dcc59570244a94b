"""What an error of Redis means to us, and what to do about it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from redis.asyncio.sentinel import MasterNotFoundError as AsyncMasterNotFoundError
from redis.exceptions import MovedError, RedisClusterException, RedisError
from redis.sentinel import MasterNotFoundError

from kvindex.errors import IndexFull, IndexRefused, IndexUnavailable
from kvindex.redis_url import RedisUrl

CLIENT_ERRORS = (RedisError, RedisClusterException)
"""Everything that redis-py raises: the second is not one of the first."""

_RIGHTS = "give the user the rights that docs/operations.md lists"

# From what Redis, Valkey, redis-py or OpenSSL say to what to do. Their codes alone do not do: redis-py
# takes them away, and Redis 6.2 wraps what a script meets into an error of another code.
_REFUSALS = {
    "without any password configured": "take user and password out of the URL, or give it a password",
    "Authentication required": "write user and password into the URL: redis://user:password@host",
    "asking: .*AuthenticationError": "correct sentinel_username and sentinel_password in the URL",
    "invalid username-password|invalid password": "correct user and password in the URL",
    "[Nn]o permissions|can't run this command|can't access at least one": _RIGHTS,
    "unknown command": "kvlane needs Redis 6.2 or newer, or Valkey, and none of its commands renamed",
    "DB index is out of range": "choose a database that it has",
    "luster mode is not enabled|cluster support disabled": "it is no cluster: write redis:// before its host",
    "^MOVED |not allowed in cluster mode": "it belongs to a cluster: write redis+cluster:// before its host",
    "CERTIFICATE_VERIFY_FAILED": "set ssl_ca_certs in the URL to the CA of its certificate, and use its name",
}
_FULL = "used memory > 'maxmemory'"
_HINTS = {
    _FULL: "it is full: CONFIG SET maxmemory to more; docs/operations.md says what the index needs",
    "^MISCONF ": (
        "it cannot save its snapshots: make room on its disk, or, as the index needs none, "
        "CONFIG SET stop-writes-on-bgsave-error no"
    ),
    "read only replica": "it is a replica now: let the URL lead to the master, or to Sentinels",
    "^BUSY ": "a script of somebody else keeps it busy: SCRIPT KILL ends it",
    "loading the dataset": "it has started and will be there soon",
}
_SCRIPT_FRAME = re.compile(
    r"Error running script \(call to \w+\): |@user_script: ?\d+: | script: (\w+, )?on @user_script:\d+\.$"
)


@contextmanager
def reaching(url: RedisUrl) -> Iterator[None]:
    """Turn what redis-py raises in the block into an error of ours.

    Raises:
        IndexRefused: nothing helps until somebody changes something.
        IndexUnavailable: the call may be tried again.
    """
    try:
        yield
    except CLIENT_ERRORS as error:
        raise _translated(error, url) from error


def is_demoted(error: Exception) -> bool:
    """Whether the server refuses a write because it has become a replica."""
    return "read only replica" in str(error)


def _translated(error: Exception, url: RedisUrl) -> IndexUnavailable:
    said = _said(error)
    for pattern, what_to_do in _REFUSALS.items():
        if re.search(pattern, said):
            return IndexRefused(f"Redis at {url}: {said}; {what_to_do}")
    if url.tls and "imeout connecting" in said:
        said += "; if it does not speak TLS on this port, write redis:// or give the port that does"
    if url.tls and not url.tls.ssl_certfile and re.search("closed|reset|lost|CERTIFICATE_REQUIRED", said):
        said += "; if it wants a client certificate, set ssl_certfile and ssl_keyfile in the URL"
    hint = next((f"; {hint}" for pattern, hint in _HINTS.items() if re.search(pattern, said)), "")
    return (IndexFull if _FULL in said else IndexUnavailable)(f"Redis at {url}: {said}{hint}")


def _said(error: Exception) -> str:
    """Return the error's own words, in one line, without where in a script it was met."""
    words = f"MOVED {error}" if isinstance(error, MovedError) else " ".join(str(error).split())
    if isinstance(error, (MasterNotFoundError, AsyncMasterNotFoundError)):
        # What follows shows client objects, with all that they were made of.
        words, _, rest = words.partition(" : ")
        kinds = sorted(set(re.findall(r" - (?:\w+:)?(\w+Error)\b", rest)))
        words += f" (of asking: {', '.join(kinds)})" if kinds else ""
    words = _SCRIPT_FRAME.sub("", words).strip().removeprefix("-").removesuffix(".")
    return words or type(error).__name__
