"""The tenants' file, read again whenever it changes."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import structlog

from gateway.tenants import metrics
from gateway.tenants.roster import Roster, load_roster
from kvindex.errors import ConfigError

log = structlog.get_logger(__name__)

INTERVAL_S = 1.0


class RosterFile:
    """Holds the tenants of a file, for one event loop. A new file that is wrong is refused as a whole.

    Raises:
        ConfigError: the file is wrong at the start, when there is no old one to keep.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen = self._read()
        self._roster = load_roster(file)
        self._task: asyncio.Task[None] | None = None

    @property
    def roster(self) -> Roster:
        """The tenants as the last good file has them."""
        return self._roster

    def start(self, interval_s: float = INTERVAL_S) -> None:
        """Look at the file from now on."""
        self._task = asyncio.create_task(self._watch(interval_s))

    async def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def reload(self) -> None:
        """Read the file if it differs from what was read last, which is kept if the new one is wrong."""
        # Compared by content: a mounted secret is replaced by renaming, within one tick of a clock.
        content = self._read()
        if content == self._seen:
            return
        self._seen = content
        try:
            self._roster = load_roster(self._file)
        except ConfigError as error:
            log.error("new tenants refused, the old ones stay", reason=str(error))
            metrics.FILE_LOADS.labels("refused").inc()
        else:
            log.info("new tenants", num_tenants=len(self._roster.tenants))
            metrics.FILE_LOADS.labels("taken").inc()

    def _read(self) -> bytes | None:
        try:
            return self._file.read_bytes()
        except OSError:
            return None

    async def _watch(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            self.reload()
