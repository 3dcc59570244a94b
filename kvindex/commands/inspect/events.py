"""`kvlane inspect events`: what the index remembers of slots and evictions, as it happens if asked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from kvindex.blocks import Pool, format_hash
from kvindex.commands.inspect.options import DEFAULT_REDIS, AsJson, RedisUrl, index_reader, live_fleet
from kvindex.commands.inspect.tables import local_time
from kvindex.history import EventKind, PoolEvent, Removal
from kvindex.index import IndexReader

POLL_S = 0.5
LINES_PER_CALL = 500
MOST_NAMED = 4

EVICTED = "evicted"


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a slot, or a batch of evictions."""

    at_ms: int
    model: str
    kind: str
    worker: str
    """Empty where it is not known any more."""
    slot: int
    incarnation: str
    detail: str = ""
    blocks: tuple[str, ...] = ()
    """Hashes of the evicted blocks."""


@dataclass
class _Tail:
    """One pool's two logs, and how far they have been read."""

    pool: Pool
    names: dict[str, str] = field(default_factory=dict)
    """Incarnation to worker id."""
    last_event: str | None = None
    last_removal: str | None = None

    async def read(self, reader: IndexReader, *, max_lines: int, evictions: bool) -> list[Line]:
        events = await reader.events(self.pool, after=self.last_event, max_events=max_lines)
        removals = []
        if evictions:
            removals = await reader.removals(self.pool, after=self.last_removal, max_events=max_lines)
        self.last_event = events[-1].event_id if events else self.last_event or "0"
        self.last_removal = removals[-1].event_id if removals else self.last_removal or "0"
        self.names |= {each.incarnation: each.worker_id for each in events if each.worker_id}
        return [*map(self._event, events), *map(self._removal, removals)]

    def _event(self, event: PoolEvent) -> Line:
        return Line(
            at_ms=event.at_ms,
            model=self.pool.model,
            kind=event.kind,
            worker=event.worker_id,
            slot=event.slot,
            incarnation=event.incarnation,
            detail=event.detail,
        )

    def _removal(self, removal: Removal) -> Line:
        return Line(
            at_ms=removal.at_ms,
            model=self.pool.model,
            kind=EVICTED,
            worker=self.names.get(removal.incarnation, ""),
            slot=removal.slot,
            incarnation=removal.incarnation,
            blocks=tuple(map(format_hash, removal.blocks)),
        )


def events(
    count: Annotated[int, typer.Option("--lines", "-n", min=1, max=1_000, help="Lines to begin with.")] = 20,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what happens, until Ctrl-C.")
    ] = False,
    evictions: Annotated[bool, typer.Option(help="Show evicted blocks, too.")] = True,
    redis_url: RedisUrl = DEFAULT_REDIS,
    as_json: AsJson = False,
) -> None:
    """Show what happened to slots lately: opened, fenced, cleared, drift and so on, and evictions.

    Each pool remembers its latest events and evictions within a fixed bound of memory. With --json, one
    object a line.
    """
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_tail(redis_url, count, follow=follow, evictions=evictions, as_json=as_json))


async def _tail(redis_url: str, count: int, *, follow: bool, evictions: bool, as_json: bool) -> None:
    tails: dict[Pool, _Tail] = {}
    async with index_reader(redis_url) as reader:
        lines = await _read(reader, tails, count, evictions=evictions)
        _print(lines[-count:], as_json=as_json)
        if not lines and not as_json:
            Console().print("Nothing is on record: no pool has workers or entries.")
        while follow:
            await asyncio.sleep(POLL_S)
            _print(await _read(reader, tails, LINES_PER_CALL, evictions=evictions), as_json=as_json)


async def _read(
    reader: IndexReader, tails: dict[Pool, _Tail], max_lines: int, *, evictions: bool
) -> list[Line]:
    lines: list[Line] = []
    for pool, workers in await live_fleet(reader):
        tail = tails.setdefault(pool, _Tail(pool))
        tail.names |= {each.worker.incarnation: each.worker.worker_id for each in workers}
        lines += await tail.read(reader, max_lines=max_lines, evictions=evictions)
    for pool in await reader.chunk_pools():
        tail = tails.setdefault(pool, _Tail(pool))
        _, stores = await reader.stores(pool)
        tail.names |= {each.store.incarnation: each.store.holder_id for each in stores}
        lines += await tail.read(reader, max_lines=max_lines, evictions=evictions)
    return sorted(lines, key=lambda line: line.at_ms)


def _print(lines: Iterable[Line], *, as_json: bool) -> None:
    if as_json:
        for line in lines:
            typer.echo(msgspec.json.encode(line).decode())
        return
    console = Console(soft_wrap=True)
    for line in lines:
        console.print(Text.assemble(*_view(line)))


_STYLES = {
    EventKind.OPENED: "green",
    EventKind.DRIFT: "bold red",
    EventKind.RESYNC: "yellow",
    EventKind.CLEARED: "yellow",
    EventKind.FENCED: "red",
    EVICTED: "dim",
}


def _view(line: Line) -> Iterator[tuple[str, str]]:
    yield f"{local_time(line.at_ms / 1000)}  ", ""
    yield f"{line.kind:8}", _STYLES.get(line.kind, "")
    yield f" {line.worker or '-'} slot {line.slot}", ""
    if line.blocks:
        more = ", ..." if len(line.blocks) > MOST_NAMED else ""
        yield f"  {len(line.blocks)} blocks: {', '.join(line.blocks[:MOST_NAMED])}{more}", ""
    elif line.detail:
        yield f"  {line.detail}", ""
