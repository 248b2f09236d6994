"""The journal's files: made ahead, released, reused, and told to be full before anything is written."""

import errno
import resource
from pathlib import Path

import pytest

from blockstore.log import LogEntry, RecordEntry
from blockstore.storage.journal import Journal, JournalEntry, JournalFailed, JournalFull
from blockstore.storage.journal_format import PAGE
from blockstore.units import MIB
from tests.journal_cases import FILE_BYTES, LOTS, FailingDisk, ReplicaLog, reopen, replica, sequence

A, B = replica(1), replica(2)

# ---- within its limit


def test_files_are_released_oldest_first_and_reused(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0, B: 0}, max_bytes=4 * FILE_BYTES)
    log, idle = ReplicaLog(A), ReplicaLog(B)
    journal.append([idle.write()])
    for _ in range(200):
        try:
            last = journal.append([log.write(blocks=1)])
        except JournalFull:
            assert set(journal.laggards()) == {A, B}
            assert journal.release(A, last) is False
            assert journal.laggards() == (B,)
            assert journal.release(B, last) is True
            last = journal.append([JournalEntry(A, RecordEntry(log.records[-1]), log.end), idle.write()])
    assert journal.size_bytes == 4 * FILE_BYTES
    assert len(list(tmp_path.iterdir())) == 4
    assert journal.last >= 200
    journal.close()


def test_full_means_that_nothing_was_written(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0}, max_bytes=2 * FILE_BYTES)
    log = ReplicaLog(A)
    written: list[LogEntry] = []
    before = None
    full = False
    while not full:
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        entry = log.write(blocks=5)
        try:
            journal.append([entry])
            written.append(entry.entry)
        except JournalFull:
            full = True
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert journal.free_bytes < 6 * PAGE
    # A submission whose second group finds no room is refused whole as well.
    with pytest.raises(JournalFull):
        journal.append([entry, *(log.write(blocks=12) for _ in range(2))])
    assert journal.last == len(written)
    journal.close()
    _, recovered = reopen(tmp_path, {A: 0})
    assert recovered.entries[A] == written


def test_a_file_is_made_ahead_of_need(tmp_path: Path) -> None:
    disk = FailingDisk("allocate", after=2, code=errno.ENOSPC)
    journal, _ = reopen(tmp_path, {A: 0}, disk=disk)
    assert journal.prepare() is True
    assert journal.prepare() is False
    log = ReplicaLog(A)
    for _ in range(12):
        journal.append([log.write(blocks=1)])
    assert disk.calls == 2
    with pytest.raises(JournalFull):
        journal.prepare()
    journal.close()


def test_forgetting_a_replica_frees_what_only_it_held(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0, B: 0}, max_bytes=8 * FILE_BYTES)
    mine, other = ReplicaLog(A), ReplicaLog(B)
    journal.append([mine.write()])
    for _ in range(30):
        last = journal.append([other.write(blocks=1)])
    journal.release(B, last)
    assert journal.laggards() == (A,)
    assert journal.forget(A) is True
    assert journal.laggards() == ()
    assert journal.read_records(A, sequence(0), sequence(1), MIB) is None
    # What was queued for it when it was deleted holds no file.
    journal.append([mine.write()])
    for _ in range(30):
        last = journal.append([other.write(blocks=1)])
    assert journal.release(B, last) is True
    assert journal.laggards() == ()
    journal.close()


def test_a_start_goes_above_the_limit_and_gives_the_room_back(tmp_path: Path) -> None:
    log = ReplicaLog(A)
    for _ in range(4):
        journal, recovered = reopen(tmp_path, {A: 0}, max_bytes=2 * FILE_BYTES)
        assert len(recovered.entries[A]) == len(log.records)
        room = journal.free_bytes // PAGE
        for _ in range(min(room, 10) // 2):
            journal.append([log.write(blocks=1)])
        journal.close()
    journal, _ = reopen(tmp_path, {A: 0}, max_bytes=2 * FILE_BYTES)
    assert len(list(tmp_path.iterdir())) > 2
    assert journal.release(A, journal.last) is True
    for _ in range(9):
        journal.append([log.write(blocks=1)])
    assert len(list(tmp_path.iterdir())) == 2
    journal.close()


def test_files_of_another_size_are_used_up_and_removed(tmp_path: Path) -> None:
    log = ReplicaLog(A)
    journal, _ = Journal.open(tmp_path, max_bytes=LOTS, marks={A: 0}, file_bytes=2 * FILE_BYTES)
    for _ in range(30):
        journal.append([log.write(blocks=1)])
    journal.close()
    journal, recovered = reopen(tmp_path, {A: 0})
    assert len(recovered.entries[A]) == 30
    for _ in range(30):
        last = journal.append([log.write(blocks=1)])
    journal.release(A, last)
    for _ in range(9):
        journal.append([log.write(blocks=1)])
    assert {path.stat().st_size for path in tmp_path.iterdir()} == {FILE_BYTES}
    journal.close()


# ---- on a disk that is full, or fails


def test_a_full_disk_is_told_before_anything_is_written_and_passes(tmp_path: Path) -> None:
    disk = FailingDisk("allocate", after=1, code=errno.ENOSPC)
    journal, _ = reopen(tmp_path, {A: 0}, disk=disk)
    log = ReplicaLog(A)
    for _ in range(7):
        last = journal.append([log.write(blocks=1)])
    entry = log.write(blocks=1)
    with pytest.raises(JournalFull):
        journal.append([entry])
    assert len(list(tmp_path.iterdir())) == 1
    assert journal.last == last
    disk.after = 100
    assert journal.append([entry]) == last + 1
    journal.close()


def test_a_start_on_a_full_disk_asks_for_room(tmp_path: Path) -> None:
    disk = FailingDisk("allocate", after=0, code=errno.ENOSPC)

    def make_room() -> bool:
        disk.after = disk.calls + 1
        return True

    with pytest.raises(JournalFull):
        reopen(tmp_path, {A: 0}, disk=disk)
    journal, _ = Journal.open(
        tmp_path, max_bytes=LOTS, marks={A: 0}, file_bytes=FILE_BYTES, disk=disk, make_room=make_room
    )
    assert journal.append([ReplicaLog(A).write()]) == 1
    journal.close()


def test_the_kernel_refusing_room_for_a_file_is_a_full_journal(tmp_path: Path) -> None:
    """With a real limit: the file that could not be made whole is gone again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES // 2, hard))
    try:
        with pytest.raises(JournalFull):
            reopen(tmp_path, {A: 0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    journal, _ = reopen(tmp_path, {A: 0})
    assert journal.append([ReplicaLog(A).write()]) == 1


@pytest.mark.parametrize("kind", ["write", "sync"])
def test_after_a_failed_write_or_sync_nothing_is_tried_again(tmp_path: Path, kind: str) -> None:
    disk = FailingDisk(kind, after=5, code=errno.EIO)
    journal, _ = reopen(tmp_path, {A: 0}, disk=disk)
    log = ReplicaLog(A)
    acknowledged = 0
    failed = False
    while not failed:
        try:
            acknowledged = journal.append([log.write()])
        except JournalFailed:
            failed = True
    calls = disk.calls
    assert 0 < acknowledged == journal.last
    for call in (
        lambda: journal.append([log.write()]),
        lambda: journal.append([]),
        lambda: journal.release(A, 1),
        lambda: journal.forget(A),
        journal.laggards,
        lambda: journal.read_records(A, sequence(0), sequence(1), MIB),
    ):
        with pytest.raises(JournalFailed):
            call()
    assert disk.calls == calls
    journal.close()
    _, recovered = reopen(tmp_path, {A: 0})
    assert len(recovered.entries[A]) >= acknowledged


def test_a_start_that_cannot_write_fails(tmp_path: Path) -> None:
    for kind in ("write", "sync"):
        with pytest.raises(JournalFailed):
            reopen(tmp_path / kind, {A: 0}, disk=FailingDisk(kind, after=0, code=errno.EIO))
