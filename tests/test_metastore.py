"""What every metastore must do, run against each implementation."""

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstore.control.metastore.interface import (
    ABSENT,
    MAX_KEY_SIZE,
    MAX_OPERATIONS,
    MAX_TRANSACTION_SIZE,
    MAX_VALUE_SIZE,
    Change,
    Compacted,
    KeyValue,
    Metastore,
    Revision,
)
from blockstore.errors import InvalidRequest
from tests.etcd_server import EtcdServer
from tests.metastores import IMPLEMENTATIONS, Opener, etcd_for_stores

LIMIT_S = 60


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with etcd_for_stores(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(params=IMPLEMENTATIONS)
def opener(request: pytest.FixtureRequest) -> Opener:
    if request.param == "etcd":
        request.getfixturevalue("etcd")
    return IMPLEMENTATIONS[request.param]


def run(opener: Opener, directory: Path, scenario: Callable[[Metastore], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        async with opener(directory) as store:
            await asyncio.wait_for(scenario(store), LIMIT_S)

    asyncio.run(all_of_it())


async def revision_of(store: Metastore) -> Revision:
    """As it is now: one that shares an etcd does not begin at 0."""
    return (await store.list("")).revision


async def changed(store: Metastore, puts: dict[str, bytes], deletes: tuple[str, ...] = ()) -> Revision:
    """The revision of a transaction without conditions."""
    revision = await store.transact({}, puts, deletes)
    assert revision is not None
    return revision


# ---- conformance


def test_an_absent_key_is_none(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        assert await store.get("a") is None
        assert (await store.list("")).items == ()

    run(opener, tmp_path, scenario)


def test_put_get_delete(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        empty = await revision_of(store)
        first = await changed(store, {"a": b"1", "b": b""})
        assert first > empty
        assert await store.get("a") == KeyValue("a", b"1", first)
        assert await store.get("b") == KeyValue("b", b"", first)
        second = await changed(store, {"a": b"2"})
        third = await changed(store, {}, ("b",))
        assert third > second > first
        assert await store.get("b") is None
        assert (await store.list("")).items == (KeyValue("a", b"2", second),)
        assert await revision_of(store) == third

    run(opener, tmp_path, scenario)


def test_conditions_are_all_or_nothing(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        first = await changed(store, {"a": b"1"})
        assert await store.transact({"a": first, "b": first}, {"a": b"2", "c": b"3"}) is None
        second = await store.transact({"a": first, "c": ABSENT}, {"a": b"2", "c": b"3"}, ["a2"])
        assert second is not None
        assert await store.transact({"a": ABSENT}, {"d": b"4"}) is None
        assert (await store.list("")).items == (KeyValue("a", b"2", second), KeyValue("c", b"3", second))
        assert await revision_of(store) == second

    run(opener, tmp_path, scenario)


def test_a_key_made_anew_never_satisfies_an_old_condition(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        old = await store.transact({}, {"a": b"same"})
        await store.transact({}, {}, ["a"])
        await store.transact({}, {"a": b"same"})
        assert old is not None
        assert await store.transact({"a": old}, {"a": b"stolen"}) is None

    run(opener, tmp_path, scenario)


def test_a_transaction_that_changes_nothing_keeps_what_there_is(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        first = await changed(store, {"a": b"1"})
        before = await store.list("")
        assert await store.transact({"a": first}) == first
        assert await store.transact({"a": Revision(first + 7)}) is None
        assert await store.transact({"a": Revision(first + 7)}, {}, ["a"]) is None
        await changed(store, {}, ("absent",))
        assert (await store.list("")).items is before.items
        last = await changed(store, {"b": b"2"})
        assert await take(store.watch("", first), 1) == [Change(last, {"b": b"2"})]

    run(opener, tmp_path, scenario)


def test_lists_have_the_prefix_and_the_order_of_bytes(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        await store.transact({}, dict.fromkeys(("b/2", "a", "b/10", "b", "c", "b/é", "bb"), b""))
        assert [item.key for item in (await store.list("b/")).items] == ["b/10", "b/2", "b/é"]
        assert [item.key for item in (await store.list("d")).items] == []
        assert len((await store.list("")).items) == 7

    run(opener, tmp_path, scenario)


@pytest.mark.parametrize(
    ("puts", "deletes"),
    [
        ({"": b""}, []),
        ({"k" * (MAX_KEY_SIZE + 1): b""}, []),
        ({"k": b"v" * (MAX_VALUE_SIZE + 1)}, []),
        ({"k": b""}, ["k"]),
        ({str(i): b"" for i in range(MAX_OPERATIONS + 1)}, []),
        ({str(i): b"v" * MAX_VALUE_SIZE for i in range(MAX_TRANSACTION_SIZE // MAX_VALUE_SIZE + 1)}, []),
    ],
    ids=["empty key", "long key", "long value", "put and delete", "too many", "too large"],
)
def test_what_breaks_a_limit_is_refused(
    opener: Opener, tmp_path: Path, puts: dict[str, bytes], deletes: list[str]
) -> None:
    async def scenario(store: Metastore) -> None:
        before = await store.list("")
        with pytest.raises(InvalidRequest):
            await store.transact({}, puts, deletes)
        assert await store.list("") == before

    run(opener, tmp_path, scenario)


def test_of_racing_swaps_exactly_one_wins(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        revision = await store.transact({}, {"a": b"0"})
        assert revision is not None
        for _ in range(20):
            swaps = [store.transact({"a": revision}, {"a": str(i).encode()}) for i in range(8)]
            won = [(i, r) for i, r in enumerate(await asyncio.gather(*swaps)) if r is not None]
            assert len(won) == 1
            winner, revision = won[0]
            assert await store.get("a") == KeyValue("a", str(winner).encode(), revision)

    run(opener, tmp_path, scenario)


def test_no_increment_is_lost(opener: Opener, tmp_path: Path) -> None:
    async def increment(store: Metastore) -> None:
        while True:
            now = await store.get("n")
            value, revision = (int(now.value), now.revision) if now else (0, ABSENT)
            if await store.transact({"n": revision}, {"n": str(value + 1).encode()}):
                return

    async def scenario(store: Metastore) -> None:
        await asyncio.gather(*(increment(store) for _ in range(40)))
        now = await store.get("n")
        assert now is not None
        assert now.value == b"40"

    run(opener, tmp_path, scenario)


async def take(changes: AsyncIterator[Change], count: int) -> list[Change]:
    taken: list[Change] = []
    async for change in changes:
        taken.append(change)
        if len(taken) == count:
            break
    return taken


def test_what_just_keeps_the_limits_is_taken(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        absent = {f"c{i}": ABSENT for i in range(MAX_OPERATIONS)}
        await store.transact(absent, {f"p{i}": b"" for i in range(MAX_OPERATIONS)})
        largest = {"k" * (MAX_KEY_SIZE - 1) + str(i): bytes(MAX_VALUE_SIZE) for i in range(4)}
        assert sum(map(len, largest.values())) == MAX_TRANSACTION_SIZE
        await changed(store, largest)
        assert len((await store.list("k")).items) == 4
        assert len((await store.list("p")).items) == MAX_OPERATIONS

    run(opener, tmp_path, scenario)


def test_who_follows_the_steps_of_listings_has_what_is_listed(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        chance, listing = random.Random(3), await store.list("k/")
        followed, steps = {each.key: each for each in listing.items}, 0
        for _ in range(60):
            for _ in range(chance.randrange(3)):
                await changed(store, {f"k/{chance.randrange(9)}": chance.randbytes(2), "j": b""})
                await changed(store, {}, (f"k/{chance.randrange(9)}",))
            before, listing = listing.items, await store.list("k/")
            if listing.items is not before and listing.step and listing.step.before is before:
                steps += 1
                followed |= {key: now for key, now in listing.step.changed.items() if now}
                for key in [key for key, now in listing.step.changed.items() if now is None]:
                    followed.pop(key, None)
            elif listing.items is not before:
                followed = {each.key: each for each in listing.items}
            assert followed == {each.key: each for each in listing.items}
        assert steps > 10

    run(opener, tmp_path, scenario)


def test_a_listing_shows_what_was_changed_before_it_was_asked_for(opener: Opener, tmp_path: Path) -> None:
    """Also by another user of the same store, and also where something went rather than came."""

    async def scenario(store: Metastore) -> None:
        for i in range(20):
            await changed(store, {f"k/{i}": b"", "k/x": b""})
            assert len((await store.list("k/")).items) == i + 2
            await changed(store, {}, ("k/x",))
            assert len((await store.list("k/")).items) == i + 1

    run(opener, tmp_path, scenario)


def test_a_block_of_reads_shows_what_stood_at_its_beginning_and_what_is_changed_here(
    opener: Opener, tmp_path: Path
) -> None:
    async def scenario(store: Metastore) -> None:
        for i in range(20):
            before = await changed(store, {f"k/{i}": b"", "k/x": b""})
            with store.as_of_now():
                assert len((await store.list("k/")).items) == i + 2
                assert await store.get("k/x") == KeyValue("k/x", b"", before)
                await changed(store, {}, ("k/x",))
                assert await store.get("k/x") is None
                assert len((await store.list("k/")).items) == i + 1
                assert await store.transact({"k/x": before}, {"k/x": b"late"}) is None

    run(opener, tmp_path, scenario)


def test_a_watch_sees_past_and_coming_changes_of_its_prefix(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        base = await changed(store, {"w/a": b"1"})
        second = await changed(store, {"w/b": b"2", "x": b"-", "w/c": b"3"})
        watching = asyncio.create_task(take(store.watch("w/", base), 3))
        await changed(store, {"x": b"-"})
        fourth = await changed(store, {"w/d": b"4"})
        fifth = await changed(store, {}, ("w/a",))
        assert await watching == [
            Change(second, {"w/b": b"2", "w/c": b"3"}),
            Change(fourth, {"w/d": b"4"}),
            Change(fifth, {"w/a": None}),
        ]

    run(opener, tmp_path, scenario)


def test_a_cancelled_writer_leaves_no_gap_in_a_watch(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        base = await revision_of(store)
        writers = [asyncio.create_task(store.transact({}, {f"w/{i}": b""})) for i in range(30)]
        await asyncio.sleep(0)
        for writer in writers[::2]:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        await store.transact({}, {"w/end": b""})
        seen: dict[str, bytes | None] = {}
        async for change in store.watch("w/", base):
            seen.update(change.values)
            if "w/end" in change.values:
                break
        assert seen.keys() == {item.key for item in (await store.list("w/")).items}

    run(opener, tmp_path, scenario)


def test_a_watch_across_a_restart_sees_all_or_is_told(opener: Opener, tmp_path: Path) -> None:
    made: list[Revision] = []

    async def before(store: Metastore) -> None:
        made.append(await changed(store, {"a": b"1"}))
        await changed(store, {"a": b"2"})

    async def after(store: Metastore) -> None:
        try:
            assert (await take(store.watch("", made[0]), 1))[0].values == {"a": b"2"}
        except Compacted:
            watching = asyncio.create_task(take(store.watch("", await revision_of(store)), 1))
            last = await changed(store, {"a": b"3"})
            assert await watching == [Change(last, {"a": b"3"})]

    run(opener, tmp_path, before)
    run(opener, tmp_path, after)


def test_everything_is_there_after_a_restart(opener: Opener, tmp_path: Path) -> None:
    made: list[Revision] = []

    async def before(store: Metastore) -> None:
        made.append(await changed(store, {"a": b"1", "b": b"2"}))
        made.append(await changed(store, {}, ("a",)))

    async def after(store: Metastore) -> None:
        assert await store.list("") == (await store.list("b"))
        assert await store.get("b") == KeyValue("b", b"2", made[0])
        last = await store.transact({"a": ABSENT}, {"a": b"3"})
        assert last is not None
        assert last > made[1]

    run(opener, tmp_path, before)
    run(opener, tmp_path, after)


KEYS = st.sampled_from(["a", "a/1", "a/2", "b", "é"])
TRANSACTIONS = st.tuples(
    st.dictionaries(KEYS, st.integers(0, 6), max_size=2),
    st.dictionaries(KEYS, st.binary(max_size=8), max_size=3),
    st.sets(KEYS, max_size=2),
)


class Model:
    """The dumb metastore: a dict, and a list of its past."""

    def __init__(self) -> None:
        self.revision = 0
        self.items: dict[str, tuple[bytes, int]] = {}

    def transact(self, conditions: dict[str, int], puts: dict[str, bytes], deletes: set[str]) -> int | None:
        if any(self.items.get(key, (b"", 0))[1] != revision for key, revision in conditions.items()):
            return None
        deletes = deletes & self.items.keys()
        if puts or deletes:
            self.revision += 1
            self.items.update({key: (value, self.revision) for key, value in puts.items()})
            for key in deletes:
                del self.items[key]
        return self.revision


def check_against_model(opener: Opener, transactions: list[tuple[dict[str, int], dict[str, bytes], set[str]]]) -> None:
    """Revisions of the model are turned into those that the store gave."""
    model = Model()
    given_by: dict[int, Revision] = {0: ABSENT}

    async def scenario(store: Metastore) -> None:
        never = Revision(await revision_of(store) + 1_000_000)
        for conditions, puts, given_deletes in transactions:
            deletes = given_deletes - puts.keys()
            numbered = {key: given_by.get(revision, never) for key, revision in conditions.items()}
            expected, before = model.transact(conditions, puts, deletes), await revision_of(store)
            revision = await store.transact(numbered, puts, deletes)
            assert (revision is None) == (expected is None)
            if revision is not None and expected is not None:
                given_by.setdefault(expected, revision)
                assert revision >= before
            listing = await store.list("")
            assert {i.key: (i.value, i.revision) for i in listing.items} == {
                key: (value, given_by[at]) for key, (value, at) in model.items.items()
            }

    with tempfile.TemporaryDirectory() as directory:
        run(opener, Path(directory), scenario)


@settings(max_examples=40)
@given(st.lists(TRANSACTIONS, max_size=12))
def test_the_embedded_one_is_a_dict_with_revisions(
    transactions: list[tuple[dict[str, int], dict[str, bytes], set[str]]],
) -> None:
    check_against_model(IMPLEMENTATIONS["embedded"], transactions)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.lists(TRANSACTIONS, max_size=12))
def test_etcd_is_a_dict_with_revisions(
    etcd: EtcdServer, transactions: list[tuple[dict[str, int], dict[str, bytes], set[str]]]
) -> None:
    check_against_model(IMPLEMENTATIONS["etcd"], transactions)
