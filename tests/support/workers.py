"""Workers of a made-up fleet."""

from __future__ import annotations

from kvindex.worker import Worker


def make_worker(endpoint: str = "10.0.0.1:8000", **fields: object) -> Worker:
    """Return a worker of the model `tiny` with blocks of 16 tokens."""
    known = {
        "endpoint": endpoint,
        "model": "tiny",
        "block_size": 16,
        "num_blocks": 1000,
        "bytes_per_token": 1024,
        "max_model_len": 4096,
        "incarnation": f"life-of-{endpoint}",
    }
    return Worker(**(known | fields))
