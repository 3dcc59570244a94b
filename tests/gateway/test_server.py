from __future__ import annotations

import gc

from gateway.server import _prepare


class Reader:
    """Loads something that stays."""

    async def prepare(self) -> None:
        self.loaded = [[number] for number in range(10_000)]


async def test_what_was_loaded_is_not_looked_at_by_garbage_collection():
    reader, before = Reader(), gc.get_freeze_count()
    try:
        await _prepare(reader)
        assert gc.get_freeze_count() > before + 10_000
        assert not any(each is reader.loaded for each in gc.get_objects())
    finally:
        gc.unfreeze()
