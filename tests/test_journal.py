"""The journal through its interface: what was appended comes back, whatever came between."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstore import units
from blockstore.domain import ReplicaId
from blockstore.errors import InvalidRequest
from blockstore.log import LogEntry, SealEntry, TruncateEntry
from blockstore.storage.journal import Journal, JournalEntry, JournalFull, verify_journal
from blockstore.storage.journal_disk import Disk
from blockstore.units import MIB
from tests.journal_cases import FILE_BYTES, LOTS, ReplicaLog, read_all, reopen, replica

A, B, C = replica(1), replica(2), replica(3)


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


def test_two_directories_worth_of_files_are_refused(tmp_path: Path) -> None:
    journal, _ = reopen(tmp_path, {A: 0})
    journal.append([ReplicaLog(A).write()])
    journal.close()
    (tmp_path / "journal-000077").write_bytes(next(tmp_path.iterdir()).read_bytes())
    assert [problem.what for problem in verify_journal(tmp_path)]
    with pytest.raises(Exception, match="copies of one journal file"):
        reopen(tmp_path, {A: 0})


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "append", "seal", "cut", "fill", "release", "reopen", "many"]),
        st.integers(0, 2),
        st.integers(0, 3),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
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
