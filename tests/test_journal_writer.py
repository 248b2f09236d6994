"""What waits for the journal shares a group, order holds, a failure is told once; in the loop as in the thread."""

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blockstore.node import journal_writer
from blockstore.node.journal_writer import JournalWriter
from blockstore.storage.journal import Journal, JournalEntry, JournalFailed
from blockstore.units import BLOCK_SIZE
from tests.journal_cases import FILE_BYTES, CachedDisk, ReplicaLog, replica

A, B = replica(1), replica(2)
LIMIT_S = 60
MODES = pytest.mark.parametrize("quick", [False, True], ids=["thread", "loop"])


class GatedDisk(CachedDisk):
    """Syncs wait while the gate is closed; allocations and syncs fail as told; each group's sync is counted."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()
        self.syncs = 0
        self.no_room = False
        self.broken = False
        self.synced_by: list[int] = []
        self.allocated_by: list[int] = []

    def sync(self, fd: int) -> None:
        self.synced_by.append(threading.get_ident())
        self.reached.set()
        assert self.gate.wait(LIMIT_S)
        self.syncs += 1
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def allocate(self, fd: int, size_bytes: int) -> None:
        self.allocated_by.append(threading.get_ident())
        if self.no_room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().allocate(fd, size_bytes)


class Scene:
    """A journal with its writer in a running loop, and what it said."""

    def __init__(self, directory: Path, max_files: int = 8, *, quick: bool = False) -> None:
        """quick: the disk counts as quick, however long it takes; else as slow."""
        self.disk = GatedDisk()
        self.journal, _ = Journal.open(
            directory, max_bytes=max_files * FILE_BYTES, marks={A: 0, B: 0}, file_bytes=FILE_BYTES, disk=self.disk
        )
        self.failures: list[BaseException] = []
        self.full = 0
        self.durable: list[tuple[str, int]] = []
        self._said = asyncio.Event()
        self.writer = JournalWriter(
            self.journal,
            asyncio.get_running_loop(),
            on_failure=self._on_failure,
            on_full=self._on_full,
            quick_s=LIMIT_S if quick else 0,
        )
        self.writer.start()

    def submit(self, name: str, entries: list[JournalEntry]) -> None:
        self.writer.submit(entries, lambda last: self._on_durable(name, last))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Whatever the writer says is followed by another look at the condition."""
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                self._said.clear()
                await self._said.wait()

    async def until_full(self, log: ReplicaLog) -> int:
        """Submit one by one; returns how many were submitted when there was no room."""
        count = 0
        while not self.full:
            count += 1
            self.submit("one", [log.write(blocks=1)])
            await self.until(lambda wanted=count: len(self.durable) == wanted or self.full > 0)  # type: ignore[misc]
        return count

    async def close(self) -> None:
        await self.writer.close()
        self.journal.close()

    def _on_full(self) -> None:
        self.full += 1
        self._said.set()

    def _on_failure(self, failure: BaseException) -> None:
        self.failures.append(failure)
        self._said.set()

    def _on_durable(self, name: str, last: int) -> None:
        self.durable.append((name, last))
        self._said.set()


def test_what_waits_goes_out_as_one_group_in_order(tmp_path: Path) -> None:
    async def run() -> None:
        scene, logs = Scene(tmp_path), [ReplicaLog(A), ReplicaLog(B)]
        before = scene.disk.syncs
        scene.disk.gate.clear()
        scene.disk.reached.clear()
        scene.submit("first", [logs[0].write()])
        assert await asyncio.to_thread(scene.disk.reached.wait, LIMIT_S)
        for i in range(6):
            scene.submit(f"later {i}", [logs[i % 2].write()])
        assert scene.durable == []
        scene.disk.gate.set()
        await scene.until(lambda: len(scene.durable) == 7)
        assert scene.durable == [("first", 1), *((f"later {i}", 7) for i in range(6))]
        assert scene.disk.syncs == before + 2
        await scene.close()

    asyncio.run(run())


@MODES
def test_what_is_queued_is_written_before_it_ends(tmp_path: Path, quick: bool) -> None:
    async def run() -> None:
        scene, log = Scene(tmp_path, quick=quick), ReplicaLog(A)
        for _ in range(5):
            scene.submit("queued", [log.write()])
        await scene.writer.close()
        assert scene.journal.last == 5
        await scene.close()

    asyncio.run(run())


@MODES
def test_a_failed_sync_is_told_once_and_nothing_follows(tmp_path: Path, quick: bool) -> None:
    async def run() -> None:
        scene, log = Scene(tmp_path, quick=quick), ReplicaLog(A)
        scene.disk.broken = True
        scene.submit("lost", [log.write()])
        await scene.until(lambda: bool(scene.failures))
        syncs = scene.disk.syncs
        scene.submit("after", [log.write()])
        await scene.writer.close()
        await asyncio.sleep(0)
        assert [type(failure) for failure in scene.failures] == [JournalFailed]
        assert (scene.durable, scene.disk.syncs) == ([], syncs)
        await scene.close()

    asyncio.run(run())


@MODES
def test_a_full_journal_waits_for_a_release(tmp_path: Path, quick: bool) -> None:
    async def run() -> None:
        scene, log = Scene(tmp_path, max_files=2, quick=quick), ReplicaLog(A)
        count = await scene.until_full(log)
        assert len(scene.durable) == count - 1
        assert scene.journal.laggards() == (A,)
        assert scene.journal.release(A, scene.journal.last)
        scene.writer.room_made()
        await scene.until(lambda: len(scene.durable) == count)
        await scene.close()

    asyncio.run(run())


@MODES
def test_a_full_disk_is_looked_at_again(tmp_path: Path, quick: bool) -> None:
    """Nobody tells that a disk has room again, and no checkpoint frees the one file there is."""

    async def run() -> None:
        scene, log = Scene(tmp_path, quick=quick), ReplicaLog(A)
        scene.disk.no_room = True
        count = await scene.until_full(log)
        assert scene.journal.laggards() == ()
        scene.disk.no_room = False
        await scene.until(lambda: len(scene.durable) == count)
        await scene.close()

    assert journal_writer._LOOK_AGAIN_S < LIMIT_S
    asyncio.run(run())


def test_small_groups_of_a_quick_disk_are_written_in_the_loop(tmp_path: Path) -> None:
    async def run() -> None:
        scene, logs = Scene(tmp_path, quick=True), [ReplicaLog(A), ReplicaLog(B)]
        before = scene.disk.syncs
        for i in range(6):
            scene.submit(f"{i}", [logs[i % 2].write()])
        assert scene.durable == [], "told before submit returned"
        await scene.until(lambda: len(scene.durable) == 6)
        assert scene.durable == [(f"{i}", 6) for i in range(6)]
        assert scene.disk.syncs == before + 1
        assert scene.disk.synced_by[-1] == threading.get_ident()
        await scene.close()

    asyncio.run(run())


def test_what_is_large_goes_to_the_thread_and_what_is_small_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_writer, "_SMALL_BYTES", 3 * BLOCK_SIZE)

    async def run() -> None:
        scene, log = Scene(tmp_path, quick=True), ReplicaLog(A)
        scene.disk.gate.clear()
        scene.disk.reached.clear()
        scene.submit("large", [log.write(blocks=4)])
        assert await asyncio.to_thread(scene.disk.reached.wait, LIMIT_S)
        scene.submit("small", [log.write(blocks=1)])
        await asyncio.sleep(0)  # to write it here now would wait for the gate, and fail
        await asyncio.sleep(0)
        assert scene.durable == []
        scene.disk.gate.set()
        await scene.until(lambda: len(scene.durable) == 2)
        assert scene.durable == [("large", 1), ("small", 2)]
        assert scene.disk.synced_by[-2] != scene.disk.synced_by[-1] == threading.get_ident()
        await scene.close()

    asyncio.run(run())


def test_no_file_is_made_in_the_loop(tmp_path: Path) -> None:
    async def run() -> None:
        scene, log = Scene(tmp_path, quick=True), ReplicaLog(A)
        begun = len(scene.disk.allocated_by)
        while len(scene.disk.allocated_by) == begun:
            wanted = len(scene.durable) + 1
            scene.submit("one", [log.write(blocks=1)])
            await scene.until(lambda wanted=wanted: len(scene.durable) == wanted)  # type: ignore[misc]
        assert threading.get_ident() not in scene.disk.allocated_by[begun:]
        await scene.close()

    asyncio.run(run())


@MODES
def test_nothing_is_written_once_it_was_closed(tmp_path: Path, quick: bool) -> None:
    async def run() -> None:
        scene, log = Scene(tmp_path, quick=quick), ReplicaLog(A)
        await scene.close()
        scene.submit("late", [log.write()])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (scene.durable, scene.failures) == ([], [])

    asyncio.run(run())
