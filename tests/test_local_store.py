"""What is special about objects in a directory: when they are durable, and what a crash or a lost disk leaves."""

import asyncio
import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockstore.errors import CairnError, Corrupt, InvalidRequest, NoSpace, NotFound, QuorumUnavailable
from snapshotd.local_store import LocalStore

WRITER = """
import asyncio, hashlib, itertools, os, sys
from pathlib import Path
from snapshotd.local_store import LocalStore

async def main():
    store = LocalStore(Path(sys.argv[1]))
    for number in itertools.count():
        content = os.urandom(200_000)
        await store.put(f"packs/{number % 8:02x}/" + hashlib.sha256(content).hexdigest(), content)
        print(number, flush=True)

asyncio.run(main())
"""


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the system from here on: the call, and the file."""
    seen: list[tuple[str, str]] = []

    def watched(name: str) -> None:
        call = getattr(os, name)

        def wrapper(*arguments: Any) -> Any:
            first = arguments[-1]
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            seen.append((name, path))
            return call(*arguments)

        monkeypatch.setattr(os, name, wrapper)

    for name in ("fsync", "link", "replace"):
        watched(name)
    return seen


@pytest.mark.parametrize("if_absent", [False, True])
def test_an_object_is_synced_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, calls: list[tuple[str, str]], if_absent: bool
) -> None:
    async def main() -> None:
        store = LocalStore(tmp_path / "deep" / "store")
        calls.clear()
        await store.put("packs/ab/x", b"content", if_absent=if_absent)
        await store.close()

    asyncio.run(main())
    root = str(tmp_path / "deep" / "store")
    first, *folders, named, last = calls
    assert first[0] == "fsync"
    assert first[1].startswith(root + "/.incoming/")
    assert folders == [("fsync", root), ("fsync", root + "/packs")]
    assert named == ("link" if if_absent else "replace", root + "/packs/ab/x")
    assert last == ("fsync", root + "/packs/ab")


def test_folders_are_synced_once_and_by_every_process(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    """Also those that are there: whoever made them may have crashed before it synced them."""

    async def main() -> None:
        for _ in range(2):
            store = LocalStore(tmp_path)
            for key in ("a/b/x", "a/b/y"):
                calls.clear()
                await store.put(key, b"")
                synced = [path for name, path in calls if name == "fsync"][1:]
                above = [str(tmp_path), f"{tmp_path}/a"] if key == "a/b/x" else []
                assert synced == [*above, f"{tmp_path}/a/b"]
            await store.close()

    asyncio.run(main())


def test_what_is_told_to_be_there_is_durable_too(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    async def main() -> None:
        store = LocalStore(tmp_path)
        await store.put("a/x", b"1")
        calls.clear()
        assert await store.put("a/x", b"1", if_absent=True) is False
        assert calls[-1] == ("fsync", f"{tmp_path}/a")
        await store.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EROFS, InvalidRequest),
        (errno.EACCES, InvalidRequest),
        (errno.EIO, Corrupt),
        (errno.ESTALE, QuorumUnavailable),
    ],
)
def test_what_the_system_says_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[CairnError]
) -> None:
    """And nothing is left of what failed."""

    def failing(_: int) -> None:
        raise OSError(number, os.strerror(number))

    async def main() -> None:
        store = LocalStore(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            with pytest.raises(kind, match=f"cannot write a/x in file://{tmp_path}: {os.strerror(number)}"):
                await store.put("a/x", b"content")
        assert files_below(tmp_path) == []
        assert await store.put("a/x", b"content", if_absent=True) is True
        await store.close()

    asyncio.run(main())


def test_a_killed_writer_leaves_whole_objects_only(tmp_path: Path) -> None:
    root = tmp_path / "store"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, root], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    try:
        for line in writer.stdout:
            if int(line) == 50:
                break
    finally:
        writer.kill()
        writer.wait(20)

    async def main() -> None:
        store = LocalStore(root)
        assert os.listdir(root / ".incoming") == []
        found = [info async for info in store.list("packs")]
        assert len(found) >= 51
        for info in found:
            content = await store.get(info.key)
            assert len(content) == info.size == 200_000
            assert info.key.endswith(hashlib.sha256(content).hexdigest())
        await store.close()

    asyncio.run(main())


def test_left_over_files_go_and_those_of_live_writers_stay(tmp_path: Path) -> None:
    asyncio.run(LocalStore(tmp_path).close())
    live, dead = tmp_path / ".incoming" / "live", tmp_path / ".incoming" / "dead"
    dead.write_bytes(b"half")
    with open(live, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        asyncio.run(LocalStore(tmp_path).close())
        assert os.listdir(tmp_path / ".incoming") == ["live"]
    asyncio.run(LocalStore(tmp_path).close())
    assert os.listdir(tmp_path / ".incoming") == []


def test_a_disk_that_is_not_mounted_is_no_empty_store(tmp_path: Path) -> None:
    root = tmp_path / "store"

    async def main() -> None:
        store = LocalStore(root)
        await store.put("packs/ab/x", b"1")
        root.rename(tmp_path / "elsewhere")
        root.mkdir()
        for call in (store.get("packs/ab/x"), store.put("packs/ab/y", b""), store.delete("packs/ab/x")):
            with pytest.raises(QuorumUnavailable, match="is its disk mounted"):
                await call
        with pytest.raises(QuorumUnavailable, match="is its disk mounted"):
            _ = [info async for info in store.list()]
        root.rmdir()
        (tmp_path / "elsewhere").rename(root)
        assert await store.get("packs/ab/x") == b"1"
        await store.close()

    asyncio.run(main())


def test_a_folder_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    async def main() -> None:
        store = LocalStore(tmp_path)
        await store.put("a/b/x", b"1")
        for folder, content in (("a/b", b"2"), ("a", b"3")):
            shutil.rmtree(tmp_path / folder)
            with pytest.raises(QuorumUnavailable, match="somebody removed"):
                await store.put("a/c/x" if folder == "a" else "a/b/x", content)
            assert await store.put("a/b/x", content) is True
        await store.close()

    asyncio.run(main())


def test_what_is_too_large_to_be_ours_is_not_read(tmp_path: Path) -> None:
    async def main() -> None:
        store = LocalStore(tmp_path)
        (tmp_path / "x").write_bytes(b"")
        os.truncate(tmp_path / "x", 300 << 20)
        with pytest.raises(Corrupt, match=r"x in file://.* has 314572800 bytes"):
            await store.get("x")
        assert await store.get_range("x", 299 << 20, 5) == bytes(5)
        await store.close()

    asyncio.run(main())


def test_what_others_put_there_is_left_alone(tmp_path: Path) -> None:
    """Files that begin with a dot, such as those of the system, are no objects."""

    async def main() -> None:
        store = LocalStore(tmp_path)
        (tmp_path / ".nfs0001").write_bytes(b"")
        assert [info async for info in store.list()] == []
        with pytest.raises(InvalidRequest):
            await store.get(".nfs0001")
        with pytest.raises(NotFound):
            await store.get("x")
        await store.close()

    asyncio.run(main())


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"")
    with pytest.raises(CairnError, match=f"file://{tmp_path}/store"):
        LocalStore(tmp_path / "store")
