"""A simulated vLLM: its API, KV events, metrics and prefix cache, without a model.

    python -m tests.support.engine_sim --port 8001 --redis-url redis://127.0.0.1:6379/0

Prompts are rendered with the tiny model's template and tokenizer. Prefill takes the time that
`--prefill-tokens-per-s` says, one prompt after the other; decoding takes `--decode-ms` a token and is
not limited. With `--redis-url` the process publishes itself, as the connector does; without, it is for
`kvlane publish`.

Source: vLLM 0.32 `vllm/entrypoints/openai`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import jinja2.sandbox
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from tokenizers import Tokenizer

from kvindex.config import PublisherConfig
from kvindex.contents import EngineContents
from kvindex.event_source import ZmqEventSource
from kvindex.publisher import Publisher
from kvindex.redis_index import RedisIndexWriter
from kvindex.worker import Worker, new_incarnation
from tests.support import engine_flaws
from tests.support.engine_core import Engine, EventStream, Running


class Prompts:
    """Renders requests with the tiny model's own files."""

    def __init__(self, directory: Path, template: Path | None = None) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        template = template or directory / "chat_template.jinja"
        self._template = environment.from_string(template.read_text())

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def chat(self, body: dict[str, Any]) -> list[int]:
        return self.encode(
            self._template.render(
                messages=body["messages"], tools=body.get("tools"), add_generation_prompt=True
            )
        )

    def completions(self, body: dict[str, Any]) -> list[list[int]]:
        prompt = body.get("prompt", body.get("input"))
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        return [
            self.encode(each) if isinstance(each, str) else each for each in (prompt if several else [prompt])
        ]


class Guard:
    """Lets nobody in without the key, where vLLM does not either."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        is_guarded = scope["type"] == "http" and scope["path"].startswith(("/v1", "/inference"))
        if is_guarded and Headers(scope=scope).get("authorization") != f"Bearer {self._key}":
            app = JSONResponse({"error": "Unauthorized"}, status_code=401)
        await app(scope, receive, send)


@functools.cache
def _prompts(directory: Path, template: Path | None) -> Prompts:
    """Return what engines of one process share."""
    return Prompts(directory, template)


class Api:
    """The HTTP side."""

    def __init__(
        self,
        options: argparse.Namespace,
        engine: Engine,
        lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]],
    ) -> None:
        self.options = options
        self.engine = engine
        self.prompts = _prompts(options.tokenizer, options.chat_template)
        self.finished: list[dict[str, Any]] = []
        self.app = Starlette(
            lifespan=lifespan,
            middleware=[Middleware(Guard, key=options.api_key)] if options.api_key else [],
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/embeddings", self.embeddings, methods=["POST"]),
                *([] if options.no_tokenize else [Route("/tokenize", self.tokenize, methods=["POST"])]),
                Route("/v1/models", self.models),
                Route("/health", lambda _: Response()),
                Route("/metrics", lambda _: Response(engine.metrics.render(engine.load()))),
                Route("/reset_prefix_cache", self.reset, methods=["POST"]),
                Route("/sim/requests", lambda _: JSONResponse(self.finished)),
            ],
        )

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        return await self.generate(request, body, [self.prompts.chat(body)], "chat.completion")

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        return await self.generate(request, body, self.prompts.completions(body), "text_completion")

    async def embeddings(self, request: Request) -> Response:
        body = await request.json()
        return await self.generate(request, body | {"max_tokens": 0}, self.prompts.completions(body), "list")

    async def tokenize(self, request: Request) -> Response:
        body = await request.json()
        if body["model"] not in (self.options.model, *self.options.lora):
            return error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        tokens = self.prompts.chat(body) if "messages" in body else self.prompts.encode(body["prompt"])
        answer = {"count": len(tokens), "max_model_len": self.options.max_model_len, "tokens": tokens}
        return JSONResponse(answer | {"token_strs": None})

    async def generate(
        self, request: Request, body: dict[str, Any], prompts: Sequence[list[int]], kind: str
    ) -> Response:
        if self.options.answers is not None and len(self.finished) >= self.options.answers:
            await disconnected(request)
            return Response(status_code=499)
        if body["model"] not in (self.options.model, *self.options.lora):
            return error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        if max(map(len, prompts)) >= self.options.max_model_len:
            return error(400, "The prompt is longer than the context.", "BadRequestError")
        request_id = request.headers.get("x-request-id") or new_incarnation()
        running = [
            Running(
                f"{position}-{request_id}" if len(prompts) > 1 else request_id,
                list(prompt),
                lora_name=body["model"] if body["model"] in self.options.lora else None,
                cache_salt=body.get("cache_salt"),
            )
            for position, prompt in enumerate(prompts)
        ]
        max_tokens = body.get("max_completion_tokens") or body.get("max_tokens", 16)
        answer = Answer(self, kind, body, running, max_tokens)
        if body.get("stream"):
            return StreamingResponse(answer.stream(), media_type="text/event-stream")
        return JSONResponse(await answer.whole(request))

    async def models(self, _: Request) -> Response:
        base = {"id": self.options.model, "object": "model", "owned_by": "vllm", "parent": None}
        base |= {"root": str(self.options.tokenizer), "max_model_len": self.options.max_model_len}
        loras = [
            base | {"id": each, "root": f"/lora/{each}", "parent": self.options.model}
            for each in self.options.lora
        ]
        return JSONResponse({"object": "list", "data": [base, *loras]})

    async def reset(self, _: Request) -> Response:
        return JSONResponse({"success": self.engine.clear()})


class Answer:
    """One response: text made of the prompt's own last tokens, so that it is the same everywhere."""

    def __init__(
        self, api: Api, kind: str, body: dict[str, Any], running: list[Running], max_tokens: int
    ) -> None:
        self.api = api
        self.kind = kind
        self.running = running
        self.max_tokens = max_tokens
        self.head = {"id": f"sim-{running[0].request_id}", "object": kind, "model": body["model"]}
        # A field of OpenAI's own, which tells tests who answered.
        self.head["system_fingerprint"] = f"127.0.0.1:{api.options.port}"

    async def tokens(self, request: Running) -> AsyncIterator[int]:
        """Yield output tokens as they are made; the engine's books are right however this ends."""
        record = {"request_id": request.request_id, "model": self.head["model"], "end": "aborted"}
        try:
            async with self.api.engine.admitted(request):
                record |= {"prompt_tokens": len(request.tokens), "cached_tokens": request.num_cached_tokens}
                for position in range(self.max_tokens):
                    await asyncio.sleep(self.api.options.decode_ms / 1000)
                    request.tokens.append(100 + (request.tokens[-1] + position) % 1000)
                    yield request.tokens[-1]
            record["end"] = "complete"
        finally:
            self.api.finished.append(record)

    async def whole(self, http: Request) -> dict[str, Any]:
        """Return the whole answer; a client that goes away aborts it, as in vLLM."""

        async def collect(request: Running) -> list[int]:
            return [token async for token in self.tokens(request)]

        work = asyncio.gather(*map(collect, self.running))
        gone = asyncio.create_task(disconnected(http))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return {}
            texts = [self.api.prompts.tokenizer.decode(each) for each in work.result()]
        finally:
            gone.cancel()
            work.cancel()
        return self.head | {
            "choices": list(map(self.choice, range(len(texts)), texts)),
            "usage": self.usage(),
        }

    def choice(self, index: int, text: str) -> dict[str, Any]:
        if self.kind == "chat.completion":
            content = {"message": {"role": "assistant", "content": text}}
        else:
            content = {"text": text}
        return {"index": index, "finish_reason": "length", **content}

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(each.tokens) for each in self.running) - self.max_tokens * len(self.running)
        cached = sum(each.num_cached_tokens for each in self.running)
        usage = {"prompt_tokens": prompt, "completion_tokens": self.max_tokens * len(self.running)}
        return usage | {"prompt_tokens_details": {"cached_tokens": cached}}

    async def stream(self) -> AsyncIterator[bytes]:
        for index, request in enumerate(self.running):
            async with contextlib.aclosing(self.tokens(request)) as tokens:
                async for token in tokens:
                    text = self.api.prompts.tokenizer.decode([token])
                    key = {"delta": {"content": text}} if self.kind == "chat.completion" else {"text": text}
                    yield event(self.head | {"choices": [{"index": index, **key}]})
        yield event(self.head | {"choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"


def event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def error(status: int, message: str, kind: str) -> Response:
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(body, status_code=status)


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def server(options: argparse.Namespace, *, grace_s: int = 1) -> uvicorn.Server:
    """Return the server of an engine, which has `grace_s` to end its requests.

    Call on the event loop that will run it.
    """
    events = EventStream(options)
    engine = Engine(options, events)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        publisher = publish(options, engine) if options.redis_url else None
        yield
        if publisher is not None:
            publisher.stop()
        events.close()

    app = Api(options, engine, lifespan).app
    return uvicorn.Server(
        uvicorn.Config(app, port=options.port, log_level="warning", timeout_graceful_shutdown=grace_s)
    )


async def serve(options: argparse.Namespace) -> None:
    """Run until the process is told to stop."""
    await server(options).serve()


def publish(options: argparse.Namespace, engine: Engine) -> Publisher:
    config = PublisherConfig(
        redis_url=options.redis_url, lease_ms=options.lease_ms, heartbeat_ms=options.lease_ms // 5
    )
    worker = Worker(
        endpoint=f"127.0.0.1:{options.port}",
        model=options.model,
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        bytes_per_token=2048,
        max_model_len=options.max_model_len,
        incarnation=new_incarnation(),
        engine="simulated",
    )
    source = ZmqEventSource(options.events, options.replay)
    worker = engine_flaws.registered(options, worker)
    publisher = Publisher(
        worker, config, RedisIndexWriter(config), EngineContents(worker, source), engine.report
    )
    publisher.start()
    return publisher


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; None: those of this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--redis-url", default="")
    parser.add_argument("--tokenizer", type=Path, default=Path(".kvlane/tinymodel").absolute())
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--lora", action="append", default=[])
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=1024)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--prefill-tokens-per-s", type=float, default=20_000)
    parser.add_argument("--decode-ms", type=float, default=1)
    parser.add_argument("--lease-ms", type=int, default=1_000)
    parser.add_argument("--events", default="inproc://kv-events")
    parser.add_argument("--replay")
    parser.add_argument("--api-key", help="bearer token that requests need, as with `vllm serve`")
    engine_flaws.add_flags(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    asyncio.run(serve(parse()))
