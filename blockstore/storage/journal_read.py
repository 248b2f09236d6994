"""Reading groups back: one header, one body, the next header behind rot, a replica's records.

Nothing here changes a file. What fails its checksum is never given out; a sector that the disk
cannot read counts as one that fails it.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from blockstore.domain import ReplicaId
from blockstore.log import EntryKind
from blockstore.record import Record, decode_record
from blockstore.storage.journal_format import (
    FIRST_OFFSET,
    PAGE,
    FileHeader,
    GroupHeader,
    checksum,
    decode_file_header,
    decode_group_header,
    group_header_size,
    stored_entries,
)
from blockstore.storage.journal_index import Run
from blockstore.units import MIB

_WINDOW: Final = MIB
"""How much a search for the next group reads at once."""
_PEEK: Final = 64
"""Enough of a page to see whether a group may start there."""


@dataclass(frozen=True, slots=True)
class FoundGroup:
    """A header that passes its checksum, and where it lies in its file."""

    header: GroupHeader
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.header.size_bytes


@dataclass(frozen=True, slots=True)
class HeaderCopies:
    """Both copies of a file's header, None where there is none; bad: how many were written and are not whole."""

    copies: tuple[FileHeader | None, FileHeader | None]
    bad: int

    @property
    def newest(self) -> FileHeader | None:
        """The one that counts: a crash may have left one of them in the life before."""
        return max(filter(None, self.copies), key=lambda header: header.incarnation, default=None)


def read_at(fd: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes; none where the disk cannot read them. Raises OSError for anything else."""
    try:
        return os.pread(fd, size, offset)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""


def read_file_header(fd: int) -> HeaderCopies:
    """The header of an open file. Raises Corrupt for a format we do not know."""
    pages = read_at(fd, PAGE, 0), read_at(fd, PAGE, PAGE)
    copies = decode_file_header(pages[0]), decode_file_header(pages[1])
    bad = [page for page, copy in zip(pages, copies, strict=True) if copy is None and page.strip(b"\0")]
    return HeaderCopies(copies, len(bad))


def read_group_header(fd: int, offset: int, salt: int) -> FoundGroup | None:
    """The group that starts at this offset, if one does."""
    start = read_at(fd, PAGE, offset)
    size = group_header_size(start)
    if size is None:
        return None
    encoded = start[:size] if size <= len(start) else read_at(fd, size, offset)
    header = decode_group_header(encoded, salt) if len(encoded) == size else None
    return FoundGroup(header, offset) if header else None


def read_body(fd: int, group: FoundGroup, salt: int) -> bytes | None:
    """The group's body; None where it fails its checksum."""
    body = read_at(fd, group.header.body_size, group.offset + group.header.header_size)
    whole = len(body) == group.header.body_size and checksum((body,), salt) == group.header.body_checksum
    return body if whole else None


def groups_between(fd: int, salt: int, end: int, start: int = FIRST_OFFSET) -> Iterator[FoundGroup]:
    """The groups from `start` on that begin before `end`, in order; what is bad between them is passed over."""
    offset: int | None = start
    while offset is not None and offset < end:
        group = read_group_header(fd, offset, salt)
        if group is not None:
            yield group
            offset = group.end
        else:
            offset = _next_candidate(fd, offset + PAGE, end)


def read_run(run: Run, replica: ReplicaId) -> Iterator[Record]:
    """The records of a run, in order; a group that can no longer be read is passed over.

    Raises FileNotFoundError where the file is gone.
    """
    with open(run.place.path, "rb", buffering=0) as file:
        for group in groups_between(file.fileno(), run.place.salt, run.end, run.start):
            body = read_body(file.fileno(), group, run.place.salt)
            if body is not None:
                yield from _records(group.header, body, replica, run)


def joined(records: Iterable[Record], after: int, limit_bytes: int) -> list[Record]:
    """The records from after + 1 on that follow one another, up to about limit_bytes of encoding; at least one."""
    taken: list[Record] = []
    size = 0
    for record in records:
        if record.sequence != after + 1 + len(taken) or (taken and size + len(record.encoded) > limit_bytes):
            break
        taken.append(record)
        size += len(record.encoded)
    return taken


def _records(header: GroupHeader, body: bytes, replica: ReplicaId, run: Run) -> list[Record]:
    """The replica's records of a group that belong to the run, without those that others in it replace."""
    records: list[Record] = []
    for entry in stored_entries(header, body):
        if entry.replica != replica:
            continue
        if entry.kind == EntryKind.FILLING:
            records.clear()
        if entry.kind == EntryKind.RECORD:
            record = decode_record(bytes(entry.payload), verify_blocks=False)
            while records and records[-1].sequence >= record.sequence:
                records.pop()
            records.append(record)
    return [record for record in records if run.first <= record.sequence <= run.last]


def _next_candidate(fd: int, start: int, end: int) -> int | None:
    """The first page from `start` on, before `end`, that begins like a group."""
    for window in range(start, end, _WINDOW):
        pages = read_at(fd, min(_WINDOW, end - window), window)
        if not pages:
            singly = (read_at(fd, PAGE, at) for at in range(window, min(window + _WINDOW, end), PAGE))
            pages = b"".join(page.ljust(PAGE, b"\0") for page in singly)
        for at in range(0, len(pages), PAGE):
            if group_header_size(pages[at : at + _PEEK]) is not None:
                return window + at
    return None
