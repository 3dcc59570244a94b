"""Many simulated engines in one process that leave and join all the time.

python -m tests.support.engine_crowd --redis-url redis://127.0.0.1:6379/0 --ports 8001,8002 --tokenizer DIR
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Sequence

from tests.support import engine_sim


async def come_and_go(engine: Sequence[str], draw: random.Random, mean_life_s: float) -> None:
    """Run an engine for a while, let it end its requests, stay away for a moment, and again."""
    while True:
        server = engine_sim.server(engine_sim.parse(engine), grace_s=30)
        serving = asyncio.create_task(server.serve())
        await asyncio.sleep(draw.uniform(0.5, 1.5) * mean_life_s)
        server.should_exit = True
        await serving
        await asyncio.sleep(draw.uniform(0.1, 0.3) * mean_life_s)


async def run(options: argparse.Namespace) -> None:
    draw = random.Random(4)
    engines = []
    for port in options.ports.split(","):
        engine = ["--port", port, "--redis-url", options.redis_url, "--tokenizer", options.tokenizer]
        engine += ["--events", f"inproc://{port}", "--lease-ms", "10000"]
        engines.append(come_and_go(engine, draw, options.mean_life_s))
    await asyncio.gather(*engines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--ports", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--mean-life-s", type=float, default=20)
    asyncio.run(run(parser.parse_args()))
