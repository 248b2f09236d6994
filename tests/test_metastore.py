"""What every metastore must do, run against each implementation; and the embedded one across crashes."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.control.metastore.embedded import HISTORY, open_embedded
from blockstore.control.metastore.interface import (
    ABSENT,
    MAX_KEY_SIZE,
    MAX_OPERATIONS,
    MAX_VALUE_SIZE,
    Change,
    Compacted,
    KeyValue,
    Metastore,
    Revision,
)
from blockstore.errors import CairnError, Conflict, Corrupt, InvalidRequest, NoSpace
from blockstore.units import MIB

Opener = Callable[[Path], Metastore]
IMPLEMENTATIONS: dict[str, Opener] = {"embedded": open_embedded}
LIMIT_S = 10


@pytest.fixture(params=IMPLEMENTATIONS)
def opener(request: pytest.FixtureRequest) -> Opener:
    return IMPLEMENTATIONS[request.param]


@asynccontextmanager
async def opened(opener: Opener, directory: Path) -> AsyncIterator[Metastore]:
    store = opener(directory)
    try:
        yield store
    finally:
        await store.close()


def run(opener: Opener, directory: Path, scenario: Callable[[Metastore], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        async with opened(opener, directory) as store:
            await asyncio.wait_for(scenario(store), LIMIT_S)

    asyncio.run(all_of_it())


# ---- conformance


def test_an_absent_key_is_none(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        assert await store.get("a") is None
        assert (await store.list("")).items == ()
        assert (await store.list("")).revision == 0

    run(opener, tmp_path, scenario)


def test_put_get_delete(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        first = await store.transact({}, {"a": b"1", "b": b""})
        assert first == 1
        assert await store.get("a") == KeyValue("a", b"1", Revision(1))
        assert await store.get("b") == KeyValue("b", b"", Revision(1))
        assert await store.transact({}, {"a": b"2"}) == 2
        assert await store.transact({}, {}, ["b"]) == 3
        assert await store.get("b") is None
        assert (await store.list("")).items == (KeyValue("a", b"2", Revision(2)),)
        assert (await store.list("")).revision == 3

    run(opener, tmp_path, scenario)


def test_conditions_are_all_or_nothing(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        await store.transact({}, {"a": b"1"})
        assert await store.transact({"a": Revision(1), "b": Revision(1)}, {"a": b"2", "c": b"3"}) is None
        assert await store.transact({"a": Revision(1), "c": ABSENT}, {"a": b"2", "c": b"3"}, ["a2"]) == 2
        assert await store.transact({"a": ABSENT}, {"d": b"4"}) is None
        assert [item.key for item in (await store.list("")).items] == ["a", "c"]
        assert (await store.list("")).revision == 2

    run(opener, tmp_path, scenario)


def test_a_key_made_anew_never_satisfies_an_old_condition(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        old = await store.transact({}, {"a": b"same"})
        await store.transact({}, {}, ["a"])
        await store.transact({}, {"a": b"same"})
        assert old is not None
        assert await store.transact({"a": old}, {"a": b"stolen"}) is None

    run(opener, tmp_path, scenario)


def test_a_transaction_that_changes_nothing_keeps_the_revision(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        assert await store.transact({}, {"a": b"1"}) == 1
        assert await store.transact({"a": Revision(1)}) == 1
        assert await store.transact({}, {}, ["absent"]) == 1
        assert await store.transact({"a": Revision(7)}) is None

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
    ],
    ids=["empty key", "long key", "long value", "put and delete", "too many"],
)
def test_what_breaks_a_limit_is_refused(
    opener: Opener, tmp_path: Path, puts: dict[str, bytes], deletes: list[str]
) -> None:
    async def scenario(store: Metastore) -> None:
        with pytest.raises(InvalidRequest):
            await store.transact({}, puts, deletes)
        assert (await store.list("")).revision == 0

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


def test_a_watch_sees_past_and_coming_changes_of_its_prefix(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        await store.transact({}, {"w/a": b"1"})
        await store.transact({}, {"w/b": b"2", "x": b"-", "w/c": b"3"})
        watching = asyncio.create_task(take(store.watch("w/", Revision(1)), 3))
        await store.transact({}, {"x": b"-"})
        await store.transact({}, {"w/d": b"4"})
        await store.transact({}, {}, ["w/a"])
        assert await watching == [
            Change(Revision(2), {"w/b": b"2", "w/c": b"3"}),
            Change(Revision(4), {"w/d": b"4"}),
            Change(Revision(5), {"w/a": None}),
        ]

    run(opener, tmp_path, scenario)


def test_a_cancelled_writer_leaves_no_gap_in_a_watch(opener: Opener, tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        writers = [asyncio.create_task(store.transact({}, {f"w/{i}": b""})) for i in range(30)]
        await asyncio.sleep(0)
        for writer in writers[::2]:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        await store.transact({}, {"w/end": b""})
        seen: dict[str, bytes | None] = {}
        async for change in store.watch("w/", Revision(0)):
            seen.update(change.values)
            if "w/end" in change.values:
                break
        assert seen.keys() == {item.key for item in (await store.list("w/")).items}

    run(opener, tmp_path, scenario)


def test_a_watch_across_a_restart_sees_all_or_is_told(opener: Opener, tmp_path: Path) -> None:
    async def before(store: Metastore) -> None:
        await store.transact({}, {"a": b"1"})
        await store.transact({}, {"a": b"2"})

    async def after(store: Metastore) -> None:
        try:
            assert (await take(store.watch("", Revision(1)), 1))[0].values == {"a": b"2"}
        except Compacted:
            watching = asyncio.create_task(take(store.watch("", (await store.list("")).revision), 1))
            await store.transact({}, {"a": b"3"})
            assert await watching == [Change(Revision(3), {"a": b"3"})]

    run(opener, tmp_path, before)
    run(opener, tmp_path, after)


def test_everything_is_there_after_a_restart(opener: Opener, tmp_path: Path) -> None:
    async def before(store: Metastore) -> None:
        await store.transact({}, {"a": b"1", "b": b"2"})
        await store.transact({}, {}, ["a"])

    async def after(store: Metastore) -> None:
        assert await store.list("") == (await store.list("b"))
        assert await store.get("b") == KeyValue("b", b"2", Revision(1))
        assert await store.transact({"a": ABSENT}, {"a": b"3"}) == 3

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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(st.lists(TRANSACTIONS, max_size=12))
def test_it_is_a_dict_with_revisions(
    implementation: str, transactions: list[tuple[dict[str, int], dict[str, bytes], set[str]]]
) -> None:
    model = Model()

    async def scenario(store: Metastore) -> None:
        for conditions, puts, given_deletes in transactions:
            deletes = given_deletes - puts.keys()
            numbered = {key: Revision(revision) for key, revision in conditions.items()}
            assert await store.transact(numbered, puts, deletes) == model.transact(conditions, puts, deletes)
            listing = await store.list("")
            assert {i.key: (i.value, i.revision) for i in listing.items} == model.items
            assert listing.revision == model.revision

    with tempfile.TemporaryDirectory() as directory:
        run(IMPLEMENTATIONS[implementation], Path(directory), scenario)


# ---- the embedded one


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        with pytest.raises(Conflict, match="another control process"):
            open_embedded(tmp_path)

    run(open_embedded, tmp_path, scenario)
    run(open_embedded, tmp_path, lambda store: store.transact({}, {"a": b""}))  # type: ignore[arg-type, return-value]


async def fill(store: Metastore) -> None:
    for i in range(1000):
        await store.transact({}, {f"k{i}": b"v" * MAX_VALUE_SIZE})


def test_a_full_store_says_so_keeps_what_it_has_and_goes_on(tmp_path: Path) -> None:
    async def scenario(store: Metastore) -> None:
        await store.transact({}, {"first": b"kept"})
        with pytest.raises(NoSpace, match="free disk space"):
            await fill(store)
        keys = [item.key for item in (await store.list("k")).items]
        assert len(keys) > 1
        assert (await store.list("")).revision == len(keys) + 1
        await store.transact({}, {}, keys)
        await store.transact({}, {"first": b"kept"})  # LMDB uses pages again from the second commit on
        assert await store.transact({}, {"k": b"v" * MAX_VALUE_SIZE})
        kept = await store.get("first")
        assert kept is not None
        assert kept.value == b"kept"

    run(lambda directory: open_embedded(directory, map_size_bytes=4 * MIB), tmp_path, scenario)


def test_changes_that_fell_out_of_memory_are_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HISTORY > 100
    monkeypatch.setattr("blockstore.control.metastore.embedded.HISTORY", 3)

    async def scenario(store: Metastore) -> None:
        for i in range(5):
            await store.transact({}, {"a": str(i).encode()})
        with pytest.raises(Compacted):
            await take(store.watch("", Revision(1)), 1)
        assert [c.revision for c in await take(store.watch("", Revision(2)), 3)] == [3, 4, 5]

    run(open_embedded, tmp_path, scenario)


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(open_embedded, tmp_path, lambda store: store.transact({}, {"a": b""}))  # type: ignore[arg-type, return-value]
    monkeypatch.setattr("blockstore.control.metastore.embedded._FORMAT", b"2")
    with pytest.raises(Corrupt, match="format"):
        run(open_embedded, tmp_path, lambda store: store.list(""))  # type: ignore[arg-type, return-value]


def test_a_file_that_is_no_metastore_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"not LMDB" * 4096)
    with pytest.raises(CairnError, match="cannot open the metastore"):
        run(open_embedded, tmp_path, lambda store: store.list(""))  # type: ignore[arg-type, return-value]


_WRITER = """
import asyncio, sys
from pathlib import Path
from blockstore.control.metastore.embedded import open_embedded

async def main():
    store = open_embedded(Path(sys.argv[1]))
    i = int((await store.get("n")).value) if await store.get("n") else 0
    while True:
        i += 1
        await store.transact({}, {"n": str(i).encode(), f"twin/{i}": b"x" * 100})
        print(i, flush=True)

asyncio.run(main())
"""


def test_what_was_answered_survives_sigkill(tmp_path: Path) -> None:
    answered = 0
    for round_number in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        assert process.stdout is not None
        for line in process.stdout:
            answered = int(line)
            if answered >= (round_number + 1) * 50:
                break
        process.send_signal(signal.SIGKILL)
        answered = max([answered, *(int(line) for line in process.stdout if line.endswith("\n"))])
        process.wait(LIMIT_S)
        process.stdout.close()

        async def check(store: Metastore, least: int = answered) -> None:
            now = await store.get("n")
            assert now is not None
            assert int(now.value) in (least, least + 1)
            assert len((await store.list("twin/")).items) == int(now.value)
            assert (await store.list("")).revision == int(now.value)

        run(open_embedded, tmp_path, check)
