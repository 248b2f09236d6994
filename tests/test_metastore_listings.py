"""Listings of the embedded metastore are made of the one before and what changed since: they are what it holds."""

import asyncio
import itertools
import random
from pathlib import Path

import lmdb
import pytest

from blockstore.control.metastore import embedded
from blockstore.control.metastore.embedded import EmbeddedMetastore, open_embedded
from blockstore.control.metastore.interface import Change, KeyValue, Listing
from blockstore.errors import NoSpace
from blockstore.units import MIB

PREFIXES = ("", "a/", "b/", "a")


def check_all(store: EmbeddedMetastore, listings: dict[str, Listing], model: dict[str, KeyValue]) -> None:
    for prefix, listing in listings.items():
        assert list(listing.items) == [model[key] for key in sorted(model) if key.startswith(prefix)]


async def change(store: EmbeddedMetastore, model: dict[str, KeyValue], chance: random.Random) -> None:
    """A transaction of some puts and deletes, in the store and in the model."""
    keys = [f"{chance.choice('ab')}/{chance.randrange(20)}é"[: chance.choice((4, 9))] for _ in range(4)]
    puts = {key: chance.randbytes(3) for key in keys[:3]}
    gone = [key for key in keys[3:] if key not in puts]
    revision = await store.transact({}, puts, gone)
    assert revision is not None
    model.update({key: KeyValue(key, value, revision) for key, value in puts.items()})
    for key in gone:
        model.pop(key, None)


@pytest.mark.parametrize("history", [3, 10_000])
def test_a_listing_is_what_the_tables_hold_also_where_changes_are_held_no_more(
    tmp_path: Path, history: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        store, model, chance = open_embedded(tmp_path, MIB), dict[str, KeyValue](), random.Random(7)
        for _ in range(300):
            for _ in range(chance.randrange(5)):
                await change(store, model, chance)
            asked = chance.sample(PREFIXES, 2)
            check_all(store, {prefix: await store.list(prefix) for prefix in asked}, model)
        await store.close()
        again = open_embedded(tmp_path, MIB)
        check_all(again, {prefix: await again.list(prefix) for prefix in PREFIXES}, model)
        await again.close()

    monkeypatch.setattr(embedded, "HISTORY", history)
    asyncio.run(check())


def test_a_listing_beside_commits_is_never_older_than_what_was_read_before(tmp_path: Path) -> None:
    """The writer's thread commits while the loop reads and does not let it tell of it."""

    async def check() -> None:
        store = open_embedded(tmp_path, 16 * MIB)
        await store.transact({}, {f"k/{number}": b"" for number in range(100)})
        seen, seen_ahead = (await store.list("")).revision, 0
        for turn in itertools.count():  # some: one may be committed before the loop is run again
            values = [b"%d %d" % (turn, number) for number in range(50)]
            writing = [asyncio.ensure_future(store.transact({}, {"k/0": value})) for value in values]
            await asyncio.sleep(0)
            found = None
            while found is None or found.value != values[-1]:
                found = await store.get("k/0")
                listing = await store.list("k/")
                assert found is not None
                assert seen <= found.revision <= listing.items[0].revision <= listing.revision
                seen_ahead += listing.revision > seen
                seen = listing.revision
            await asyncio.gather(*writing)
            assert (await store.list("k/")).items[0] == await store.get("k/0")
            if seen_ahead > 20:
                break
        await store.close()

    asyncio.run(check())


def test_what_found_no_room_is_in_no_listing(tmp_path: Path) -> None:
    async def check() -> None:
        store = open_embedded(tmp_path, MIB // 4)
        kept: list[str] = []

        async def fill() -> None:
            while True:
                key = f"k/{len(kept):03}"
                await store.transact({}, {key: bytes(20_000)})
                kept.append(key)
                await store.list("k/")

        with pytest.raises(NoSpace):
            await fill()
        assert kept
        assert [each.key for each in (await store.list("k/")).items] == kept
        await store.transact({}, {}, kept[1:])
        assert [each.key for each in (await store.list("k/")).items] == kept[:1]
        await store.close()

    asyncio.run(check())


def test_a_listing_in_which_nothing_changed_is_the_one_before(tmp_path: Path) -> None:
    async def check() -> None:
        store = open_embedded(tmp_path, MIB)
        await store.transact({}, {"a/1": b"1", "b/1": b"1"})
        before = await store.list("a/")
        await store.transact({}, {"b/1": b"2"})
        after = await store.list("a/")
        assert after.items is before.items
        assert after.revision == before.revision + 1
        await store.close()

    asyncio.run(check())


def test_a_change_whose_commit_failed_never_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        store = open_embedded(tmp_path, MIB)
        await store.transact({}, {"k/1": b"old"})
        before = await store.list("k/")
        remember = store._history.add

        def fail(change: Change) -> None:
            remember(change)
            raise lmdb.DiskError("as a disk that is full says at the commit")

        with monkeypatch.context() as failing:
            failing.setattr(store._history, "add", fail)
            with pytest.raises(NoSpace):
                await store.transact({}, {"k/1": b"lost", "k/2": b"lost"})
        assert await store.list("k/") == before
        await store.transact({}, {"k/3": b"new"})
        assert [each.value for each in (await store.list("k/")).items] == [b"old", b"new"]
        await store.close()

    asyncio.run(check())
