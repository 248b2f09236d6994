"""The embedded metastore: what is its own, and what it holds after crashes."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from blockstore.control.metastore.embedded import HISTORY, EmbeddedMetastore, open_embedded
from blockstore.control.metastore.interface import MAX_VALUE_SIZE, Change, Compacted, Metastore, Revision
from blockstore.errors import CairnError, Conflict, Corrupt, NoSpace
from blockstore.units import MIB

LIMIT_S = 60


def run(
    opener: Callable[[Path], EmbeddedMetastore], directory: Path, scenario: Callable[[Metastore], Awaitable[None]]
) -> None:
    async def all_of_it() -> None:
        store = opener(directory)
        try:
            await asyncio.wait_for(scenario(store), LIMIT_S)
        finally:
            await store.close()

    asyncio.run(all_of_it())


async def take(changes: AsyncIterator[Change], count: int) -> list[Change]:
    return [await anext(changes) for _ in range(count)]


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
