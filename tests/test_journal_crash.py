"""A power cut at every call that reaches the disk, and starts that were themselves cut off.

What holds in every image that a cut can leave: all that was acknowledged is there, what else is there
is the beginning of what was on its way, nobody is damaged, and what one start has found, every later
start finds, even if what the first had read was only in the page cache.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blockstore.domain import ReplicaId
from blockstore.log import LogEntry
from blockstore.storage.journal import Journal, JournalEntry, JournalFull, Recovered, verify_journal
from tests.journal_cases import FILE_BYTES, CachedDisk, PowerCut, PowerDisk, ReplicaLog, lay_out, replica

A, B = replica(1), replica(2)
Image = dict[str, bytes]
LogEntryOf = tuple[ReplicaId, LogEntry]


@dataclass
class Life:
    """One process: what it submitted, in order, and how much of that was acknowledged; marks it was given."""

    disk: PowerDisk
    submitted: list[JournalEntry] = field(default_factory=list)
    acknowledged: int = 0
    found: Recovered | None = None
    first_number: int = 1


Script = Callable[[Journal, Life, dict[ReplicaId, int]], None]


def start(directory: Path, marks: dict[ReplicaId, int], disk: CachedDisk | None = None) -> tuple[Journal, Recovered]:
    disk = disk or CachedDisk()
    return Journal.open(directory, max_bytes=3 * FILE_BYTES, marks=marks, file_bytes=FILE_BYTES, disk=disk)


def live(directory: Path, image: Image, marks: dict[ReplicaId, int], script: Script, limit: int | None) -> Life:
    """Run a script on what a cut left; `limit` cuts it at that call. marks are moved on as it checkpoints."""
    life = Life(PowerDisk(image, limit))
    try:
        journal, life.found = start(lay_out(directory, image), marks, life.disk)
        life.first_number = life.found.last + 1
        script(journal, life, marks)
        journal.close()
    except PowerCut:
        pass
    return life


def submit(journal: Journal, life: Life, marks: dict[ReplicaId, int], entries: Sequence[JournalEntry]) -> None:
    while True:
        try:
            life.submitted += entries
            journal.append(entries)
            life.acknowledged = len(life.submitted)
            return
        except JournalFull:
            del life.submitted[len(life.submitted) - len(entries) :]
            for each in journal.laggards():
                marks[each] = journal.last
                journal.release(each, journal.last)


def many_files(journal: Journal, life: Life, marks: dict[ReplicaId, int]) -> None:
    """Through more files than there may be, with checkpoints, so that files are reused."""
    first, second = ReplicaLog(A, epoch=life.first_number), ReplicaLog(B, epoch=life.first_number)
    for turn in range(9):
        submit(journal, life, marks, [first.write(blocks=4), second.write()])
        submit(journal, life, marks, [second.seal(), first.write(blocks=turn % 3)])


def two_groups(journal: Journal, life: Life, marks: dict[ReplicaId, int]) -> None:
    """A life that ends before it has written much."""
    log = ReplicaLog(A, epoch=life.first_number)
    submit(journal, life, marks, [log.write(), log.write()])
    submit(journal, life, marks, [log.write(blocks=2)])


def check(recovered: Recovered, marks: dict[ReplicaId, int], before: list[LogEntryOf], life: Life) -> None:
    """Everything of earlier lives, all acknowledged of this one, and no more than it submitted."""
    assert recovered.damaged == {}
    mine = [(entry.replica, entry.entry) for entry in life.submitted]
    count = recovered.last - (life.first_number - 1)
    assert life.acknowledged <= count <= len(mine) or not mine
    everything = [*before, *mine[: max(count, 0)]]
    for each, mark in marks.items():
        wanted = [entry for number, (of, entry) in enumerate(everything, 1) if of == each and number > mark]
        assert recovered.entries[each] == wanted


def calls_of(directory: Path, script: Script) -> int:
    return live(directory, {}, {A: 0, B: 0}, script, None).disk.calls


def test_a_power_cut_at_every_call(tmp_path: Path) -> None:
    chance = random.Random(20)
    states = 0
    for limit in range(calls_of(tmp_path / "count", many_files) + 1):
        marks = {A: 0, B: 0}
        life = live(tmp_path / "life", {}, marks, many_files, limit)
        for image in life.disk.images(chance, torn=4):
            journal, recovered = start(lay_out(tmp_path / "after", image), marks)
            check(recovered, marks, [], life)
            assert verify_journal(tmp_path / "after") == []
            journal.close()
            states += 1
    assert states > 250


@pytest.mark.parametrize(("script", "again"), [(two_groups, two_groups), (many_files, two_groups)])
def test_a_start_outlives_the_page_cache(tmp_path: Path, script: Script, again: Script) -> None:
    """A start reads what no sync had covered; then, at every call of it, the power goes and takes that.

    The second life runs on the directory as the page cache shows it; its own disk holds only what was
    durable before, and what it has synced itself.
    """
    chance = random.Random(21)
    total = calls_of(tmp_path / "count", script)
    for limit in range(max(0, total - 12), total + 1):
        marks = {A: 0, B: 0}
        first = live(tmp_path / "first", {}, marks, script, limit)
        if not first.disk.durable or first.disk.unnamed:
            continue
        before = [(entry.replica, entry.entry) for entry in first.submitted]
        surely = {name: bytes(content) for name, content in first.disk.durable.items()}
        for cached in first.disk.images(chance, torn=2):
            for limit_again in range(40):
                second_marks = dict(marks)
                disk = PowerDisk(surely, limit_again)
                second = Life(disk)
                finished = False
                try:
                    journal, second.found = start(lay_out(tmp_path / "second", cached), second_marks, disk)
                    second.first_number = second.found.last + 1
                    again(journal, second, second_marks)
                    journal.close()
                    finished = True
                except PowerCut:
                    pass
                told = before[: second.found.last] if second.found else before[: first.acknowledged]
                for image in disk.images(chance, torn=1):
                    journal, recovered = start(lay_out(tmp_path / "third", image), second_marks)
                    if second.found is not None:
                        check(recovered, second_marks, told, second)
                    else:
                        assert recovered.damaged == {}
                        assert first.acknowledged <= recovered.last <= len(before)
                    journal.close()
                if finished:
                    break
            else:
                raise AssertionError("the second life never ended")


def test_starts_cut_off_one_after_another(tmp_path: Path) -> None:
    """Each life is cut at a random call, and the next runs on what that left, for a hundred lives."""
    chance = random.Random(22)
    marks = {A: 0, B: 0}
    image: Image = {}
    before: list[LogEntryOf] = []
    for _ in range(150):
        script = chance.choice([two_groups, many_files])
        life = live(tmp_path / "life", image, marks, script, chance.randrange(1, 45))
        image = chance.choice(list(life.disk.images(chance, torn=3)))
        if life.found is None:
            life.first_number = len(before) + 1
        journal, recovered = start(lay_out(tmp_path / "look", image), marks)
        check(recovered, marks, before, life)
        before += [(entry.replica, entry.entry) for entry in life.submitted][: recovered.last - len(before)]
        while journal.size_bytes > 3 * FILE_BYTES and journal.laggards():
            for each in journal.laggards():
                marks[each] = journal.last
                journal.release(each, journal.last)
        assert len(list((tmp_path / "look").iterdir())) <= 6
        journal.close()
        image = {path.name: path.read_bytes() for path in (tmp_path / "look").iterdir()}
    assert len(before) > 300


def test_a_start_cut_off_in_a_released_file_damages_nobody(tmp_path: Path) -> None:
    """Half overwritten, the file looks rotten; B, idle since long before, could not prove that it lost nothing."""
    log, idle, marks = ReplicaLog(A), ReplicaLog(B), {A: 0, B: 0}
    journal, _ = start(tmp_path / "journal", marks)
    journal.append([idle.write()])
    for _ in range(16):
        journal.append([log.write()])
    journal.append([log.write(blocks=5)])
    journal.close()
    image = {path.name: path.read_bytes() for path in (tmp_path / "journal").iterdir()}
    marks = {A: 14, B: 1}
    chance = random.Random(23)
    calls = 0
    while True:
        disk = PowerDisk(image, calls)
        try:
            journal, _ = start(lay_out(tmp_path / "cut", image), marks, disk)
            journal.close()
            break
        except PowerCut:
            calls += 1
        for left in disk.images(chance, torn=4):
            journal, recovered = start(lay_out(tmp_path / "after", left), marks)
            assert recovered.damaged == {}
            assert len(recovered.entries[A]) == 18 - marks[A]
            journal.close()
    assert calls > 5
    assert len(list((tmp_path / "cut").iterdir())) == len(image), "the start was to reuse the released file"


@pytest.mark.parametrize("cut", [1, 511, 512, 4095, 4096, 5000, 8191])
def test_a_last_group_torn_at_any_place_is_as_if_never_written(tmp_path: Path, cut: int) -> None:
    log = ReplicaLog(A)
    journal, _ = start(tmp_path / "journal", {A: 0})
    journal.append([log.write(blocks=1)])
    (path,) = (tmp_path / "journal").iterdir()
    whole = path.read_bytes()
    journal.append([log.write(blocks=2)])
    torn = path.read_bytes()
    journal.close()
    at = 4 * 4096
    path.write_bytes(torn[: at + cut] + whole[at + cut :])
    journal, recovered = start(tmp_path / "journal", {A: 0})
    assert (len(recovered.entries[A]), recovered.last, recovered.damaged) == (1, 1, {})
    journal.close()


def test_stale_groups_of_a_file_s_earlier_life_are_not_taken_for_the_log(tmp_path: Path) -> None:
    """The same entries, at the same offsets, in a file that was released and begun anew."""
    log, marks = ReplicaLog(A), {A: 0}
    journal, _ = start(tmp_path / "journal", marks)
    for _ in range(60):
        last = journal.append([log.write(blocks=1)])
        journal.release(A, last)
    journal.close()
    journal, recovered = start(tmp_path / "journal", {A: 50})
    assert recovered.last == 60
    assert [e.record.sequence for e in recovered.entries[A] if hasattr(e, "record")] == list(range(51, 61))
    journal.close()
