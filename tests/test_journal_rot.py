"""Rot: bytes that were durable and are bad now. Whoever lost something is damaged, and nobody else is.

The one rot that cannot be told from a torn write is that of the last group. Everything before it is
proven by what comes behind.
"""

import errno
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstore.domain import Position, ReplicaId
from blockstore.log import (
    UNKNOWN_FLOOR,
    Filling,
    FillingEntry,
    LogEntry,
    RecordEntry,
    SealEntry,
)
from blockstore.storage.journal import Journal, JournalEntry, Recovered, verify_journal
from blockstore.storage.journal_chain import read_chain
from blockstore.storage.journal_format import PAGE, header_size
from blockstore.storage.journal_read import groups_between
from blockstore.units import Epoch, Sequence
from tests.journal_cases import FILE_BYTES, LOTS, CachedDisk, ReplicaLog, lay_out, position, reopen, replica

A, B, C = replica(1), replica(2), replica(3)
ALL = (A, B, C)


def start(directory: Path, marks: dict[ReplicaId, int], max_bytes: int = LOTS) -> tuple[Journal, Recovered]:
    return reopen(directory, marks, max_bytes, CachedDisk())


@dataclass
class Written:
    """A journal directory and what was appended to it, by number."""

    directory: Path
    entries: list[JournalEntry] = field(default_factory=list)

    def of(self, which: ReplicaId, after: int = 0) -> list[LogEntry]:
        numbered = enumerate(self.entries, 1)
        return [entry.entry for number, entry in numbered if entry.replica == which and number > after]

    def highest(self, which: ReplicaId) -> Position:
        return max(entry.position for entry in self.entries if entry.replica == which)

    def groups(self) -> list[tuple[Path, int, int, int]]:
        """Each group of the log: its file, offset, header size and whole size."""
        chain = read_chain(self.directory)
        found = []
        for index, file in enumerate(chain.files):
            assert file.path is not None
            assert file.header is not None
            fd = os.open(file.path, os.O_RDONLY)
            for group in groups_between(fd, file.header.salt, chain.end_of(index)[0]):
                found.append((file.path, group.offset, group.header.header_size, group.header.size_bytes))
            os.close(fd)
        return found

    def flip(self, path: Path, at: int, size: int = 1) -> None:
        content = bytearray(path.read_bytes())
        for i in range(at, min(at + size, len(content))):
            content[i] ^= 0x5A
        path.write_bytes(content)


def write(directory: Path, groups: list[list[ReplicaId]]) -> Written:
    """One group for each list, with one entry of each replica in it."""
    written = Written(directory)
    logs = {each: ReplicaLog(each) for each in ALL}
    journal, _ = start(directory, dict.fromkeys(ALL, 0))
    for group in groups:
        entries = [logs[each].write(blocks=1) for each in group]
        journal.append(entries)
        written.entries += entries
    journal.close()
    return written


PLACES = {"magic": 0, "prefix": 30, "checksum": 50, "list": header_size(0, 0) + 4}


@pytest.mark.parametrize("place", [*PLACES, "body", "whole group"])
def test_a_bad_group_damages_those_it_lists(tmp_path: Path, place: str) -> None:
    """Whether its own header tells who they are or, that being bad too, the header behind it."""
    written = write(tmp_path / "journal", [[A], [A, B], [A, C], [C], [B], [C]])
    path, offset, header, size = written.groups()[1]
    if place == "whole group":
        written.flip(path, offset, size)
    else:
        written.flip(path, offset + PLACES.get(place, header + 100))
    journal, recovered = start(tmp_path / "journal", dict.fromkeys(ALL, 0))
    assert recovered.damaged == {A: written.highest(A), B: written.highest(B)}
    assert recovered.entries[C] == written.of(C)
    assert recovered.last == len(written.entries)
    # Before the damage its entries stand; behind it only the promise not to hear an older epoch.
    assert recovered.entries[A] == [*written.of(A)[:1], SealEntry(Epoch(1), 1)]
    assert recovered.entries[B] == [SealEntry(Epoch(1), 1)]
    journal.close()
    assert verify_journal(tmp_path / "journal")


def test_who_has_a_checkpoint_behind_it_is_not_damaged(tmp_path: Path) -> None:
    written = write(tmp_path / "journal", [[A], [A, B], [A, C], [C]])
    path, offset, header, _ = written.groups()[1]
    written.flip(path, offset + header + 100)
    journal, recovered = start(tmp_path / "journal", {A: 2, B: 0, C: 0})
    assert recovered.damaged == {B: written.highest(B)}
    assert recovered.entries[A] == written.of(A, after=2)
    journal.close()


def test_two_bad_headers_damage_whoever_may_have_been_in_the_first(tmp_path: Path) -> None:
    """C's next item says that its entry before lies ahead of the hole; B, after it, is heard of no more."""
    written = write(tmp_path / "journal", [[C, B], [A], [A], [C], [C]])
    groups = written.groups()
    for path, offset, _, _ in groups[1:3]:
        written.flip(path, offset)
    journal, recovered = start(tmp_path / "journal", dict.fromkeys(ALL, 0))
    assert recovered.damaged == {A: UNKNOWN_FLOOR, B: UNKNOWN_FLOOR}
    assert recovered.entries[C] == written.of(C)
    journal.close()
    # With its tables past the hole nothing can have been lost.
    journal, recovered = start(tmp_path / "journal", {A: 4, B: 4, C: 0})
    assert recovered.damaged == {}
    journal.close()


def test_groups_of_one_submission_name_each_other(tmp_path: Path) -> None:
    log = ReplicaLog(A)
    journal, _ = start(tmp_path / "journal", {A: 0})
    journal.append([log.write(blocks=5) for _ in range(10)])
    journal.close()
    written = Written(tmp_path / "journal")
    groups = written.groups()
    assert len(groups) == 5
    for path, offset, _, _ in groups[1:3]:
        written.flip(path, offset)
    journal, recovered = start(tmp_path / "journal", {A: 0})
    assert recovered.damaged == {A: UNKNOWN_FLOOR}
    journal.close()


def test_damage_is_found_again_until_a_filling_entry_remembers_it(tmp_path: Path) -> None:
    written = write(tmp_path / "journal", [[A], [A, B], [C], [A], [C], [C]])
    path, offset, header, _ = written.groups()[1]
    written.flip(path, offset + header + 100)
    marks = dict.fromkeys(ALL, 0)
    for _ in range(3):
        journal, recovered = start(tmp_path / "journal", marks)
        assert recovered.damaged == {A: written.highest(A), B: written.highest(B)}
        journal.close()

    journal, recovered = start(tmp_path / "journal", marks)
    floor = recovered.damaged[A]
    base = position(7, 9)
    filling = FillingEntry(Filling(floor, base, Sequence(0)))
    live = ReplicaLog(A, epoch=7, base=base)
    journal.append([JournalEntry(A, filling, base), JournalEntry(A, SealEntry(Epoch(7), 1), base)])
    journal.append([live.write()])
    journal.close()
    for _ in range(2):
        journal, recovered = start(tmp_path / "journal", marks)
        assert recovered.damaged == {B: written.highest(B)}
        assert recovered.entries[A][-3:] == [filling, SealEntry(Epoch(7), 1), RecordEntry(live.records[0])]
        journal.close()


def test_a_file_with_damage_stays_until_a_checkpoint_is_past_it(tmp_path: Path) -> None:
    """Reused, it would take along what later starts must find again."""
    written = write(tmp_path / "journal", [[B], [A], [C], [C]])
    path, offset, _, _ = written.groups()[1]
    written.flip(path, offset)
    journal, recovered = start(tmp_path / "journal", dict.fromkeys(ALL, 0), max_bytes=2 * FILE_BYTES)
    assert set(recovered.damaged) == {A}
    journal.release(B, 1)
    journal.release(C, 4)
    assert journal.laggards() == (A,)
    journal.release(A, 1)
    assert journal.laggards() == (A,)
    assert journal.release(A, 2) is True
    journal.close()


def test_a_floor_is_the_highest_position_seen_anywhere(tmp_path: Path) -> None:
    """Behind a filling entry the log's end lies below what was acked before it, which only the floor remembers."""
    log, other = ReplicaLog(A), ReplicaLog(B)
    journal, _ = start(tmp_path / "journal", {A: 0, B: 0})
    journal.append([log.write() for _ in range(9)])
    acked, base = log.end, position(1, 4)
    journal.append([JournalEntry(A, FillingEntry(Filling(acked, base, Sequence(2))), base)])
    live = ReplicaLog(A, base=base)
    for _ in range(3):
        journal.append([live.write(), other.write()])
    journal.close()
    written = Written(tmp_path / "journal")
    path, offset, header, _ = written.groups()[1]
    written.flip(path, offset + header)
    journal, recovered = start(tmp_path / "journal", {A: 9, B: 0})
    assert live.end < acked
    assert recovered.damaged == {A: acked}
    journal.close()


def test_a_file_stays_for_those_of_whom_nobody_knows_what_they_lost(tmp_path: Path) -> None:
    written = write(tmp_path / "journal", [[B], [A], [A], [C], [C]])
    for path, offset, _, _ in written.groups()[1:3]:
        written.flip(path, offset)
    marks = {A: 0, B: 1, C: 5}
    journal, recovered = start(tmp_path / "journal", marks)
    assert recovered.damaged == {A: UNKNOWN_FLOOR, B: UNKNOWN_FLOOR}
    assert set(journal.laggards()) == {A, B}
    journal.release(A, 3)
    journal.release(B, 2)
    assert journal.laggards() == (B,)
    assert journal.release(B, 3) is True
    journal.close()


@pytest.mark.parametrize("place", [0, 300])
def test_the_last_group_is_no_torn_one_where_a_start_has_written_it(tmp_path: Path, place: int) -> None:
    """The header of that start's file, synced after it, says that it was there."""
    written = write(tmp_path / "journal", [[B], [A]])
    journal, _ = start(tmp_path / "journal", dict.fromkeys(ALL, 0))
    journal.close()
    path, offset, _, _ = written.groups()[-1]
    written.flip(path, offset + place)
    for last in (2, 3, 4):
        # What a life writes behind it does not know who is in it either, and says so.
        journal, recovered = start(tmp_path / "journal", {A: 0, B: 2})
        assert recovered.damaged == {A: UNKNOWN_FLOOR if place == 0 else written.highest(A)}
        assert recovered.last == last
        journal.append([ReplicaLog(B, epoch=last).seal()])
        journal.close()


@pytest.mark.parametrize("copies", [(0,), (PAGE,), (0, PAGE)])
def test_a_file_s_bad_header(tmp_path: Path, copies: tuple[int, ...]) -> None:
    """One copy is enough. Without both, what the file held is not known."""
    written = write(tmp_path / "journal", [[A, B], [C], [A]])
    path = written.groups()[0][0]
    for copy in copies:
        written.flip(path, copy + 20)
    assert len(verify_journal(tmp_path / "journal")) == 1
    journal, recovered = start(tmp_path / "journal", dict.fromkeys(ALL, 0))
    if len(copies) == 1:
        assert recovered.damaged == {}
        assert recovered.entries == {each: written.of(each) for each in ALL}
    else:
        assert recovered.damaged == dict.fromkeys(ALL, UNKNOWN_FLOOR)
        # It is known to later starts as well, also to one behind a life that wrote.
        journal.append([ReplicaLog(C, epoch=9).seal()])
        journal.close()
        journal, recovered = start(tmp_path / "journal", dict.fromkeys(ALL, 0))
        assert {A, B} <= set(recovered.damaged)
    journal.close()


def test_a_journal_that_is_gone_damages_all_and_numbers_go_on(tmp_path: Path) -> None:
    """Numbers that started again would lie below the marks, and so be taken for applied."""
    marks = {A: 70, B: 3, C: 0}
    journal, recovered = start(tmp_path / "journal", marks)
    assert recovered.damaged == dict.fromkeys(ALL, UNKNOWN_FLOOR)
    assert recovered.last > 70
    last = journal.append([ReplicaLog(A).fill()])
    assert last == recovered.last + 1
    journal.close()
    journal, recovered = start(tmp_path / "journal", marks)
    assert recovered.damaged == {B: UNKNOWN_FLOOR, C: UNKNOWN_FLOOR}
    assert len(recovered.entries[A]) == 1
    # With checkpoints behind it, it is past.
    journal.release(B, last)
    journal.release(C, last)
    journal.close()
    journal, recovered = start(tmp_path / "journal", {A: last, B: last, C: last})
    assert recovered.damaged == {}
    journal.close()


def test_a_needed_file_that_is_gone_damages_whoever_may_have_been_in_it(tmp_path: Path) -> None:
    """C says, by its first item behind, that it has nothing before; A is heard of no more."""
    written = write(tmp_path / "journal", [[A, B]] * 5 + [[C, B]] * 12)
    groups = written.groups()
    first = groups[0][0]
    lost = 2 * sum(path == first for path, *_ in groups)
    assert 0 < lost <= 10
    first.unlink()
    assert verify_journal(tmp_path / "journal")
    for _ in range(2):
        journal, recovered = start(tmp_path / "journal", dict.fromkeys(ALL, 0))
        assert recovered.damaged == {A: UNKNOWN_FLOOR, B: UNKNOWN_FLOOR}
        assert recovered.entries[C] == written.of(C)
        assert journal.laggards()
        journal.close()
    journal, recovered = start(tmp_path / "journal", {A: lost, B: lost, C: 0})
    assert recovered.damaged == {}
    assert recovered.entries[B] == written.of(B, after=lost)
    journal.close()


def test_a_sector_that_the_disk_cannot_read_is_rot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write(tmp_path / "journal", [[A], [B], [C], [A]])
    path, bad, _, _ = written.groups()[1]
    pread = os.pread

    def failing(fd: int, size: int, offset: int) -> bytes:
        """What a disk does: whatever touches the sector fails."""
        if os.readlink(f"/proc/self/fd/{fd}") == str(path) and offset <= bad < offset + size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert verify_journal(tmp_path / "journal")
    journal, recovered = start(tmp_path / "journal", dict.fromkeys(ALL, 0))
    assert recovered.damaged == {B: written.highest(B)}
    assert recovered.entries[C] == written.of(C)
    journal.close()


GROUPS = st.lists(st.lists(st.sampled_from(ALL), min_size=1, max_size=3, unique=True), min_size=2, max_size=30)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(groups=GROUPS, data=st.data(), seed=st.integers(0, 1 << 30))
def test_whatever_rots_nobody_loses_an_entry_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[ReplicaId]], data: st.DataObject, seed: int
) -> None:
    """Random bad places before the last group, random marks, several lives: all of it, or damaged with a floor."""
    directory = tmp_path_factory.mktemp("rot") / "journal"
    written = write(directory, groups)
    chance = random.Random(seed)
    for _ in range(chance.randrange(2)):
        journal, _ = start(directory, dict.fromkeys(ALL, 0))
        entries = [JournalEntry(each, SealEntry(Epoch(5), 1), written_end(written, each)) for each in ALL]
        journal.append(entries)
        written.entries += entries
        journal.close()
    places = written.groups()
    last_path, last_offset, _, _ = places[-1]
    for _ in range(data.draw(st.integers(1, 4))):
        path, offset, header, size = chance.choice(places[:-1] or places)
        if (path, offset) != (last_path, last_offset):
            at = chance.choice([0, 40, header - 1, header + 50, size - 1])
            written.flip(path, offset + at, chance.choice([1, min(900, size - at)]))
    marks = {each: chance.randrange(len(written.entries) + 1) for each in ALL}
    image = {path.name: path.read_bytes() for path in directory.iterdir()}
    for _ in range(2):
        journal, recovered = start(directory, marks)
        assert recovered.last == len(written.entries)
        for each in ALL:
            if each in recovered.damaged:
                assert recovered.damaged[each] >= written_end(written, each)
                assert written.of(each, marks[each]) or recovered.damaged[each] == UNKNOWN_FLOOR
            else:
                assert recovered.entries[each] == written.of(each, marks[each])
        journal.close()
    journal, recovered = start(lay_out(directory, image), dict.fromkeys(ALL, len(written.entries)))
    assert recovered.damaged == {}
    journal.close()


def written_end(written: Written, which: ReplicaId) -> Position:
    mine = [entry.position for entry in written.entries if entry.replica == which]
    return max(mine, default=position(0, 0))
