"""Many slow streaming responses at once, through Envoy: what each costs the gateway while it is open."""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from pathlib import Path

import uvloop

from gateway.bench.load import CHAT_PATH
from gateway.bench.peers import RELEASE_PATH
from gateway.config import split_address

NUM_STREAMS = 2_000
OPENING_AT_ONCE = 64
ANSWER_TIMEOUT_S = 120.0

_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Held:
    """What became of the streams."""

    num_errors: int
    """Streams that did not begin with 200, or broke off."""
    kb_per_stream: float
    """Growth of the gateway's resident memory while all were open, by stream."""


def hold_open(address: str, engine: str, pid: int, body: bytes, *, num_streams: int) -> Held:
    """Open streams one after the other, keep all of them open at once, then let them end.

    Args:
        address: of Envoy.
        engine: the address of one engine, which ends them all.
        pid: the gateway.
        body: of each request, with `stream`.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held: Held = uvloop.run(_hold_open(address, engine, pid, body, num_streams))
    return held


async def _hold_open(address: str, engine: str, pid: int, body: bytes, num_streams: int) -> Held:
    before_kb = _resident_kb(pid)
    turn = asyncio.Semaphore(OPENING_AT_ONCE)
    opening = [_open(address, body, turn) for _ in range(num_streams)]
    streams = await asyncio.gather(*opening, return_exceptions=True)
    grown_kb = _resident_kb(pid) - before_kb
    await _release(engine)
    ends = await asyncio.gather(*(_ended(each) for each in streams))
    return Held(num_errors=ends.count(False), kb_per_stream=grown_kb / num_streams)


async def _open(address: str, body: bytes, turn: asyncio.Semaphore) -> _Stream:
    """Return the connection of a response of which the status and the first event have come."""
    async with turn, asyncio.timeout(ANSWER_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(*split_address(address))
        head = f"POST {CHAT_PATH} HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise ConnectionError(status.decode(errors="replace"))
        await reader.readuntil(b"data: ")
        return reader, writer


async def _ended(stream: _Stream | BaseException) -> bool:
    if isinstance(stream, BaseException):
        return False
    reader, writer = stream
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await reader.readuntil(b"[DONE]")
    except (OSError, EOFError, TimeoutError):
        return False
    finally:
        writer.close()
    return True


async def _release(engine: str) -> None:
    reader, writer = await asyncio.open_connection(*split_address(engine))
    writer.write(f"GET {RELEASE_PATH} HTTP/1.1\r\nhost: bench\r\n\r\n".encode())
    await reader.readline()
    writer.close()


def _resident_kb(pid: int) -> int:
    (line,) = (
        each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmRSS")
    )
    return int(line.split()[1])
