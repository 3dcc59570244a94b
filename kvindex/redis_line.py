"""One connection to Redis for all calls of an event loop, or of a thread.

A client of redis-py takes a connection from its pool for every call, and the asynchronous one times every
read and write with a task or a context of its own: that is most of what a call costs. Redis answers the
calls of one connection in their order, so one connection is enough, and many calls at once cost fewer
system calls on both ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import hiredis
import redis.connection
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.backoff import AbstractBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from kvindex.index import nothing

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
        (answer,) = self.call_each([command])
        if isinstance(answer, ResponseError):
            raise answer
        return answer

    def call_each(self, commands: Sequence[Command], meanwhile: Callable[[], None] = nothing) -> list[Any]:
        """Return the answer to each command, which may be a `ResponseError`.

        A command is sent before the answer to the one before has come, so that Redis need not wait for us,
        and no earlier, so that others need not wait for more than two of them. Before each answer is waited
        for, `meanwhile` is called.

        Raises:
            RedisError: what redis-py raises where there is no answer; the commands may have been carried
                out, and more than once.
        """
        num_failures = 0
        while True:
            if self._connection is None:
                self._connection = self._pool.get_connection()
            try:
                return self._exchange(commands, meanwhile)
            except RedisConnectionError:
                self.close()
                num_failures += 1
                if num_failures > self._num_retries:
                    raise
                time.sleep(self._backoff.compute(num_failures))
            except BaseException:  # answers may be under way that nobody waits for
                self.close()
                raise

    def _exchange(self, commands: Sequence[Command], meanwhile: Callable[[], None]) -> list[Any]:
        packed = [b"".join(self._connection.pack_command(*command)) for command in commands]
        self._connection.send_packed_command([b"".join(packed[:2])])
        answers = []
        for position in range(len(commands)):
            meanwhile()
            answers.append(self._read())
            if command := packed[position + 2 : position + 3]:
                self._connection.send_packed_command(command)
        return answers

    def _read(self) -> Any:  # noqa: ANN401 (a reply of Redis)
        try:
            return self._connection.read_response()
        except ResponseError as refusal:
            return refusal

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
        is_final: whether a refusal means that the connection is of no use for any other call.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        *,
        timeout_s: float,
        backoff: AbstractBackoff,
        num_retries: int,
        is_final: Callable[[RedisError], bool] = lambda _: False,
    ) -> None:
        self._pool = pool
        self._is_final = is_final
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
        return _Link(self._pool, connection, self._timeout_s, self._is_final)


def _retrieve(task: asyncio.Task[_Link]) -> None:
    """Take note of a failure that nobody is left to hear of."""
    if not task.cancelled():
        task.exception()


class _Link(asyncio.Protocol):
    """A connection in use, until it breaks.

    redis-py makes the connection and logs in. Then its transport speaks to this object: a stream's reader
    and redis-py's parser would wake a task for every answer, which costs more than to read it.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        connection: AbstractConnection,
        timeout_s: float,
        is_final: Callable[[RedisError], bool],
    ) -> None:
        self._pool = pool
        self._is_final = is_final
        self._connection = connection
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._awaited: deque[asyncio.Future[Any]] = deque()
        # redis-py has no public way to the transport of a connection, nor to what makes its errors.
        as_error = connection._parser.parse_error
        self._answers = hiredis.Reader(protocolError=RedisConnectionError, replyError=as_error)
        self._transport = cast("asyncio.StreamWriter", connection._writer).transport
        self._streams = self._transport.get_protocol()
        self._transport.set_protocol(self)
        self.is_open = True
        self._given_back: asyncio.Task[None] | None = None

    async def ask(self, command: Command) -> Any:  # noqa: ANN401 (a reply of Redis)
        if not self.is_open:
            raise RedisConnectionError("the connection was closed")
        answer = self._loop.create_future()
        self._awaited.append(answer)
        self._transport.write(b"".join(self._connection.pack_command(*command)))
        timer = self._loop.call_later(self._timeout_s, self._expire, answer)
        try:
            return await answer
        finally:
            timer.cancel()

    async def close(self) -> None:
        self._break(RedisConnectionError("the connection was closed"))
        if self._given_back is not None:
            await asyncio.shield(self._given_back)

    def data_received(self, data: bytes) -> None:
        """Hand out the answers that have come."""
        self._answers.feed(data)
        try:
            while self._awaited and (reply := self._answers.gets()) is not False:
                self._hand_out(reply)
        except RedisConnectionError as error:
            self._break(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the calls that wait, and the streams of redis-py, which waits for their end."""
        self._streams.connection_lost(exc)
        self._break(RedisConnectionError(f"the connection was closed: {exc or 'by Redis'}"))

    def _hand_out(self, reply: Any) -> None:  # noqa: ANN401 (a reply of Redis)
        answer = self._awaited.popleft()
        if not answer.done():  # or whoever asked has gone
            if isinstance(reply, RedisError):
                answer.set_exception(reply)
            else:
                answer.set_result(reply)
        if isinstance(reply, RedisError) and self._is_final(reply):
            self._break(RedisConnectionError(f"the connection was closed after: {reply}"))

    def _expire(self, answer: asyncio.Future[Any]) -> None:
        if not answer.done():
            answer.set_exception(RedisTimeoutError(f"no answer for {self._timeout_s:g} s"))
            self._break(RedisConnectionError("the connection was closed, for another call had no answer"))

    def _break(self, reason: RedisConnectionError) -> None:
        if not self.is_open:
            return
        self.is_open = False
        for answer in self._awaited:
            if not answer.done():
                answer.set_exception(reason)
        self._given_back = asyncio.create_task(self._give_back())

    async def _give_back(self) -> None:
        await self._connection.disconnect(nowait=True)
        await self._pool.release(self._connection)
