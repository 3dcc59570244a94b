"""An engine of which nothing is real but what it says: a worker, its events, and their hashes."""

import queue
from collections.abc import Sequence

from kvindex.blocks import hash_blocks, root_hash
from kvindex.errors import EventsLost
from kvindex.events import BlockRemoved, BlockStored, EngineEvent
from kvindex.worker import Worker, new_incarnation


def make_worker(endpoint: str = "127.0.0.1:8000") -> Worker:
    return Worker(
        endpoint=endpoint,
        model="tiny",
        block_size=2,
        num_blocks=1000,
        bytes_per_token=1024,
        max_model_len=4096,
        incarnation=new_incarnation(),
    )


class ScriptedSource:
    """Events that a test puts, in the order it puts them."""

    def __init__(self) -> None:
        self._items: queue.Queue[EngineEvent | EventsLost] = queue.Queue()
        self.is_open = False

    def put(self, *items: EngineEvent | EventsLost) -> None:
        for item in items:
            self._items.put(item)

    @property
    def is_drained(self) -> bool:
        return self._items.empty()

    def open(self) -> None:
        self.is_open = True

    def poll(self, timeout_s: float) -> list[EngineEvent]:
        try:
            item = self._items.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            return []
        if isinstance(item, EventsLost):
            raise item
        return [item]

    def close(self) -> None:
        self.is_open = False


def prompt(*tokens: int) -> tuple[BlockStored, list[int]]:
    """Return the event of one prompt's blocks, and their hashes."""
    hashes = hash_blocks(root_hash("tiny"), tokens, 2)
    event = BlockStored(
        block_hashes=[block ^ 1 for block in hashes],
        parent_block_hash=None,
        token_ids=list(tokens),
        block_size=2,
        medium="GPU",
        group_idx=0,
    )
    return event, list(hashes)


def removal(blocks: Sequence[int]) -> BlockRemoved:
    return BlockRemoved(block_hashes=[block ^ 1 for block in blocks], medium="GPU", group_idx=0)
