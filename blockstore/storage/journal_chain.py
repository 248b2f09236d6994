"""Which files of the directory are the log, in which order, and where each of them ends.

Each file names the one before it, so the log is the walk back from the newest. Files that are not
on that walk hold nothing of it: never used, or replaced by a start, or half prepared by one. The
newest header of any kind says from which incarnation on files are still needed; a walk that breaks
off before it has reached that one has lost a file, and one that breaks off later has met a file
that was released and reused.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from blockstore.domain import ReplicaId
from blockstore.errors import Corrupt
from blockstore.storage.journal_format import FileHeader, FileKind
from blockstore.storage.journal_index import Place
from blockstore.storage.journal_read import HeaderCopies, read_file_header

_NAME: Final = re.compile(r"journal-([0-9]{6,})")


@dataclass(eq=False, slots=True)
class JournalFile:
    """One file of the directory, or (path None) one that is missing from the log.

    header: the one that counts, None where there is none. last: the number of each replica's last
    entry in it; the file is released once all of their tables reflect these.
    """

    path: Path | None
    size_bytes: int
    header: FileHeader | None
    last: dict[ReplicaId, int] = field(default_factory=dict)
    place: Place | None = None

    @property
    def incarnation(self) -> int:
        return self.header.incarnation if self.header else 0


@dataclass(frozen=True, slots=True)
class Chain:
    """The log's files, oldest first, and all others.

    lost: a file is missing before files[0]. unreadable: files whose header was written and is bad.
    half_bad: files of which one copy of the header is bad. newest: the highest incarnation seen.
    oldest: files from this incarnation on were needed when the newest header was written.
    """

    files: list[JournalFile]
    others: list[JournalFile]
    unreadable: list[JournalFile]
    half_bad: list[JournalFile]
    newest: int
    oldest: int
    lost: bool

    def end_of(self, index: int) -> tuple[int, int | None]:
        """Where the log leaves files[index]: the offset, and the number of the first group that lies elsewhere.

        For the newest file its size, and None.
        """
        if index + 1 == len(self.files):
            return self.files[index].size_bytes, None
        successor = self.files[index + 1].header
        assert successor is not None
        return successor.previous_end, successor.first_group

    def holding(self, group: int) -> JournalFile:
        """The file that this group lies in, or lay in."""
        return next(
            (file for file in reversed(self.files) if file.header and file.header.first_group <= group), self.files[0]
        )


def file_path(directory: Path, slot: int) -> Path:
    """The path of the file with this number; the numbers mean nothing else."""
    return directory / f"journal-{slot:06d}"


def slot_of(path: Path) -> int | None:
    """The reverse of file_path; None for a file that is none of ours."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def read_chain(directory: Path) -> Chain:
    """What the headers in a directory say. Raises Corrupt where they contradict one another, OSError."""
    files: list[JournalFile] = []
    unreadable: list[JournalFile] = []
    half_bad: list[JournalFile] = []
    for path in sorted(path for path in directory.iterdir() if slot_of(path) is not None):
        file, header = _read_file(path)
        files.append(file)
        if header.bad:
            (half_bad if file.header else unreadable).append(file)
    newest = max((file.header for file in files if file.header), key=lambda header: header.incarnation, default=None)
    if newest is None:
        return Chain([], files, unreadable, half_bad, 0, 0, False)
    log, lost = _walk_back(_by_incarnation(files), newest)
    others = [file for file in files if file not in log]
    return Chain(log, others, unreadable, half_bad, newest.incarnation, newest.oldest, lost)


def _read_file(path: Path) -> tuple[JournalFile, HeaderCopies]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = read_file_header(fd)
        size_bytes = os.fstat(fd).st_size
    finally:
        os.close(fd)
    return JournalFile(path, size_bytes, header.newest), header


def _by_incarnation(files: Iterable[JournalFile]) -> dict[int, JournalFile]:
    found: dict[int, JournalFile] = {}
    for file in files:
        if file.header and file.header.kind is FileKind.LOG:
            twin = found.setdefault(file.incarnation, file)
            if twin is not file:
                raise Corrupt(f"{twin.path} and {file.path} are copies of one journal file: move one of them away")
    return found


def _walk_back(files: dict[int, JournalFile], newest: FileHeader) -> tuple[list[JournalFile], bool]:
    """The log, oldest first, and whether it lacks a needed file before its first."""
    file = files.get(max(files, default=0))
    if file is None:
        return [], newest.oldest < newest.incarnation
    log = [file]
    while (header := log[-1].header) and (before := files.get(header.previous)):
        log.append(before)
    return log[::-1], log[-1].incarnation > newest.oldest
