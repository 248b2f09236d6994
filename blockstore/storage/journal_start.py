"""A start: read the log back, make its end durable, and begin a file behind it.

What was read may only have been in the page cache, so the last group is written anew, into a file
that is not part of the log, and synced; then that file's header, which makes it the log's newest
file and says where the log before it ends. Whatever lies beyond is ignored from then on. Where the
newest file holds little, all of it moves, and that file is free at once: starting again and again
takes no room. A file that was used before is first made SPARE, durably, so that a crash half-way
leaves the log as it was.

The one start that damages nobody and copies nothing is the first. Where the log has lost its end
(a header that is bad in both copies, a mark beyond the last entry), every replica is damaged; a
file that does not exist is named as the one before, so that later starts know it too.
"""

import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from blockstore.domain import Position, ReplicaId
from blockstore.log import LogEntry
from blockstore.storage.journal_chain import Chain, JournalFile, file_path, read_chain, slot_of
from blockstore.storage.journal_disk import Disk, create_file, open_file
from blockstore.storage.journal_format import (
    FIRST_OFFSET,
    FileHeader,
    FileKind,
    Items,
    checksum,
    encode_file_header,
    encode_group_header,
)
from blockstore.storage.journal_index import Place, RecordIndex
from blockstore.storage.journal_read import FoundGroup, read_body
from blockstore.storage.journal_replay import LogEnd, Replay

COPY_SHARE: Final = 4
"""A start moves a newest file whole where it holds at most this fraction of a file: 16 MiB of 64, 0.1 s."""


@dataclass
class Recovered:
    """What a start found: entries after each replica's mark, in order; floors of those that lost some."""

    entries: dict[ReplicaId, list[LogEntry]]
    damaged: dict[ReplicaId, Position]
    last: int


@dataclass
class LogState:
    """The log as the running journal holds it.

    files: the log's files that are still needed, oldest first; the last is written to, through fd, from
    `offset` on. free: files of file_bytes to reuse, in this order; those released last still serve peers.
    surplus: files to remove once a header says that they are not needed. items: of the last group, None
    where they are not known.
    """

    files: list[JournalFile]
    file_bytes: int
    index: RecordIndex
    last_numbers: dict[ReplicaId, int]
    next_group: int
    next_entry: int
    items: Items | None
    newest: int
    next_slot: int
    fd: int = -1
    offset: int = FIRST_OFFSET
    free: deque[JournalFile] = field(default_factory=deque)
    surplus: list[JournalFile] = field(default_factory=list)

    @property
    def active(self) -> JournalFile:
        return self.files[-1]

    @property
    def oldest(self) -> int:
        """The incarnation of the oldest file that is still needed."""
        return self.files[0].incarnation

    @property
    def all_files(self) -> list[JournalFile]:
        """Every file there is, in use or free."""
        return [file for file in (*self.files, *self.free, *self.surplus) if file.path is not None]

    def discard(self, files: Iterable[JournalFile]) -> None:
        """Nobody needs these any more."""
        for file in files:
            if file.size_bytes == self.file_bytes:
                self.free.append(file)
            elif file.path is not None:
                self.surplus.append(file)


@dataclass(frozen=True)
class _Plan:
    """What the new file takes over: groups to copy, and what its header says about the log before it."""

    copies: tuple[FoundGroup, ...]
    first_group: int
    first_entry: int
    previous: int
    previous_end: int
    replaced: tuple[JournalFile, ...] = ()
    bodies: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def size_bytes(self) -> int:
        return FIRST_OFFSET + sum(group.header.size_bytes for group in self.copies)


def released(file: JournalFile, marks: Mapping[ReplicaId, int]) -> bool:
    """Whether the tables of everybody concerned reflect all that the file holds of them."""
    return all(marks.get(replica, 0) >= number for replica, number in file.last.items())


def start(directory: Path, disk: Disk, marks: Mapping[ReplicaId, int], file_bytes: int) -> tuple[LogState, Recovered]:
    """Replay the log, and begin a new file. Raises OSError, Corrupt, JournalFull."""
    chain = read_chain(directory)
    replay = Replay(chain, marks)
    end = replay.run()
    highest_mark = max(marks.values(), default=0)
    lost_end = bool(chain.unreadable) or highest_mark >= end.next_entry or (chain.lost and not chain.files)
    if lost_end:
        end = replay.lose_end(max(end.next_entry, highest_mark + 1) + 1)
    plan = _plan(chain, end, lost_end, file_bytes // COPY_SHARE)
    state = _state(chain, replay, end, plan, file_bytes)
    file = _pick_file(directory, disk, state, plan.size_bytes)
    _begin(state, disk, file, plan)
    disk.sync_directory(directory)
    state.discard((*plan.replaced, *chain.unreadable))
    return state, Recovered(replay.entries, replay.damaged, end.next_entry - 1)


def write_header(disk: Disk, fd: int, header: FileHeader) -> None:
    """Both copies, on the disk."""
    disk.write(fd, [encode_file_header(header)], 0)
    disk.sync(fd)


def new_salt() -> int:
    """What seeds the checksums of one life of a file; nobody can have written it before."""
    return int.from_bytes(os.urandom(8), "little")


def _plan(chain: Chain, end: LogEnd, lost_end: bool, copy_limit: int) -> _Plan:
    if lost_end:
        return _Plan((), end.next_group, end.next_entry, chain.newest + 1, 0, tuple(chain.files))
    if not chain.files:
        return _Plan((), end.next_group, end.next_entry, 0, 0)
    newest = chain.files[-1]
    header = newest.header
    assert header is not None
    size = sum(group.header.size_bytes for group in end.groups)
    small = end.whole and (size <= copy_limit or len(end.groups) == 1)
    moved = _bodies(newest, end.groups) if small else None
    if moved is not None:
        return _Plan(
            end.groups, header.first_group, header.first_entry, header.previous, header.previous_end, (newest,), moved
        )
    last = end.groups[-1:]
    moved = _bodies(newest, last)
    if last and moved is not None:
        first = last[0].header
        return _Plan(last, first.number, first.first_entry, newest.incarnation, last[0].offset, bodies=moved)
    return _Plan((), end.next_group, end.next_entry, newest.incarnation, end.offset)


def _bodies(file: JournalFile, groups: tuple[FoundGroup, ...]) -> tuple[bytes, ...] | None:
    """The bodies of these groups; None where one that no replica needs any more is bad."""
    assert file.path is not None
    assert file.header is not None
    with open(file.path, "rb", buffering=0) as opened:
        bodies = [read_body(opened.fileno(), group, file.header.salt) for group in groups]
    return tuple(body for body in bodies if body is not None) if None not in bodies else None


def _state(chain: Chain, replay: Replay, end: LogEnd, plan: _Plan, file_bytes: int) -> LogState:
    """The log's files before the new one: those still needed, and those that may be reused."""
    needed = [file for file in chain.files if file not in plan.replaced]
    unneeded = [file for file in chain.others if file not in chain.unreadable]
    while needed and released(needed[0], replay.marks):
        unneeded.append(needed.pop(0))
    missing = _missing_file(chain, replay, end, plan)
    if missing is not None:
        needed.insert(0, missing)
    slots = [slot_of(file.path) or 0 for file in (*chain.files, *chain.others) if file.path]
    state = LogState(
        needed, file_bytes, replay.index, replay.last_numbers, end.next_group, end.next_entry, end.items,
        chain.newest, max(slots, default=0) + 1,
    )  # fmt: skip
    state.discard(unneeded)
    return state


def _missing_file(chain: Chain, replay: Replay, end: LogEnd, plan: _Plan) -> JournalFile | None:
    """What stands for a file that the log has lost, until everybody whom that damaged has a checkpoint behind it."""
    if not chain.files or plan.previous > chain.newest:
        incarnation, last = plan.previous, end.next_entry - 1
    elif chain.lost and chain.files[0].header is not None:
        incarnation, last = chain.files[0].header.previous, chain.files[0].header.first_entry - 1
    else:
        return None
    concerned = {replica: last for replica in replay.damaged if replay.marks[replica] < last}
    header = FileHeader(FileKind.LOG, incarnation, 0, 0, 0, 0, 0, 0, 0, 0)
    return JournalFile(None, 0, header, concerned) if concerned else None


def _pick_file(directory: Path, disk: Disk, state: LogState, needed_bytes: int) -> JournalFile:
    """A file that is not part of the log, marked so durably; a new one where there is none, whatever the limit."""
    if needed_bytes > state.file_bytes or not state.free:
        size_bytes = max(needed_bytes, state.file_bytes)
        path = file_path(directory, state.next_slot)
        create_file(disk, path, size_bytes)
        state.next_slot += 1
        return JournalFile(path, size_bytes, None)
    file = state.free.popleft()
    assert file.path is not None
    state.newest += 1
    oldest = state.oldest if state.files else state.newest
    fd = open_file(file.path)
    try:
        write_header(disk, fd, FileHeader(FileKind.SPARE, state.newest, 0, 0, 0, 0, 0, 0, 0, oldest))
    finally:
        os.close(fd)
    return file


def _begin(state: LogState, disk: Disk, file: JournalFile, plan: _Plan) -> None:
    """Write the copies, then the header that makes the file the log's newest."""
    assert file.path is not None
    for place in filter(None, (file.place, *(replaced.place for replaced in plan.replaced))):
        state.index.drop_place(place)
    incarnation = max(state.newest, plan.previous) + 1
    salt = new_salt()
    file.place, file.last = Place(file.path, salt), {}
    state.fd = open_file(file.path)
    for group, body in zip(plan.copies, plan.bodies, strict=True):
        header = replace(group.header, body_checksum=checksum((body,), salt))
        padding = b"\0" * (header.size_bytes - header.header_size - header.body_size)
        disk.write(state.fd, [encode_group_header(header, salt), body, padding], state.offset)
        known = tuple(item for item in header.items if item.replica in state.last_numbers)
        state.index.add(known, file.place, state.offset, state.offset + header.size_bytes)
        file.last.update((item.replica, item.number) for item in known)
        state.offset += header.size_bytes
    disk.sync(state.fd)
    file.header = FileHeader(
        FileKind.LOG, incarnation, salt, plan.first_group, plan.first_entry, state.next_group - 1,
        state.next_entry - 1, plan.previous, plan.previous_end, state.oldest if state.files else incarnation,
    )  # fmt: skip
    state.files.append(file)
    state.newest = incarnation
    write_header(disk, state.fd, file.header)
