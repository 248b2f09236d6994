"""A stopped node's journal, looked over offline: every needed file, header, list and body.

A torn last group is no problem: a crash leaves that behind, and the next start ignores it. Nothing is
changed, and no marks are needed; so a bad group that every replica's tables reflect is told as well.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blockstore.errors import Corrupt
from blockstore.log import decode_entry
from blockstore.storage.journal_chain import Chain, JournalFile, read_chain
from blockstore.storage.journal_format import FileHeader, stored_entries
from blockstore.storage.journal_read import FoundGroup, groups_between, read_body


@dataclass(frozen=True, slots=True)
class JournalProblem:
    """where: the file, or the journal's directory. what: what is wrong there."""

    where: Path
    what: str


def verify_journal(directory: Path) -> list[JournalProblem]:
    """All that is wrong with the journal in a directory; empty where it is sound. Raises OSError."""
    if not directory.is_dir():
        return [JournalProblem(directory, "the journal is missing")]
    try:
        chain = read_chain(directory)
    except Corrupt as error:
        return [JournalProblem(directory, str(error))]
    verifier = _Verifier(directory, chain)
    return [*verifier.headers(), *verifier.groups()]


class _Verifier:
    """One look over a chain; `expected` is the number of the group that must come next."""

    def __init__(self, directory: Path, chain: Chain) -> None:
        self._directory = directory
        self._chain = chain
        self._expected = 0

    def headers(self) -> Iterator[JournalProblem]:
        for file in self._chain.unreadable:
            yield self._problem(file, "both copies of the file's header are bad")
        for file in self._chain.half_bad:
            yield self._problem(file, "one of the two copies of the file's header is bad")
        if self._chain.lost:
            yield JournalProblem(self._directory, "a file of the log that was still needed is missing")

    def groups(self) -> Iterator[JournalProblem]:
        """Released files are left out: nobody needs what they hold."""
        for index, file in enumerate(self._chain.files):
            if file.incarnation >= self._chain.oldest and file.header is not None:
                self._expected = self._expected or file.header.first_group
                yield from self._file(index, file, file.header)

    def _file(self, index: int, file: JournalFile, header: FileHeader) -> Iterator[JournalProblem]:
        assert file.path is not None
        end, next_group = self._chain.end_of(index)
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            bad_last = None
            for group in groups_between(fd, header.salt, end):
                if next_group is not None and group.header.number >= next_group:
                    break
                if bad_last is not None:
                    yield bad_last
                yield from self._missing(file, group.header.number)
                bad_last = self._body(file, fd, group, header.salt)
                self._expected = group.header.number + 1
        finally:
            os.close(fd)
        if bad_last is not None and (next_group is not None or self._expected - 1 <= header.synced_group):
            yield bad_last
        yield from self._missing(file, next_group or header.synced_group + 1)

    def _missing(self, file: JournalFile, number: int) -> Iterator[JournalProblem]:
        """The groups expected before this number that did not come."""
        if number > self._expected:
            yield self._problem(file, f"groups {self._expected} to {number - 1} cannot be read")
            self._expected = number

    def _body(self, file: JournalFile, fd: int, group: FoundGroup, salt: int) -> JournalProblem | None:
        body = read_body(fd, group, salt)
        if body is None:
            return self._problem(file, f"group {group.header.number} at offset {group.offset} fails its checksum")
        try:
            for entry in stored_entries(group.header, body):
                decode_entry(entry.kind, bytes(entry.payload))
        except Corrupt as error:
            return self._problem(file, f"group {group.header.number} at offset {group.offset}: {error}")
        return None

    def _problem(self, file: JournalFile, what: str) -> JournalProblem:
        return JournalProblem(file.path or self._directory, what)
