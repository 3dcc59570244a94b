import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvindex.chunks import ChunkKey
from kvindex.tiers.events import CacheEvents, EventType, Listed, decode_events
from kvindex.tiers.holdings import ServerHoldings, StoreContents
from kvindex.tiers.server import Place, ServerDescription
from kvindex.worker import Tier
from tests.support.lmcache_recording import recorded_lines

CPU = Place(name="node/cpu", backend="dram", tier=Tier.CPU)
DISK = Place(name="node/fs", backend="fs", tier=Tier.DISK)
BUCKET = Place(name="s3://bucket", backend="s3", tier=Tier.OBJECT, is_shared=True)


def key(number: int, *, rank: int = 0, world_size: int = 1, model: str = "m", group_idx: int = 0) -> ChunkKey:
    return ChunkKey(
        chunk_hash=number.to_bytes(32, "big"),
        model=model,
        kv_rank=world_size << 24 | rank << 16 | world_size << 8 | rank,
        group_idx=group_idx,
        salt="",
    )


class Followed:
    """A server that tells what a test says, and what is published of it."""

    def __init__(self) -> None:
        self.published: dict[tuple[str, str, bool], StoreContents] = {}
        description = ServerDescription(instance_id="node", chunk_size=256, memory=CPU, places=(DISK, BUCKET))
        self.holdings = ServerHoldings(description, self.open)
        self.sequence = 0
        self.incarnation = 1

    def open(self, place: Place, model: str, is_listing: bool) -> StoreContents:
        assert (place.name, model, is_listing) not in self.published
        self.published[place.name, model, is_listing] = StoreContents()
        return self.published[place.name, model, is_listing]

    def tell(self, event_type: EventType, place: Place, *keys: ChunkKey, skip: int = 0) -> frozenset[Place]:
        self.sequence += 1 + skip
        return self.holdings.apply(
            CacheEvents(
                instance_id="node",
                incarnation=self.incarnation,
                sequence=self.sequence,
                event_type=event_type,
                level="l1" if place is CPU else "l2",
                backend=place.backend,
                keys=keys,
                object_bytes=8 if event_type is EventType.STORE else 0,
                capacity_bytes=0,
            )
        )

    def restart(self) -> None:
        self.incarnation, self.sequence = self.incarnation + 1, 0

    def hold(self, place: Place, *, listing: bool = False, model: str = "m") -> set[int]:
        """Return what is published of a place, by the number of the key."""
        contents = self.published.get((place.name, model, listing))
        if contents is None:
            return set()
        contents.poll(0)
        names = {key(number).block: number for number in range(100)}
        return {names[block] for block in contents.hashes}


@pytest.fixture
def followed() -> Followed:
    return Followed()


def test_the_recorded_servers_hold_what_was_done_with_them():
    """Stores, a clear, loads from the second level, a salted tenant, a deletion, kills and restarts."""
    servers: dict[str, Followed] = {}
    told: dict[str, dict[str, set[bytes]]] = {}
    for line in recorded_lines():
        if line.get("p") != "/events":
            continue
        for events in decode_events(json.dumps(line["b"]).encode()):
            followed = servers.setdefault(events.instance_id, Followed())
            assert not followed.holdings.apply(events)
            level = told.setdefault(events.instance_id, {}).setdefault(events.level, set())
            if events.event_type is EventType.CONFIG and events.level == "l1":
                level.clear()
            elif events.event_type is EventType.DELETE:
                level -= {each.block for each in events.keys}
            elif events.event_type is EventType.STORE or events.level == "l2":
                level |= {each.block for each in events.keys}
    assert servers.keys() == {"mp-fs", "mp-s3"}
    for name, place in (("mp-fs", DISK), ("mp-s3", BUCKET)):
        published = servers[name].published
        for each in published.values():
            each.poll(0)
        memory, second = published[CPU.name, "tinykv", False], published[place.name, "tinykv", False]
        assert set(memory.hashes) == told[name]["l1"] == set()
        assert set(second.hashes) == told[name]["l2"]
        assert servers[name].holdings.num_gaps == 0
    # Two prompts of 2 and 16 chunks, 2 chunks of a tenant; one deleted from the bucket.
    assert len(told["mp-fs"]["l2"]) == 20
    assert len(told["mp-s3"]["l2"]) == 19
    assert servers["mp-fs"].published[DISK.name, "tinykv", False].num_bytes == 20 * 8 << 20


def test_each_tier_follows_its_own_events(followed: Followed):
    followed.tell(EventType.STORE, CPU, key(1), key(2))
    followed.tell(EventType.STORE, DISK, key(1))
    followed.tell(EventType.DELETE, CPU, key(1))
    followed.tell(EventType.ACCESS, DISK, key(3))
    followed.tell(EventType.ACCESS, CPU, key(4))
    assert followed.hold(CPU) == {2}
    assert followed.hold(DISK) == {1, 3}


def test_models_are_kept_apart(followed: Followed):
    followed.tell(EventType.STORE, CPU, key(1), key(2, model="other"))
    assert followed.hold(CPU) == {1}
    assert len(followed.published[CPU.name, "other", False].poll(0)[0].stored) == 1


def test_a_restart_empties_memory_alone(followed: Followed):
    followed.tell(EventType.STORE, CPU, key(1))
    followed.tell(EventType.STORE, DISK, key(1))
    followed.restart()
    assert not followed.tell(EventType.CONFIG, CPU)
    assert followed.hold(CPU) == set()
    assert followed.hold(DISK) == {1}
    followed.tell(EventType.STORE, CPU, key(5))
    assert followed.hold(CPU) == {5}


def test_a_gap_empties_memory_and_asks_for_listings(followed: Followed):
    followed.tell(EventType.STORE, CPU, key(1))
    followed.tell(EventType.STORE, DISK, key(1))
    assert followed.tell(EventType.STORE, CPU, key(2), skip=1) == {DISK, BUCKET}
    assert followed.hold(CPU) == {2}
    assert followed.hold(DISK) == {1}
    followed.holdings.forget(DISK)
    assert followed.hold(DISK) == set()
    assert followed.holdings.num_gaps == 1


def test_what_was_told_before_or_by_a_former_life_changes_nothing(followed: Followed):
    followed.tell(EventType.STORE, CPU, key(1))
    followed.sequence -= 1
    followed.tell(EventType.DELETE, CPU, key(1))
    followed.incarnation -= 1
    followed.tell(EventType.DELETE, CPU, key(1), skip=5)
    assert followed.hold(CPU) == {1}


def test_a_chunk_is_there_with_the_objects_of_all_ranks(followed: Followed):
    halves = [key(1, rank=rank, world_size=2) for rank in (0, 1)]
    followed.tell(EventType.STORE, CPU, halves[0], halves[0])
    contents = followed.published[CPU.name, "m", False]
    contents.poll(0)
    assert not contents.hashes
    followed.tell(EventType.STORE, CPU, halves[1])
    contents.poll(0)
    assert set(contents.hashes) == {halves[0].block}
    assert contents.num_bytes == 16
    followed.tell(EventType.DELETE, CPU, halves[0])
    contents.poll(0)
    assert not contents.hashes
    assert contents.num_bytes == 8


def test_one_group_of_several_is_followed(followed: Followed):
    followed.tell(EventType.STORE, CPU, key(1, group_idx=1))
    assert followed.hold(CPU) == set()
    followed.tell(EventType.STORE, CPU, key(1))
    followed.tell(EventType.DELETE, CPU, key(1, group_idx=1))
    assert followed.hold(CPU) == {1}


def listed(numbers: Iterable[int]) -> list[Listed]:
    return [Listed(key(number), 4) for number in numbers]


def test_a_listing_replaces_what_was_known_before_it_began(followed: Followed):
    followed.tell(EventType.STORE, DISK, key(1), key(2))
    followed.holdings.begin_listing(DISK)
    followed.tell(EventType.STORE, DISK, key(3))
    followed.tell(EventType.DELETE, DISK, key(4))
    followed.holdings.end_listing(DISK, listed([2, 4, 5]))
    assert followed.hold(DISK) == {2, 3, 5}


def test_a_listing_that_failed_leaves_what_was_told(followed: Followed):
    followed.tell(EventType.STORE, DISK, key(1))
    followed.holdings.begin_listing(DISK)
    followed.tell(EventType.STORE, DISK, key(2))
    followed.holdings.give_up_listing(DISK)
    assert followed.hold(DISK) == {1, 2}


def test_a_shared_place_is_told_by_events_and_by_a_listing(followed: Followed):
    followed.tell(EventType.STORE, BUCKET, key(1))
    followed.holdings.begin_listing(BUCKET)
    followed.holdings.end_listing(BUCKET, listed([1, 2]))
    assert followed.hold(BUCKET) == {1}
    assert followed.hold(BUCKET, listing=True) == {1, 2}
    followed.tell(EventType.DELETE, BUCKET, key(1))
    assert followed.hold(BUCKET) == set()
    assert followed.hold(BUCKET, listing=True) == {2}


def test_what_events_tell_of_a_shared_place_is_forgotten_once_a_listing_has_seen_it(followed: Followed):
    followed.tell(EventType.STORE, BUCKET, key(1))
    followed.holdings.age(BUCKET)
    followed.tell(EventType.STORE, BUCKET, key(2))
    assert followed.hold(BUCKET) == {1, 2}
    followed.holdings.age(BUCKET)
    assert followed.hold(BUCKET) == {2}
    followed.holdings.age(BUCKET)
    assert followed.hold(BUCKET) == set()


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["store", "remove"]), st.lists(st.integers(0, 7), max_size=4)),
        st.tuples(st.just("replace"), st.lists(st.integers(0, 7), max_size=8)),
        st.tuples(st.just("clear"), st.just([])),
    )
)


@given(CHANGES, st.integers(1, 3), st.data())
def test_the_publisher_sees_what_the_agent_was_told(changes, world_size, data):
    contents = StoreContents()
    objects: set[ChunkKey] = set()
    for what, numbers in changes:
        keys = [
            key(number, rank=data.draw(st.integers(0, world_size - 1)), world_size=world_size)
            for number in numbers
        ]
        match what:
            case "store":
                contents.store(keys)
                objects |= set(keys)
            case "remove":
                contents.remove(keys)
                objects -= set(keys)
            case "replace":
                contents.replace(keys)
                objects = set(keys)
            case "clear":
                contents.clear()
                objects = set()
        if data.draw(st.booleans()):
            contents.poll(0)
    contents.poll(0)
    ranks = [each.block for each in objects]
    assert set(contents.hashes) == {block for block in ranks if ranks.count(block) == world_size}
