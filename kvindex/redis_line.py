"""One connection to Redis for all calls of an event loop, or of a thread.

A client of redis-py takes a connection from its pool for every call, and the asynchronous one times every
read and write with a task or a context of its own: that is most of what a call costs. Redis answers the
calls of one connection in their order, so one connection is enough, and many calls at once cost fewer
system calls on both ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Any

import redis.connection
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.backoff import AbstractBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

Command = tuple[str | bytes | int, ...]


class BlockingLine:
    """Makes calls that may be repeated, from one thread; connects on first use.

    Args:
        pool: makes the connection, with whatever that needs, timeouts as well.
        backoff: how long to wait before each repetition of a call whose connection broke.
        num_retries: how often such a call is repeated; connecting has retries of its own.
    """

    def __init__(
        self, pool: redis.connection.ConnectionPool, *, backoff: AbstractBackoff, num_retries: int
    ) -> None:
        self._pool = pool
        self._backoff = backoff
        self._num_retries = num_retries
        self._connection: Any = None

    def call(self, *command: str | bytes | int) -> Any:  # noqa: ANN401 (a reply of Redis)
        """Return the answer to one command.

        Raises:
            RedisError: what redis-py raises for the same.
        """
        num_failures = 0
        while True:
            if self._connection is None:
                self._connection = self._pool.get_connection()
            try:
                self._connection.send_command(*command)
                return self._connection.read_response()
            except RedisTimeoutError:
                self.close()
                raise
            except RedisConnectionError:
                self.close()
                num_failures += 1
                if num_failures > self._num_retries:
                    raise
                time.sleep(self._backoff.compute(num_failures))

    def close(self) -> None:
        """Give the connection back to the pool; a later call makes a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()
            self._pool.release(connection)


class Line:
    """Makes calls that may be repeated, each in one round trip; connects on first use.

    Args:
        pool: makes the connection, with whatever that needs.
        timeout_s: longest wait for one answer.
        backoff: how long to wait before each repetition of a call whose connection broke.
        num_retries: how often such a call is repeated; connecting has retries of its own.
    """

    def __init__(
        self, pool: ConnectionPool, *, timeout_s: float, backoff: AbstractBackoff, num_retries: int
    ) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._backoff = backoff
        self._num_retries = num_retries
        self._opening: asyncio.Task[_Link] | None = None
        self._link: _Link | None = None

    async def call(self, *command: str | bytes | int) -> Any:  # noqa: ANN401 (a reply of Redis)
        """Return the answer to one command.

        A caller that is cancelled disturbs no other call.

        Raises:
            RedisError: what redis-py raises for the same.
        """
        num_failures = 0
        while True:
            link = await self._open()
            try:
                return await link.ask(command)
            except RedisConnectionError:
                num_failures += 1
                if num_failures > self._num_retries:
                    raise
                await asyncio.sleep(self._backoff.compute(num_failures))

    async def close(self) -> None:
        """Give the connection back to the pool; a later call makes a new one."""
        if self._link is not None:
            await self._link.close()
            self._link = None

    async def _open(self) -> _Link:
        if self._link is not None and self._link.is_open:
            return self._link
        # One attempt for all who wait, whoever of them goes away meanwhile.
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._connect())
            self._opening.add_done_callback(_retrieve)
        self._link = await asyncio.shield(self._opening)
        return self._link

    async def _connect(self) -> _Link:
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        return _Link(self._pool, connection, self._timeout_s)


def _retrieve(task: asyncio.Task[_Link]) -> None:
    """Take note of a failure that nobody is left to hear of."""
    if not task.cancelled():
        task.exception()


class _Link:
    """A connection in use, until it breaks."""

    def __init__(self, pool: ConnectionPool, connection: AbstractConnection, timeout_s: float) -> None:
        self._pool = pool
        self._connection = connection
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._awaited: deque[asyncio.Future[Any]] = deque()
        self._sending = asyncio.Lock()
        # Its own timeouts cost more than all the rest of a call; `ask` has one for both ways.
        self._former_timeout_s, connection.socket_timeout = connection.socket_timeout, None
        self.is_open = True
        self._reading = asyncio.create_task(self._read())

    async def ask(self, command: Command) -> Any:  # noqa: ANN401 (a reply of Redis)
        packed = self._connection.pack_command(*command)
        answer = self._loop.create_future()
        timer = self._loop.call_later(self._timeout_s, self._expire, answer)
        try:
            async with self._sending:
                if not self.is_open:
                    raise RedisConnectionError("the connection was closed")
                self._awaited.append(answer)
                await self._connection.send_packed_command(packed, check_health=False)
            return await answer
        finally:
            timer.cancel()

    async def close(self) -> None:
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading

    def _expire(self, answer: asyncio.Future[Any]) -> None:
        if not answer.done():
            answer.set_exception(RedisTimeoutError(f"no answer for {self._timeout_s:g} s"))
            self._reading.cancel()

    async def _read(self) -> None:
        """Hand out answers until the connection breaks; then the calls that wait hear of it."""
        broken: Exception = RedisConnectionError("the connection was closed")
        try:
            while True:
                await self._read_one()
        except RedisError as error:
            broken = error
        finally:
            self.is_open = False
            for answer in self._awaited:
                if not answer.done():
                    answer.set_exception(broken)
            self._connection.socket_timeout = self._former_timeout_s
            await self._connection.disconnect(nowait=True)
            await self._pool.release(self._connection)

    async def _read_one(self) -> None:
        refusal = reply = None
        try:
            reply = await self._connection.read_response()
        except ResponseError as error:
            refusal = error
        answer = self._awaited.popleft()
        if answer.done():
            return  # whoever asked has gone
        if refusal is None:
            answer.set_result(reply)
        else:
            answer.set_exception(refusal)
