"""The node's journal: one append-only log, shared by its replicas, and the truth between checkpoints.

All that is waiting goes out as one numbered group: one write, one fdatasync, into preallocated
files of one size that are reused. A file is released once the synced tables of each replica reflect
all that it holds of them, oldest first, and reused only when a new one is needed, so that peers can
catch up from it until then. See journal_format for the bytes, journal_start and journal_replay for
what a start does.

Invariants: a group is written only after the one before it is synced; nothing is acknowledged
before its sync has returned; a file's header is durable before its first group is written. JournalFull
is raised before anything is written. After a failed write or sync nothing is tried again: every
later call raises JournalFailed, and the process must stop. Source: docs/architecture.md, a node's storage.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Final

from blockstore import units
from blockstore.domain import Position, ReplicaId
from blockstore.errors import InvalidRequest
from blockstore.log import EntryKind, LogEntry, TruncateEntry, encode_entry
from blockstore.metrics import Durations
from blockstore.record import Record
from blockstore.storage.journal_chain import JournalFile, file_path
from blockstore.storage.journal_disk import Disk, JournalFailed, JournalFull, create_file, open_file
from blockstore.storage.journal_format import (
    FIRST_OFFSET,
    MAX_GROUP_BYTES,
    MAX_GROUP_ENTRIES,
    MAX_REPLICA_NAME,
    PAGE,
    Draft,
    FileHeader,
    FileKind,
)
from blockstore.storage.journal_index import Place
from blockstore.storage.journal_read import joined, read_run
from blockstore.storage.journal_start import LogState, Recovered, new_salt, released, start, write_header
from blockstore.storage.journal_verify import JournalProblem, verify_journal
from blockstore.units import MIB
from blockstore.values import value

__all__ = [
    "Journal",
    "JournalEntry",
    "JournalFailed",
    "JournalFull",
    "JournalProblem",
    "Recovered",
    "verify_journal",
]

FILE_BYTES: Final = 64 * MIB
MIN_FILES: Final = 2
"""One that is written to and one that a checkpoint can free."""
_RUNS_AT_ONCE: Final = 4
"""How many stretches of the journal one call of read_records takes in at most."""
#: For a group's header and tables, beside an eighth of what it holds.
_SLACK_BYTES: Final = 2 * PAGE
_DISK: Final = Disk()


@value
class JournalEntry:
    """One entry of one replica's log. position: the end of that log with it."""

    replica: ReplicaId
    entry: LogEntry
    position: Position


Encoded = tuple[JournalEntry, tuple[EntryKind, bytes | memoryview]]


class Journal:
    """The open journal. `append` belongs to one thread at a time; every other method may be called from any."""

    def __init__(
        self,
        directory: Path,
        disk: Disk,
        state: LogState,
        marks: Mapping[ReplicaId, int],
        *,
        max_files: int,
    ) -> None:
        """Use Journal.open."""
        self._directory = directory
        self._disk = disk
        self._state = state
        self._marks = dict(marks)
        self._max_files = max_files
        self._forgotten: set[ReplicaId] = set()
        self._failure: str | None = None
        self.groups = 0
        """Written since it was opened, and their bytes."""
        self.written_bytes = 0
        self.syncs = Durations()
        """Of fdatasync, one for each group."""
        self._reserved = 0
        """Free files that the append under way will begin."""
        self._lock = threading.Lock()
        self._allocation = threading.Lock()
        """Held while a new file is made, and taken before _lock."""

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        max_bytes: int,
        marks: Mapping[ReplicaId, int],
        file_bytes: int = FILE_BYTES,
        disk: Disk = _DISK,
        make_room: Callable[[], bool] = lambda: False,
    ) -> tuple["Journal", Recovered]:
        """Read the log back and make it durable, before anything is answered.

        max_bytes: what the files may take together (at least MIN_FILES files; a start may add one above
        that, and so may a submission that is larger). marks: of each replica here, the number of the last
        entry that its synced tables reflect; entries of others are dropped. make_room: asked once where the
        disk has no room for the file that a start may need; True if there may be some now. Raises
        JournalFull where there is none, JournalFailed where it cannot be written or read, Corrupt where
        files contradict one another.
        """
        if file_bytes % PAGE or file_bytes < FIRST_OFFSET + PAGE:
            raise InvalidRequest(
                f"journal files of {file_bytes} bytes: needs a multiple of {PAGE} above {FIRST_OFFSET}"
            )
        try:
            if not directory.exists():
                directory.mkdir()
                disk.sync_directory(directory.parent)
            try:
                state, recovered = start(directory, disk, marks, file_bytes)
            except JournalFull:
                if not make_room():
                    raise
                state, recovered = start(directory, disk, marks, file_bytes)
        except OSError as error:
            raise JournalFailed(f"cannot start the journal in {directory}: {error}") from error
        max_files = max(MIN_FILES, max_bytes // file_bytes)
        journal = cls(directory, disk, state, marks, max_files=max_files)
        journal._remove(journal._take_excess())
        return journal, recovered

    def append(self, entries: Sequence[JournalEntry]) -> int:
        """Make the entries durable, in order; blocks. Returns the number of the last one.

        They share a group as far as MAX_GROUP_BYTES and MAX_GROUP_ENTRIES allow; a truncate entry never
        ends one before the entry that follows it. Raises JournalFull before anything is written,
        InvalidRequest for an entry that fits no group, JournalFailed.
        """
        self._check()
        drafts = list(self._drafts(entries))
        try:
            self._make_room(drafts)
            for draft in drafts:
                self._write(draft)
        except (OSError, JournalFailed) as error:
            self._failure = str(error)
            raise JournalFailed(f"the journal in {self._directory} cannot be written: {error}") from error
        return self.last

    def has_room_for(self, size_bytes: int) -> bool:
        """Whether an append of so many bytes of records makes no file, which takes long; for who calls append."""
        state = self._state
        needed = size_bytes + size_bytes // 8 + _SLACK_BYTES
        return bool(state.free) or state.offset + needed <= state.active.size_bytes

    def prepare(self) -> bool:
        """Make the file that the next append to need one would have to make itself; blocks, in any thread.

        Filling 64 MiB with zeroes takes a disk a fifth of a second. True where one was made; False where one
        is free already or the limit allows none. Raises JournalFull where the disk has no room.
        """
        self._check()
        with self._allocation:
            if self._state.free or len(self._state.all_files) >= self._max_files:
                return False
            try:
                self._add_file()
            except JournalFailed as error:
                self._failure = str(error)
                raise
        return True

    def release(self, replica: ReplicaId, mark: int) -> bool:
        """The replica's synced tables reflect all up to entry `mark`. True where a file became free."""
        self._check()
        with self._lock:
            self._marks[replica] = max(mark, self._marks.get(replica, 0))
            return self._free_files()

    def forget(self, replica: ReplicaId) -> bool:
        """The replica was deleted, and its id is never used again. True where a file became free."""
        self._check()
        with self._lock:
            self._forgotten.add(replica)
            self._marks.pop(replica, None)
            self._state.last_numbers.pop(replica, None)
            self._state.index.drop(replica)
            for file in self._state.files:
                file.last.pop(replica, None)
            return self._free_files()

    def laggards(self) -> tuple[ReplicaId, ...]:
        """Whose checkpoint would free the oldest file; none where only the file that is written to is in use."""
        self._check()
        with self._lock:
            oldest = self._state.files[0]
            if oldest is self._state.active:
                return ()
            return tuple(replica for replica, number in oldest.last.items() if self._marks.get(replica, 0) < number)

    def read_records(
        self, replica: ReplicaId, after: units.Sequence, up_to: units.Sequence, limit_bytes: int
    ) -> list[Record] | None:
        """The replica's records from after + 1 to up_to at most, without a gap, for a peer that catches up.

        At least one, and then as many as limit_bytes of encoding allow and a few reads bring: the caller
        asks again from where they end. None where the one at after + 1 is not held, or can no longer be
        read; an empty list where up_to is not above `after`.
        """
        self._check()
        if up_to <= after:
            return []
        with self._lock:
            runs = self._state.index.find(replica, after, up_to)
        if runs is None:
            return None
        try:
            found = joined((r for run in runs[:_RUNS_AT_ONCE] for r in read_run(run, replica)), after, limit_bytes)
        except FileNotFoundError:
            return None
        return found or None

    @property
    def last(self) -> int:
        """The number of the last durable entry, 0 before the first."""
        return self._state.next_entry - 1

    @property
    def size_bytes(self) -> int:
        """What the files take on disk."""
        with self._lock:
            return sum(file.size_bytes for file in self._state.all_files)

    @property
    def free_bytes(self) -> int:
        """What can be appended before a checkpoint is needed, if the disk has room for new files."""
        with self._lock:
            state = self._state
            new = max(0, self._max_files - len(state.all_files)) * state.file_bytes
            return state.active.size_bytes - state.offset + sum(file.size_bytes for file in state.free) + new

    def close(self) -> None:
        """Let the files go; what was appended is durable already. Every later call fails."""
        if self._failure is None:
            self._failure = "it was closed"
        if self._state.fd >= 0:
            os.close(self._state.fd)
            self._state.fd = -1

    def _check(self) -> None:
        if self._failure is not None:
            raise JournalFailed(f"the journal in {self._directory} takes nothing more: {self._failure}")

    def _drafts(self, entries: Sequence[JournalEntry]) -> Iterator[Draft]:
        """The entries as groups, none larger than a group and a file allow."""
        limit = min(MAX_GROUP_BYTES, self._state.file_bytes - FIRST_OFFSET)
        before = dict(self._state.last_numbers)
        draft = Draft(self._state.next_group, self._state.next_entry, self._state.items)
        for together in _inseparable(entries):
            count, size = len(together), sum(len(payload) for _, (_, payload) in together)
            too_many = len(draft.payloads) + count > MAX_GROUP_ENTRIES
            if draft.payloads and (too_many or draft.size_with(size, count) > limit):
                yield draft
                before.update((item.replica, item.number) for item in draft.items)
                draft = Draft(draft.number + 1, draft.first_entry + len(draft), draft.items)
            if not draft.payloads and draft.size_with(size, count) > limit:
                raise InvalidRequest(f"a journal group of {draft.size_with(size, count)} bytes: at most {limit} fit")
            for entry, payload in together:
                draft.add(entry.replica, entry.entry, entry.position, payload, before.get(entry.replica, 0))
        if draft.payloads:
            yield draft

    def _make_room(self, drafts: Sequence[Draft]) -> None:
        """Have as many free files as these groups will begin. Raises JournalFull, JournalFailed.

        The limit on files yields where no checkpoint could free one: a submission larger than the
        whole journal must not wait for ever.
        """
        state = self._state
        offset, file_bytes, needed = state.offset, state.active.size_bytes, 0
        for draft in drafts:
            size = draft.size_bytes
            if offset + size > file_bytes:
                offset, file_bytes, needed = FIRST_OFFSET, state.file_bytes, needed + 1
            offset += size
        with self._lock:
            self._reserved = needed
        while len(state.free) < needed:
            with self._allocation:
                if len(state.free) >= needed:
                    return
                if len(state.all_files) >= self._max_files and len(state.files) > 1:
                    raise JournalFull(
                        f"the journal's {self._max_files} files are full: a checkpoint of {len(self.laggards())} "
                        "replicas frees the oldest"
                    )
                self._add_file()

    def _add_file(self) -> None:
        """A new free file; under the allocation lock."""
        state = self._state
        path = file_path(self._directory, state.next_slot)
        create_file(self._disk, path, state.file_bytes)
        with self._lock:
            state.next_slot += 1
            state.free.appendleft(JournalFile(path, state.file_bytes, None))

    def _write(self, draft: Draft) -> None:
        state, size = self._state, draft.size_bytes
        if state.offset + size > state.active.size_bytes:
            self._next_file()
        place = state.active.place
        assert place is not None
        buffers = draft.encode(place.salt)
        self._disk.write(state.fd, buffers, state.offset)
        began = perf_counter()
        self._disk.sync(state.fd)
        self.syncs.add(perf_counter() - began)
        self.groups += 1
        self.written_bytes += size
        with self._lock:
            self._appended(draft, place, state.offset + size)

    def _appended(self, draft: Draft, place: Place, end: int) -> None:
        """The group is on the disk: from here on it counts."""
        state = self._state
        items = draft.items
        known = tuple(item for item in items if item.replica not in self._forgotten)
        state.index.add(known, place, state.offset, end)
        for item in known:
            state.active.last[item.replica] = state.last_numbers[item.replica] = item.number
        state.items = items
        state.offset = end
        state.next_group = draft.number + 1
        state.next_entry = draft.first_entry + len(draft)

    def _next_file(self) -> None:
        """Begin a free file; its header is durable before a group is written behind it."""
        state = self._state
        with self._lock:
            excess = self._take_excess()
            file = state.free.popleft()
            self._reserved -= 1
            if file.place is not None:
                state.index.drop_place(file.place)
            assert file.path is not None
            state.newest += 1
            header = FileHeader(
                FileKind.LOG, state.newest, new_salt(), state.next_group, state.next_entry, state.next_group - 1,
                state.next_entry - 1, state.active.incarnation, state.offset, state.oldest,
            )  # fmt: skip
            file.header, file.place, file.last = header, Place(file.path, header.salt), {}
        os.close(state.fd)
        state.fd = -1
        state.fd = open_file(file.path)
        write_header(self._disk, state.fd, header)
        with self._lock:
            state.files.append(file)
            state.offset = FIRST_OFFSET
            self._free_files()
        self._remove(excess)

    def _free_files(self) -> bool:
        """Release what nobody needs any more, oldest first."""
        state = self._state
        before = len(state.files)
        while state.files[0] is not state.active and released(state.files[0], self._marks):
            state.discard([state.files.pop(0)])
        return len(state.files) < before

    def _take_excess(self) -> list[JournalFile]:
        """The files above the limit or of another size; they go once a header that comes later is durable.

        Until then the newest header may name them as needed, and a start would miss them.
        """
        state = self._state
        excess, state.surplus = state.surplus, []
        while len(state.all_files) > self._max_files and len(state.free) > self._reserved:
            excess.append(state.free.popleft())
        return excess

    def _remove(self, files: Sequence[JournalFile]) -> None:
        for file in files:
            assert file.path is not None
            file.path.unlink()
            if file.place is not None:
                with self._lock:
                    self._state.index.drop_place(file.place)


def _inseparable(entries: Sequence[JournalEntry]) -> Iterator[list[Encoded]]:
    """The entries, encoded, in runs that must share a group: a truncation and what replaces the tail."""
    together: list[Encoded] = []
    for entry in entries:
        if len(entry.replica) > MAX_REPLICA_NAME:
            raise InvalidRequest(f"{entry.replica!r} is no replica id: it has more than {MAX_REPLICA_NAME} letters")
        together.append((entry, encode_entry(entry.entry)))
        if not isinstance(entry.entry, TruncateEntry):
            yield together
            together = []
    if together:
        yield together
