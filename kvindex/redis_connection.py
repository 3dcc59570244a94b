"""Ways to Redis: one server, a master behind Sentinels, or a cluster, all called alike.

A failover costs a caller one error or none: a dropped connection is made anew, to whoever is the
master by then; a script that a new master lacks is sent again; redirections are followed.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.sentinel
import redis.cluster
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisClusterException, RedisError, ResponseError
from redis.retry import Retry

from kvindex.config import IndexConfig
from kvindex.index import nothing
from kvindex.redis_errors import is_demoted, reaching
from kvindex.redis_line import BlockingLine, Command, Line
from kvindex.redis_url import RedisUrl, Topology, parse_redis_url

_MAX_CONNECTIONS = 32
"""Of one event loop; more calls at once wait for their turn, as they would in Redis itself."""

_RETRIES = 2
"""Every call may be repeated, so a connection that Redis has dropped meanwhile costs no error."""

Reply = Any
"""What Redis answers: bytes, int, None, or a list of these."""


class Master(NamedTuple):
    """A server that takes writes, and how to ask it."""

    where: str
    call: Callable[..., Awaitable[Reply]]


class Script:
    """A Lua script and the name under which Redis caches it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class ScriptCall(NamedTuple):
    """A script and its arguments."""

    script: Script
    args: Sequence[str | bytes | int]


class Connection:
    """A blocking way to Redis, for one thread. Connects on first use.

    Its calls raise `IndexUnavailable`, which is also `IndexRefused` if only a person can help.

    Raises:
        ConfigError: the URL is not one of ours.
    """

    def __init__(self, config: IndexConfig) -> None:
        self._config = config
        self.url = parse_redis_url(config.redis_url)
        self._client: Any = None
        self._line: BlockingLine | None = None

    def call(self, *command: str | bytes | int) -> Reply:
        """Return the answer to one command."""
        with reaching(self.url):
            return self._call(*command)

    def run(self, script: Script, key: str, *args: str | bytes | int) -> Reply:
        """Return what `script` returns; all its keys share the hash tag of `key`."""
        (reply,) = self.run_each(key, [ScriptCall(script, args)])
        return reply

    def run_each(
        self, key: str, calls: Sequence[ScriptCall], meanwhile: Callable[[], None] = nothing
    ) -> list[Reply]:
        """Return what each script returns for its arguments; others' calls go between.

        `meanwhile` is called before each answer, on a server while it is at work.
        If one is refused, those behind it are made all the same. After an error it is unknown which were
        made, and each may have been made more than once.
        """
        evaluate = self._call_each if self.url.topology is Topology.CLUSTER else self._call_in_line
        with reaching(self.url):
            commands: list[Command] = [("EVALSHA", script.sha, 1, key, *args) for script, args in calls]
            replies = evaluate(commands, meanwhile)
            if any(isinstance(reply, NoScriptError) for reply in replies):
                commands = [("EVAL", script.source, 1, key, *args) for script, args in calls]
                replies = evaluate(commands, meanwhile)
            for reply in replies:
                if isinstance(reply, RedisError):
                    raise reply
            return replies

    def _call_each(self, commands: Sequence[Command], meanwhile: Callable[[], None]) -> list[Reply]:
        replies: list[Reply] = []
        for command in commands:
            meanwhile()
            try:
                replies.append(self._call(*command))
            except ResponseError as refusal:
                replies.append(refusal)
        return replies

    def _call(self, *command: str | bytes | int) -> Reply:
        try:
            self._client = self._client or _client(_BLOCKING, self.url, self._config)
            return self._client.execute_command(*command)
        except RedisClusterException:
            # No node that it knew answers: begin again with those of the URL.
            self.close()
            raise
        except RedisError as error:
            if not is_demoted(error) or self.url.topology is Topology.CLUSTER:
                raise
            # A new connection leads to the new master, by Sentinel or by name.
            self._client.connection_pool.disconnect(inuse_connections=False)
            return self._client.execute_command(*command)

    def _call_in_line(self, commands: Sequence[Command], meanwhile: Callable[[], None]) -> list[Reply]:
        """Do as `_call_each`, for less; not for commands whose answers redis-py reads, nor for a cluster."""
        self._client = self._client or _client(_BLOCKING, self.url, self._config)
        line = self._line = self._line or _blocking_line(self._client.connection_pool, self._config)
        replies = line.call_each(commands, meanwhile)
        if any(isinstance(reply, RedisError) and is_demoted(reply) for reply in replies):
            line.close()
            return line.call_each(commands)
        return replies

    def home(self, key: str) -> str | None:
        """Return the node to which the last call about `key` went; None unless it is a cluster."""
        if self.url.topology is not Topology.CLUSTER or self._client is None:
            return None
        node = self._client.get_node_from_key(key)
        return str(node.name) if node else None

    def close(self) -> None:
        """Release the connections; a later call makes new ones."""
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._client is not None:
            self._client.close()
            self._client = None


class AsyncConnection:
    """A way to Redis for one event loop. Connects on first use.

    Its calls raise `IndexUnavailable`, which is also `IndexRefused` if only a person can help.

    Raises:
        ConfigError: the URL is not one of ours.
    """

    def __init__(self, config: IndexConfig) -> None:
        self._config = config
        self.url = parse_redis_url(config.redis_url)
        self._client: Any = None
        self._line: Line | None = None
        self._turns = asyncio.Semaphore(_MAX_CONNECTIONS)

    async def call(self, *command: str | bytes | int, **where: Any) -> Reply:  # noqa: ANN401
        """Return the answer to one command; `where` is for `masters`."""
        with reaching(self.url):
            return await self._call(*command, **where)

    async def run(self, script: Script, key: str, *args: str | bytes | int) -> Reply:
        """Return what `script` returns; all its keys share the hash tag of `key`."""
        evaluate = self._call if self.url.topology is Topology.CLUSTER else self._call_in_line
        with reaching(self.url):
            try:
                return await evaluate("EVALSHA", script.sha, 1, key, *args)
            except NoScriptError:
                return await evaluate("EVAL", script.source, 1, key, *args)

    async def _call(self, *command: str | bytes | int, **where: Any) -> Reply:  # noqa: ANN401
        async with self._turns:
            client = self._client = self._client or _client(_ASYNC, self.url, self._config)
            try:
                return await client.execute_command(*command, **where)
            except RedisClusterException:
                # No node that it knew answers: begin again with those of the URL.
                if self._client is client:
                    await self.close()
                raise
            except RedisError as error:
                if not is_demoted(error) or self.url.topology is Topology.CLUSTER:
                    raise
                # A new connection leads to the new master, by Sentinel or by name.
                await client.connection_pool.disconnect(inuse_connections=False)
                return await client.execute_command(*command, **where)

    async def _call_in_line(self, *command: str | bytes | int) -> Reply:
        """Do as `_call`, for less; not for commands whose answers redis-py reads, nor for a cluster."""
        self._client = self._client or _client(_ASYNC, self.url, self._config)
        line = self._line = self._line or _line(self._client.connection_pool, self._config)
        try:
            return await line.call(*command)
        except RedisError as error:
            if not is_demoted(error):
                raise
            return await line.call(*command)  # on a new connection, which leads to the new master

    async def masters(self) -> AsyncGenerator[Master]:
        """Yield every server that takes writes: one, unless it is a cluster."""
        await self.call("PING")  # by then it is known where they are
        if self.url.topology is Topology.SENTINEL:
            host, port = self._client.connection_pool.master_address
            yield Master(f"{host}:{port}", self.call)
            return
        if self.url.topology is Topology.SINGLE:
            yield Master(str(self.url), self.call)
            return
        for node in self._client.get_primaries():
            yield Master(node.name, functools.partial(self.call, target_nodes=node))

    async def close(self) -> None:
        """Release the connections; a later call makes new ones."""
        line, self._line = self._line, None
        client, self._client = self._client, None
        if line is not None:
            await line.close()
        if client is not None:
            await client.aclose()


class _Library(NamedTuple):
    """The classes of redis-py that make blocking or asynchronous calls: the same names, made alike."""

    client: Any
    cluster: Any
    node: Any
    sentinel: Any
    retry: Any


_BLOCKING = _Library(
    redis.Redis, redis.cluster.RedisCluster, redis.cluster.ClusterNode, redis.sentinel.Sentinel, Retry
)
_ASYNC = _Library(
    redis.asyncio.Redis,
    redis.asyncio.cluster.RedisCluster,
    redis.asyncio.cluster.ClusterNode,
    redis.asyncio.sentinel.Sentinel,
    AsyncRetry,
)


def _client(library: _Library, url: RedisUrl, config: IndexConfig) -> Any:  # noqa: ANN401 (one of eight classes)
    backoff = _backoff(config)
    retry = library.retry(backoff, _RETRIES, supported_errors=(RedisConnectionError,))
    common = {
        "socket_timeout": config.redis_timeout_s,
        "socket_connect_timeout": config.redis_timeout_s,
        # Of what RESP3 adds, nothing is used, and its HELLO asks for one more right.
        "protocol": 2,
        **({"ssl": True, **msgspec.structs.asdict(url.tls)} if url.tls else {}),
    }
    ours = {**common, **msgspec.structs.asdict(url.login), "retry": retry}
    if url.topology is Topology.CLUSTER:
        nodes = [library.node(host, port) for host, port in url.nodes]
        # Other people's slots may be uncovered.
        return library.cluster(startup_nodes=nodes, require_full_coverage=False, **ours)
    if url.topology is Topology.SENTINEL:
        # One dead Sentinel costs one try; the next in the list is asked then.
        theirs = {**common, **msgspec.structs.asdict(url.sentinel_login), "retry": library.retry(backoff, 0)}
        sentinel = library.sentinel(url.nodes, sentinel_kwargs=theirs)
        return sentinel.master_for(url.service, db=url.db, **ours)
    if url.socket_path:
        return library.client(unix_socket_path=url.socket_path, db=url.db, **ours)
    ((host, port),) = url.nodes
    return library.client(host=host, port=port, db=url.db, **ours)


def _blocking_line(pool: redis.ConnectionPool, config: IndexConfig) -> BlockingLine:
    return BlockingLine(pool, backoff=_backoff(config), num_retries=_RETRIES)


def _line(pool: redis.asyncio.ConnectionPool, config: IndexConfig) -> Line:
    return Line(
        pool,
        timeout_s=config.redis_timeout_s,
        backoff=_backoff(config),
        num_retries=_RETRIES,
        is_final=is_demoted,
    )


def _backoff(config: IndexConfig) -> ExponentialBackoff:
    return ExponentialBackoff(cap=config.redis_timeout_s / 10, base=0.001)
