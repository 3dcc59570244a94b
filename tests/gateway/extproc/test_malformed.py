"""What no proxy should send: the gateway ends the stream, keeps nothing, and serves the next."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

from gateway.config import GatewayConfig
from gateway.envoy_services import serve_envoy
from gateway.extproc.metrics import OPEN_STREAMS
from gateway.protos import ext_proc_pb2 as wire
from gateway.readiness import Readiness
from tests.support import extproc
from tests.support.envoy import KnownEndpoints, ScriptedRouter
from tests.support.waiting import eventually

NUM_STREAMS = 500

PARTS = [
    extproc.request_headers(),
    extproc.request_headers(mode=wire.FULL_DUPLEX_STREAMED, response_mode=wire.FULL_DUPLEX_STREAMED),
    extproc.request_headers(mode=wire.STREAMED),
    extproc.request_headers("GET", end_of_stream=True),
    extproc.request_body(b"{}", end_of_stream=False),
    extproc.request_body(b"{}"),
    extproc.request_trailers(),
    extproc.response_headers(),
    extproc.response_body(b"x", end_of_stream=False),
    extproc.response_body(b"", end_of_stream=True),
    wire.ProcessingRequest(),
]


def frames(draw: random.Random) -> list[bytes]:
    """Return real messages in any order, some of them cut, changed, or of noise."""
    made = []
    for _ in range(draw.randint(1, 6)):
        frame = bytearray(draw.choice(PARTS).SerializeToString())
        damage = draw.random()
        if damage < 0.15:
            frame = frame[: draw.randint(0, len(frame))]
        elif damage < 0.3:
            for _ in range(draw.randint(1, 4)):
                if frame:
                    frame[draw.randrange(len(frame))] = draw.randrange(256)
        elif damage < 0.4:
            frame = bytearray(draw.randbytes(draw.randint(0, 200)))
        made.append(bytes(frame))
    return made


@pytest.fixture
async def served():
    """A router behind a real gRPC server, and a channel to it."""
    router = ScriptedRouter(("10.0.0.1:8000",))
    readiness = Readiness()
    await readiness.open()
    config = GatewayConfig(listen="127.0.0.1:0", stop_grace_s=0)
    async with (
        serve_envoy(config, router, KnownEndpoints(), readiness) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield router, channel


async def send(channel: grpc.aio.Channel, sent: list[bytes]) -> grpc.StatusCode:
    """Send frames as they are; return how the stream ended."""
    call = channel.stream_stream(extproc.METHOD)()
    try:
        for frame in sent:
            await call.write(frame)
        await call.done_writing()
        async for answer in call:
            wire.ProcessingResponse.FromString(answer)
    except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
        pass
    return await call.code()


async def test_frames_that_make_no_sense_end_their_stream_alone(served):
    router, channel = served
    draw = random.Random(8)
    open_before = OPEN_STREAMS._value.get()
    codes = [await send(channel, frames(draw)) for _ in range(NUM_STREAMS)]
    assert grpc.StatusCode.OK in codes
    assert grpc.StatusCode.INVALID_ARGUMENT in codes
    await eventually(lambda: OPEN_STREAMS._value.get() == open_before)
    # Whatever was decided was settled, once.
    await eventually(lambda: len(router.finished) == len(router.requests))
    assert len({decision_id for decision_id, _ in router.finished}) == len(router.finished)
    good = [extproc.request_headers(), extproc.request_body(b"{}")]
    assert await send(channel, [each.SerializeToString() for each in good]) == grpc.StatusCode.OK
    assert router.requests[-1].body == b"{}"
