"""What the log holds for each replica after its mark, and who lost something in it.

One pass over the group headers of the chain, in order; a body is read only where a replica still
needs it. Groups have consecutive numbers, and each was written only after the one before it was
synced. So a bad group before a valid one is rot, and only behind the last group that is known to
have been synced can a bad one be a write that a crash tore.

Who lost something is known from lists: of a group whose body is bad, from its own header; of one
whose header is bad, from the header behind it. Where neither can be read, a replica is sound only
if its next item says that its entry before that lies ahead of the hole, or if its tables reflect all
of it. A filling entry behind the damage ends it: that entry remembers the floor. Until then a
damaged replica is given no records from behind the damage, but still every promise not to listen
to an older epoch.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from blockstore.domain import Position, ReplicaId
from blockstore.errors import Corrupt
from blockstore.log import UNKNOWN_FLOOR, FillingEntry, LogEntry, RecordEntry, SealEntry, decode_entry
from blockstore.storage.journal_chain import Chain, JournalFile
from blockstore.storage.journal_format import FIRST_OFFSET, GroupItem, Items, StoredEntry, stored_entries
from blockstore.storage.journal_index import Place, RecordIndex
from blockstore.storage.journal_read import FoundGroup, groups_between, read_body

_BEYOND: Final = (1 << 64) - 1


@dataclass(slots=True)
class _Hole:
    """Entries first to last can be read nowhere, nor whose they were; settled: replicas judged already."""

    first: int
    last: int
    file: JournalFile | None
    settled: set[ReplicaId] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class LogEnd:
    """Where the log ends. next_group, next_entry: the numbers behind it. items: of the last group, None unknown.

    groups: those of the newest file without a gap, up to the end; none where the last one is bad. whole:
    they are all that the file holds. offset: where in the newest file the log ends.
    """

    next_group: int
    next_entry: int
    items: Items | None
    groups: tuple[FoundGroup, ...]
    whole: bool
    offset: int


class Replay:
    """The pass. marks: of each replica here, the last entry that its synced tables reflect."""

    def __init__(self, chain: Chain, marks: Mapping[ReplicaId, int]) -> None:
        self.entries: dict[ReplicaId, list[LogEntry]] = {replica: [] for replica in marks}
        self.index = RecordIndex()
        self.problems: list[tuple[JournalFile, str]] = []
        self.last_numbers: dict[ReplicaId, int] = {}
        self._chain = chain
        self.marks = marks
        self._unknown: dict[ReplicaId, bool] = {}
        self._highest: dict[ReplicaId, Position] = {}
        self._sealed: dict[ReplicaId, SealEntry] = {}
        self._holes: list[_Hole] = []
        self._next_group = 1
        self._next_entry = 1
        self._items: Items | None = None
        self._final: list[FoundGroup] = []
        self._final_whole = True
        self._end_offset = FIRST_OFFSET

    def run(self) -> LogEnd:
        """Read the whole chain. Raises Corrupt where checked bytes cannot be decoded, OSError."""
        if self._chain.files:
            self._begin()
        for index, file in enumerate(self._chain.files):
            self._read_file(file, *self._chain.end_of(index))
        self._close_holes()
        return LogEnd(
            self._next_group, self._next_entry, self._items, tuple(self._final), self._final_whole, self._end_offset
        )

    @property
    def damaged(self) -> dict[ReplicaId, Position]:
        """The floor of each replica that lost something."""
        return {
            replica: UNKNOWN_FLOOR if unknown else self._highest[replica] for replica, unknown in self._unknown.items()
        }

    def lose_end(self, next_entry: int) -> LogEnd:
        """After run: the log went on, in a file that is gone, so nobody here is sound. Where it resumes."""
        for replica in self.marks:
            self._damage(replica, None, 0, unknown=True)
        return LogEnd(self._next_group + 1, next_entry, None, (), False, self._end_offset)

    def _begin(self) -> None:
        header = self._chain.files[0].header
        assert header is not None
        self._next_group, self._next_entry = header.first_group, header.first_entry
        if self._chain.lost:
            self._holes.append(_Hole(0, header.first_entry - 1, None))

    def _read_file(self, file: JournalFile, end: int, next_file_group: int | None) -> None:
        header, newest = file.header, next_file_group is None
        assert header is not None
        assert file.path is not None
        file.place = Place(file.path, header.salt)
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        self._final, self._final_whole, self._end_offset = [], True, FIRST_OFFSET
        try:
            waiting: FoundGroup | None = None
            for group in groups_between(fd, header.salt, end):
                if next_file_group is not None and group.header.number >= next_file_group:
                    break
                if waiting is not None:
                    self._take(file, fd, waiting, torn_allowed=False)
                waiting = group
            if waiting is not None:
                self._take(file, fd, waiting, torn_allowed=newest and waiting.header.number > header.synced_group)
        finally:
            os.close(fd)
        if newest and self._next_group <= header.synced_group:
            self._miss(file, header.synced_group + 1, header.synced_entry + 1, None)

    def _take(self, file: JournalFile, fd: int, group: FoundGroup, *, torn_allowed: bool) -> None:
        """One group whose header is good, and what is missing before it."""
        header = group.header
        assert file.place is not None
        if header.number < self._next_group:
            raise Corrupt(f"group {header.number} is twice in the log, the second time in {file.path}")
        if header.number > self._next_group:
            self._miss(file, header.number, header.first_entry, header.previous)
        for item in header.items:
            self._note(item)
        needed = any(item.number > self.marks.get(item.replica, _BEYOND) for item in header.items)
        body = read_body(fd, group, file.place.salt) if needed or torn_allowed else None
        if torn_allowed and body is None:
            return
        self._settle(header.items)
        self._next_group, self._next_entry = header.number + 1, header.last_entry + 1
        self._items, self._end_offset = header.items, group.end
        self._keep(file, header.items)
        if needed and body is None:
            self.problems.append((file, f"the body of group {header.number} at offset {group.offset} is bad"))
            self._final, self._final_whole = [], False
            self._lose(header.items, file)
            return
        self._final.append(group)
        self.index.add(
            tuple(item for item in header.items if item.replica in self.marks), file.place, group.offset, group.end
        )
        if body is not None and needed:
            for entry in stored_entries(header, body):
                self._take_entry(entry)

    def _take_entry(self, stored: StoredEntry) -> None:
        if stored.number <= self.marks.get(stored.replica, _BEYOND):
            return
        entry: LogEntry | None = decode_entry(stored.kind, bytes(stored.payload))
        if stored.replica in self._unknown and entry is not None:
            entry = self._behind_damage(stored.replica, entry)
        if entry is not None:
            self.entries[stored.replica].append(entry)

    def _behind_damage(self, replica: ReplicaId, entry: LogEntry) -> LogEntry | None:
        """What an entry still says of a replica that lost some before it."""
        match entry:
            case FillingEntry():
                del self._unknown[replica]
                return entry
            case RecordEntry(record):
                promise = SealEntry(record.position.epoch, record.configuration)
            case SealEntry():
                promise = entry
            case _:
                return None
        if promise == self._sealed.get(replica):
            return None
        self._sealed[replica] = promise
        return promise

    def _miss(self, file: JournalFile, group: int, entry: int, previous: Items | None) -> None:
        """The groups from the next one expected up to the one before `group` are bad."""
        missing = group - self._next_group
        holder = self._chain.holding(self._next_group)
        self.problems.append((holder, f"{missing} groups from number {self._next_group} on cannot be read"))
        if (missing > 1 or previous is None) and holder.incarnation >= self._chain.oldest:
            self._holes.append(_Hole(self._next_entry, entry - 1, holder))
        for item in previous or ():
            self._note(item)
        self._settle(previous or ())
        self._lose(previous or (), holder)
        self._keep(holder, previous or ())
        self._next_group, self._next_entry, self._items = group, entry, previous
        self._final, self._final_whole = [], False

    def _keep(self, file: JournalFile, items: Items) -> None:
        """The file is needed until the tables of these replicas reflect what it holds of them."""
        for item in items:
            if item.replica in self.marks:
                file.last[item.replica] = max(item.number, file.last.get(item.replica, 0))
                self.last_numbers[item.replica] = item.number

    def _note(self, item: GroupItem) -> None:
        self._highest[item.replica] = max(item.position, self._highest.get(item.replica, item.position))

    def _lose(self, items: Items, file: JournalFile) -> None:
        for item in items:
            if item.number > self.marks.get(item.replica, _BEYOND):
                self._damage(item.replica, file, item.number, unknown=False)

    def _settle(self, items: Items) -> None:
        """Judge, by their first items behind a hole, the replicas that may have had entries in it."""
        for hole in self._holes:
            for item in items:
                if item.replica not in hole.settled:
                    hole.settled.add(item.replica)
                    if item.before >= max(hole.first, 1) and item.before > self.marks.get(item.replica, _BEYOND):
                        self._damage(item.replica, hole.file, hole.last, unknown=True)

    def _close_holes(self) -> None:
        """Judge the replicas of which nothing stands behind a hole."""
        for hole in self._holes:
            for replica, mark in self.marks.items():
                if replica not in hole.settled and mark < hole.last:
                    self._damage(replica, hole.file, hole.last, unknown=True)

    def _damage(self, replica: ReplicaId, file: JournalFile | None, last: int, *, unknown: bool) -> None:
        if file is not None:
            file.last[replica] = max(last, file.last.get(replica, 0))
        self._unknown[replica] = unknown or self._unknown.get(replica, False)
