"""The journal through its interface: what was appended comes back, whatever came between."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstore import units
from blockstore.domain import ReplicaId
from blockstore.errors import InvalidRequest
from blockstore.log import LogEntry, RecordEntry, SealEntry, TruncateEntry
from blockstore.record import Record
from blockstore.storage.journal import (
    Journal,
    JournalEntry,
    JournalFailed,
    JournalFull,
    Recovered,
    verify_journal,
)
from blockstore.storage.journal_disk import Disk
from blockstore.storage.journal_format import PAGE
from blockstore.units import MIB
from tests.journal_cases import FILE_BYTES, ReplicaLog, replica

A, B, C = replica(1), replica(2), replica(3)
LOTS = 64 * FILE_BYTES


def reopen(
    directory: Path, marks: dict[ReplicaId, int], max_bytes: int = LOTS, disk: Disk | None = None
) -> tuple[Journal, Recovered]:
    return Journal.open(directory, max_bytes=max_bytes, marks=marks, file_bytes=FILE_BYTES, disk=disk or Disk())


def entries_of(recovered: Recovered) -> dict[ReplicaId, list[LogEntry]]:
    return recovered.entries


def sequence(number: int) -> units.Sequence:
    return units.Sequence(number)


def test_a_new_journal_is_empty_and_keeps_nothing_but_its_file(tmp_path: Path) -> None:
    journal, recovered = reopen(tmp_path / "journal", {A: 0})
    assert (recovered.entries, recovered.damaged, recovered.last, journal.last) == ({A: []}, {}, 0, 0)
    assert journal.size_bytes == FILE_BYTES
    assert journal.append([]) == 0
    journal.close()


def test_entries_come_back_after_each_mark_and_only_of_replicas_that_are_here(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0})
    logs = [ReplicaLog(A), ReplicaLog(B), ReplicaLog(C)]
    written = [log.write(blocks) for blocks in (0, 1) for log in logs]
    assert journal.append(written) == 6
    assert journal.append([logs[0].seal()]) == 7
    journal.close()

    _, recovered = reopen(tmp_path, {A: 1, B: 5})
    assert recovered.entries == {A: [written[3].entry, SealEntry(units.Epoch(2), 1)], B: []}
    assert (recovered.damaged, recovered.last) == ({}, 7)


def test_numbers_go_on_over_starts_and_starts_take_no_room(tmp_path: Path) -> None:
    log = ReplicaLog(A)
    written: list[LogEntry] = []
    for start in range(30):
        journal, recovered = Journal.open(tmp_path, max_bytes=4 * MIB, marks={A: 0}, file_bytes=MIB)
        assert (recovered.entries[A], recovered.last, recovered.damaged) == (written, len(written), {})
        assert journal.size_bytes <= 2 * MIB
        if start % 3 == 0:
            entry = log.write()
            assert journal.append([entry]) == len(written) + 1
            written.append(entry.entry)
        journal.close()
    assert verify_journal(tmp_path) == []


def test_a_submission_larger_than_a_group_becomes_several(tmp_path: Path) -> None:
    log = ReplicaLog(A)
    entries = [log.write(blocks=256) for _ in range(9)]
    journal, _ = Journal.open(tmp_path, max_bytes=64 * MIB, marks={A: 0}, file_bytes=16 * MIB)
    assert journal.append(entries) == 9
    small = [log.write() for _ in range(2500)]
    assert journal.append(small) == 2509
    journal.close()
    _, recovered = Journal.open(tmp_path, max_bytes=64 * MIB, marks={A: 0}, file_bytes=16 * MIB)
    assert recovered.entries[A] == [entry.entry for entry in (*entries, *small)]


@pytest.mark.parametrize("before", range(1, 14))
def test_a_truncation_shares_its_group_with_what_replaces_the_tail(tmp_path: Path, before: int) -> None:
    """Were it the last of its group, a crash before the next one would let an acknowledged position fall."""
    writes: list[tuple[int, int]] = []

    class Watched(Disk):
        def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
            writes.append((offset, sum(map(len, buffers))))
            super().write(fd, buffers, offset)

    log = ReplicaLog(A)
    tail = [log.write(blocks=1) for _ in range(before)]
    journal, _ = Journal.open(tmp_path, max_bytes=LOTS, marks={A: 0}, file_bytes=2 * FILE_BYTES, disk=Watched())
    journal._state.file_bytes = FILE_BYTES  # groups of at most 14 pages, in a file that holds two
    journal.append([*tail, *log.replace_tail(1, blocks=9)])
    journal.close()
    offset, size = writes[-1]
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:offset] + bytes(size) + content[offset + size :])
    _, recovered = Journal.open(tmp_path, max_bytes=LOTS, marks={A: 0}, file_bytes=2 * FILE_BYTES)
    assert not any(isinstance(entry, TruncateEntry) for entry in recovered.entries[A])
    assert len(recovered.entries[A]) in (0, before)


def test_an_entry_that_fits_no_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0})
    log = ReplicaLog(A)
    with pytest.raises(InvalidRequest):
        journal.append([log.write(), log.write(blocks=16)])
    assert journal.last == 0
    other = ReplicaLog(A)
    assert journal.append([other.write()]) == 1
    with pytest.raises(InvalidRequest, match="letters"):
        journal.append([JournalEntry(ReplicaId("r" * 25), SealEntry(units.Epoch(1), 1), other.end)])


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


class FailingDisk(Disk):
    """Fails one kind of call from the `after`th on, and counts those that came later."""

    def __init__(self, failing: str, after: int, code: int) -> None:
        self.failing, self.after, self.code, self.calls = failing, after, code, 0

    def _maybe(self, kind: str) -> None:
        if kind == self.failing:
            self.calls += 1
            if self.calls > self.after:
                raise OSError(self.code, os.strerror(self.code))

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        self._maybe("write")
        super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._maybe("sync")
        super().sync(fd)

    def allocate(self, fd: int, size_bytes: int) -> None:
        self._maybe("allocate")
        super().allocate(fd, size_bytes)


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


def test_two_directories_worth_of_files_are_refused(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0})
    journal.append([ReplicaLog(A).write()])
    journal.close()
    (tmp_path / "journal-000077").write_bytes(next(tmp_path.iterdir()).read_bytes())
    assert [problem.what for problem in verify_journal(tmp_path)]
    with pytest.raises(Exception, match="copies of one journal file"):
        reopen(tmp_path, {A: 0})


def test_records_are_read_for_a_peer_in_pieces(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0, B: 0}, max_bytes=4 * FILE_BYTES)
    log, other = ReplicaLog(A), ReplicaLog(B)
    for _ in range(12):
        last = journal.append([log.write(blocks=1), other.write(), log.write()])
    held = log.records[:]
    assert read_all(journal, A, 0, 24) == held
    assert read_all(journal, A, 5, 20) == held[5:20]
    assert read_all(journal, A, 5, 99) == held[5:]
    assert journal.read_records(A, sequence(24), sequence(30), MIB) is None
    assert journal.read_records(A, sequence(7), sequence(7), MIB) == []
    assert journal.read_records(C, sequence(0), sequence(1), MIB) is None
    limited = journal.read_records(A, sequence(0), sequence(24), 5000)
    assert limited == held[:2]
    # Released files serve until they are reused.
    journal.release(A, last)
    journal.release(B, last)
    assert read_all(journal, A, 0, 24) == held
    while journal.read_records(A, sequence(0), sequence(1), MIB) is not None:
        last = journal.append([log.write(blocks=1)])
        journal.release(A, last)
    newest = log.records[-1].sequence
    assert read_all(journal, A, newest - 3, newest) == log.records[-3:]
    journal.close()
    # A start took the released file for its own and moved the newest group there.
    journal, _ = reopen(tmp_path, {A: last, B: last})
    assert read_all(journal, A, newest - 1, newest) == log.records[-1:]


def read_all(journal: Journal, of: ReplicaId, after: int, up_to: int, limit_bytes: int = 9000) -> list[Record]:
    """What a peer that asks again and again gets."""
    found: list[Record] = []
    while piece := journal.read_records(of, sequence(after + len(found)), sequence(up_to), limit_bytes):
        found += piece
    return found


def test_records_that_rot_took_are_not_given_out(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0})
    log = ReplicaLog(A)
    for _ in range(6):
        journal.append([log.write(blocks=1)])
    path = next(tmp_path.iterdir())
    content = bytearray(path.read_bytes())
    content[2 * PAGE + 3 * 2 * PAGE + 1000] ^= 1
    path.write_bytes(content)
    assert read_all(journal, A, 0, 6) == log.records[:3]
    assert journal.read_records(A, sequence(3), sequence(6), MIB) is None
    assert read_all(journal, A, 4, 6) == log.records[4:]


def test_a_peer_reads_while_files_are_reused(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0}, max_bytes=3 * FILE_BYTES)
    log = ReplicaLog(A)
    wrong: list[str] = []
    stop = threading.Event()

    def read() -> None:
        chance = random.Random(1)
        while not stop.is_set():
            after = chance.randrange(max(1, len(log.records) - 3))
            found = journal.read_records(A, sequence(after), sequence(after + 9), MIB)
            if found is not None and found != log.records[after : after + len(found)]:
                wrong.append(f"after {after}: {[record.sequence for record in found]}")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(400):
            last = journal.append([log.write(blocks=1)])
            journal.release(A, last)
    finally:
        stop.set()
        reader.join()
    assert wrong == []
    journal.close()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "append", "seal", "cut", "fill", "release", "reopen", "many"]),
        st.integers(0, 2),
        st.integers(0, 3),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_against_lists(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]) -> None:
    """Random lives of three replicas: the journal shows what lists of their entries show."""
    directory = tmp_path_factory.mktemp("journal")
    logs = [ReplicaLog(of) for of in (A, B, C)]
    marks = {log.replica: 0 for log in logs}
    model: dict[ReplicaId, list[tuple[int, LogEntry]]] = {log.replica: [] for log in logs}
    journal, _ = reopen(directory, marks, max_bytes=3 * FILE_BYTES)

    def append(entries: list[JournalEntry]) -> None:
        while True:
            try:
                last = journal.append(entries)
                break
            except JournalFull:
                laggards = journal.laggards()
                assert laggards
                for each in laggards:
                    marks[each] = journal.last
                    journal.release(each, journal.last)
        for i, entry in enumerate(entries):
            model[entry.replica].append((last - len(entries) + 1 + i, entry.entry))

    for what, which, count in steps:
        log = logs[which]
        if what == "append":
            append([log.write(blocks=count) for _ in range(1 + count)])
        elif what == "many":
            append([each.write(blocks=count) for each in logs for _ in range(3)])
        elif what == "seal":
            append([log.seal()])
        elif what == "cut" and log.records:
            append(log.replace_tail(min(count, len(log.records))))
        elif what == "fill":
            append([log.fill(), *(log.write() for _ in range(count))])
        elif what == "release":
            marks[log.replica] = max(0, journal.last - count)
            journal.release(log.replica, marks[log.replica])
        elif what == "reopen":
            journal.close()
            journal, recovered = reopen(directory, marks, max_bytes=3 * FILE_BYTES)
            assert recovered.damaged == {}
            assert recovered.entries == {
                of: [entry for number, entry in model[of] if number > marks[of]] for of in model
            }
    for log in logs:
        if log.records:
            first, last = log.records[0].sequence, log.records[-1].sequence
            held = next((s for s in range(first, last + 1) if read_all(journal, log.replica, s - 1, last)), last + 1)
            assert read_all(journal, log.replica, held - 1, last) == log.records[held - first :]
    journal.close()
    assert verify_journal(directory) == []


CHILD = """
import os
import sys
from pathlib import Path
from blockstore.storage.journal import Journal, JournalFull
from tests.journal_cases import ReplicaLog, replica
from blockstore.domain import ReplicaId
A = replica(1)
mark, first, epoch = map(int, sys.argv[2:5])
journal, recovered = Journal.open(Path(sys.argv[1]), max_bytes=1 << 22, marks={A: mark}, file_bytes=1 << 20)
log = ReplicaLog(A, epoch)
while True:
    try:
        last = journal.append([log.write(blocks=n % 5) for n in range(4)])
    except JournalFull:
        journal.release(A, journal.last)
        os.write(1, b"mark %d\n" % journal.last)
        continue
    os.write(1, b"last %d\n" % last)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    mark = number = 0
    for round_number in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / "journal"), str(mark), str(number), str(round_number + 1)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        for count, line in enumerate(child.stdout):
            word, _, value = line.partition(" ")
            mark = int(value) if word == "mark" else mark
            number = int(value) if word == "last" else number
            if count == 20 + 19 * round_number:
                child.send_signal(signal.SIGKILL)
        child.wait()
        journal, recovered = Journal.open(tmp_path / "journal", max_bytes=1 << 22, marks={A: mark}, file_bytes=1 << 20)
        assert recovered.damaged == {}
        assert recovered.last >= number
        assert len(recovered.entries[A]) == recovered.last - mark
        assert verify_journal(tmp_path / "journal") == []
        number = recovered.last
        journal.close()
