"""What the stores of one LMCache server hold, followed through its events and through listings.

A chunk is present while every rank of the engine has its object; of several KV cache groups the first is
followed. Objects that were told before the server started count: disks and buckets outlive it, memory
does not.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Iterable

from kvindex.blocks import BlockHash
from kvindex.chunks import ChunkKey
from kvindex.contents import Change
from kvindex.tiers.events import CacheEvents, EventType, Listed
from kvindex.tiers.server import Place, ServerDescription
from kvindex.worker import Tier

_FOLLOWED_GROUP = 0


class StoreContents:
    """`Contents` of one model's chunks in a store: told by the agent, polled by a publisher's thread."""

    def __init__(self) -> None:
        # Bitmap of the ranks whose object is missing; 0 is a whole chunk.
        self._missing: dict[BlockHash, int] = {}
        self._changes: queue.SimpleQueue[Change] = queue.SimpleQueue()
        self._present: set[BlockHash] = set()
        self._refreshed: set[BlockHash] = set()
        self._object_bytes = 0
        self._num_objects = 0

    @property
    def num_chunks(self) -> int:
        """Chunks told of, incomplete ones included."""
        return len(self._missing)

    @property
    def num_bytes(self) -> int:
        """Of all objects, as if all were as large as the largest; a model's full chunks are."""
        return self._num_objects * self._object_bytes

    def store(self, keys: Iterable[ChunkKey], object_bytes: int = 0) -> None:
        """Note that objects are there."""
        self._object_bytes = max(self._object_bytes, object_bytes)
        self._tell(stored=[key.block for key in keys if self._add(key)])

    def remove(self, keys: Iterable[ChunkKey]) -> None:
        """Note that objects are gone."""
        self._tell(removed=[key.block for key in keys if self._take(key)])

    def replace(self, keys: Collection[ChunkKey], object_bytes: int = 0) -> None:
        """Note that these objects are there, and no others."""
        before = self._whole()
        self._missing, self._num_objects = {}, 0
        self._object_bytes = max(self._object_bytes, object_bytes)
        for key in keys:
            self._add(key)
        after = self._whole()
        self._tell(stored=list(after - before), removed=list(before - after))

    def clear(self) -> None:
        """Note that nothing is there."""
        if self._missing:
            self._missing, self._num_objects = {}, 0
            self._changes.put(Change(is_cleared=True))

    def age(self) -> None:
        """Forget what has not been stored or found since the last call."""
        old = [block for block in self._missing if block not in self._refreshed]
        whole = [block for block in old if not self._missing[block]]
        for block in old:
            self._num_objects -= 1
            del self._missing[block]
        self._refreshed.clear()
        self._tell(removed=whole)

    def _whole(self) -> set[BlockHash]:
        return {block for block, missing in self._missing.items() if not missing}

    def _add(self, key: ChunkKey) -> bool:
        """Return whether the chunk became whole."""
        if key.group_idx != _FOLLOWED_GROUP:
            return False
        block, mine = key.block, 1 << key.rank
        self._refreshed.add(block)
        missing = self._missing.get(block, (1 << key.world_size) - 1)
        self._missing[block] = missing & ~mine
        self._num_objects += bool(missing & mine)
        return missing == mine

    def _take(self, key: ChunkKey) -> bool:
        """Return whether the chunk was whole until now."""
        block, mine = key.block, 1 << key.rank
        missing = self._missing.get(block)
        if key.group_idx != _FOLLOWED_GROUP or missing is None or missing & mine:
            return False
        self._num_objects -= 1
        self._missing[block] = missing | mine
        if self._missing[block] == (1 << key.world_size) - 1:
            del self._missing[block]
        return missing == 0

    def _tell(self, *, stored: list[BlockHash] | None = None, removed: list[BlockHash] | None = None) -> None:
        if stored or removed:
            self._changes.put(Change(stored or (), removed or ()))

    @property
    def hashes(self) -> Collection[BlockHash]:
        """See `Contents`."""
        return self._present

    def open(self) -> None:
        """See `Contents`."""

    def poll(self, timeout_s: float) -> list[Change]:
        """See `Contents`."""
        changes: list[Change] = []
        try:
            changes.append(self._changes.get(timeout=max(timeout_s, 0.001)))
            while True:
                changes.append(self._changes.get_nowait())
        except queue.Empty:
            pass
        for change in changes:
            if change.is_cleared:
                self._present.clear()
            self._present.update(change.stored)
            self._present.difference_update(change.removed)
        return changes

    def close(self) -> None:
        """See `Contents`."""


OpenStore = Callable[[Place, str, bool], StoreContents]
"""Makes the contents of a model's chunks in a place and begins to publish them; True: of a listing."""


class ServerHoldings:
    """Follows one LMCache server, from one thread.

    Args:
        description: the server.
        open_store: called once for each place and model, when the first object of the model is seen there.
    """

    def __init__(self, description: ServerDescription, open_store: OpenStore) -> None:
        self._description = description
        self._open_store = open_store
        self._contents: dict[tuple[Place, str, bool], StoreContents] = {}
        self._places = {place.backend: place for place in description.places}
        self._incarnation = -1
        self._sequence = 0
        self._listing: dict[Place, dict[ChunkKey, bool]] = {}
        self.num_gaps = 0
        """Breaks in the sequence of events, each of which had the first level forgotten."""
        self.capacity_bytes: dict[str, int] = {}
        """By name of the store; 0 where it has no limit."""

    @property
    def contents(self) -> dict[tuple[Place, str, bool], StoreContents]:
        """What is known, by place, model, and whether it is of a listing."""
        return self._contents

    def apply(self, events: CacheEvents) -> frozenset[Place]:
        """Follow one batch; return the places that have to be listed, because they are not known any more."""
        if events.incarnation < self._incarnation:
            return frozenset()
        doubtful: frozenset[Place] = frozenset()
        if events.incarnation > self._incarnation:
            self._incarnation, self._sequence = events.incarnation, 0
            self._clear(Tier.CPU)
        if events.sequence <= self._sequence:
            return frozenset()
        if events.sequence > self._sequence + 1:
            doubtful = self._lose()
        self._sequence = events.sequence
        place = self._place_of(events)
        match events.event_type:
            case EventType.CONFIG:
                self.capacity_bytes[place.name] = events.capacity_bytes
            case EventType.STORE:
                self._note(place, events, present=True)
            case EventType.ACCESS if events.level == "l2":
                self._note(place, events, present=True)
            case EventType.DELETE:
                self._note(place, events, present=False)
        return doubtful

    def begin_listing(self, place: Place) -> None:
        """Remember what is told of `place` from now on: it is newer than what a listing will say."""
        self._listing[place] = {}

    def end_listing(self, place: Place, listed: Iterable[Listed]) -> None:
        """Replace what is known of `place` by what was found there."""
        keys: dict[str, set[ChunkKey]] = {model: set() for _, model, _ in self._at(place, place.is_shared)}
        object_bytes: dict[str, int] = {}
        for each in listed:
            keys.setdefault(each.key.model, set()).add(each.key)
            object_bytes[each.key.model] = max(object_bytes.get(each.key.model, 0), each.num_bytes)
        for key, present in self._listing.pop(place, {}).items():
            # Of a shared place a deletion is told in the slot of the listing, and stores in our own.
            if not present:
                keys.setdefault(key.model, set()).discard(key)
            elif not place.is_shared:
                keys.setdefault(key.model, set()).add(key)
        for model, found in keys.items():
            self._of(place, model, place.is_shared).replace(found, object_bytes.get(model, 0))

    def give_up_listing(self, place: Place) -> None:
        """Note that a listing has failed: what is known stays, unless events were lost."""
        self._listing.pop(place, None)

    def forget(self, place: Place) -> None:
        """Drop what is known of a place from its events."""
        for at in self._at(place, is_listed=False):
            self._contents[at].clear()

    def age(self, place: Place) -> None:
        """Drop what events told of a shared place and a listing has had the time to see."""
        for at in self._at(place, is_listed=False):
            self._contents[at].age()

    def _at(self, place: Place, is_listed: bool) -> list[tuple[Place, str, bool]]:
        return [at for at in self._contents if at[0] == place and at[2] == is_listed]

    def _of(self, place: Place, model: str, is_listed: bool = False) -> StoreContents:
        at = (place, model, is_listed)
        if at not in self._contents:
            self._contents[at] = self._open_store(place, model, is_listed)
        return self._contents[at]

    def _place_of(self, events: CacheEvents) -> Place:
        if events.level == "l1":
            return self._description.memory
        place = self._places.get(events.backend)
        if place is None:  # added while the server runs
            name = f"{self._description.instance_id}/{events.backend}"
            place = Place(name=name, backend=events.backend, tier=Tier.DISK)
            self._places[events.backend] = place
        return place

    def _note(self, place: Place, events: CacheEvents, *, present: bool) -> None:
        if (since := self._listing.get(place)) is not None:
            since.update(dict.fromkeys(events.keys, present))
        for model in {key.model for key in events.keys}:
            keys = [key for key in events.keys if key.model == model]
            if present:
                self._of(place, model).store(keys, events.object_bytes)
            else:
                for is_listed in (False, True):
                    if (place, model, is_listed) in self._contents:
                        self._of(place, model, is_listed).remove(keys)

    def _lose(self) -> frozenset[Place]:
        """Events are missing: stores among them cost hits, deletions would promise what is not there."""
        self.num_gaps += 1
        self._clear(Tier.CPU)
        return frozenset(self._places.values())

    def _clear(self, tier: Tier) -> None:
        for (place, _, _), contents in self._contents.items():
            if place.tier is tier:
                contents.clear()
