"""What the journal's tests share: entries that look like a replica's, and disks that fail or lose power.

A PowerDisk does the real writes and keeps, beside them, what a power cut would leave: writes count
once their file is synced, a new file once its directory is. What was written and not synced may
be on the disk or not, sector by sector, in any order. The power is not really cut, so it leaves out the
real syncs, which keeps thousands of cuts quick.
"""

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockstore import units
from blockstore.domain import ORIGIN, Position, ReplicaId
from blockstore.log import Filling, FillingEntry, LogEntry, RecordEntry, SealEntry, TruncateEntry
from blockstore.record import Operation, OperationKind, Record, encode_record
from blockstore.storage.journal import Journal, JournalEntry, Recovered
from blockstore.storage.journal_disk import Disk
from blockstore.units import BLOCK_SIZE, BlockNumber, Epoch, Generation

SECTOR = 512
FILE_BYTES = 64 * 1024
"""Fourteen pages for groups: small enough that tests pass through many files."""
LOTS = 64 * FILE_BYTES
"""A limit that no test comes near."""


def replica(number: int) -> ReplicaId:
    return ReplicaId(f"rep-{number:017x}")


def position(epoch: int, sequence: int) -> Position:
    return Position(Epoch(epoch), units.Sequence(sequence))


def make_record(at: Position, previous: Position, blocks: int = 0, fill: bytes = b"x") -> Record:
    """A record that writes `blocks` blocks, or one that zeroes a range."""
    data = (fill * BLOCK_SIZE)[:BLOCK_SIZE] * blocks
    kind = OperationKind.WRITE if blocks else OperationKind.ZERO
    operation = Operation(kind, BlockNumber(at.sequence), blocks or 3, data)
    return encode_record(at, previous, Generation(1), 1, [operation])


def sequence(number: int) -> units.Sequence:
    return units.Sequence(number)


@dataclass
class ReplicaLog:
    """One replica's log as a follower would journal it; `records` is what the log holds now."""

    replica: ReplicaId
    epoch: int = 1
    records: list[Record] = field(default_factory=list)
    base: Position = ORIGIN

    @property
    def end(self) -> Position:
        return self.records[-1].position if self.records else self.base

    def write(self, blocks: int = 0) -> JournalEntry:
        at = position(self.epoch, self.end.sequence + 1)
        self.records.append(make_record(at, self.end, blocks, os.urandom(16)))
        return self._entry(RecordEntry(self.records[-1]))

    def seal(self) -> JournalEntry:
        self.epoch += 1
        return self._entry(SealEntry(Epoch(self.epoch), 1))

    def replace_tail(self, count: int, blocks: int = 0) -> list[JournalEntry]:
        """Cut the last `count` records; one of a newer epoch takes their place."""
        del self.records[len(self.records) - count :]
        self.epoch += 1
        cut = self._entry(TruncateEntry(self.end.sequence))
        return [cut, self.write(blocks)]

    def fill(self) -> JournalEntry:
        """Begin anew, behind a base that lies a little further."""
        floor = self.end
        self.base = position(self.epoch, floor.sequence + 2)
        self.records.clear()
        return self._entry(FillingEntry(Filling(floor, self.base, units.Sequence(0))))

    def _entry(self, entry: LogEntry) -> JournalEntry:
        return JournalEntry(self.replica, entry, self.end)


def reopen(
    directory: Path, marks: dict[ReplicaId, int], max_bytes: int = LOTS, disk: Disk | None = None
) -> tuple[Journal, Recovered]:
    """A start of the journal, with what it found; the marks are what each replica has checkpointed."""
    return Journal.open(directory, max_bytes=max_bytes, marks=marks, file_bytes=FILE_BYTES, disk=disk or Disk())


def read_all(journal: Journal, of: ReplicaId, after: int, up_to: int, limit_bytes: int = 9000) -> list[Record]:
    """What a peer that asks again and again gets."""
    found: list[Record] = []
    while piece := journal.read_records(of, sequence(after + len(found)), sequence(up_to), limit_bytes):
        found += piece
    return found


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


@dataclass(frozen=True)
class Written:
    """One write that no sync has covered yet."""

    name: str
    offset: int
    content: bytes


class CachedDisk(Disk):
    """The real writes; a test reads them back from the page cache, so nothing waits for the disk."""

    def sync(self, fd: int) -> None:
        """Nothing to wait for."""

    def sync_directory(self, directory: Path) -> None:
        """Nothing to wait for."""

    def allocate(self, fd: int, size_bytes: int) -> None:
        os.ftruncate(fd, size_bytes)


class PowerDisk(CachedDisk):
    """The real writes on one directory, and what a power cut after any of them would leave.

    durable: the files' content that is surely there. loose: writes that may or may not be, in order.
    unnamed: files whose directory entry may be missing. limit: the number of calls after which the
    process is gone (PowerCut).
    """

    def __init__(self, durable: dict[str, bytes] | None = None, limit: int | None = None) -> None:
        self.durable = {name: bytearray(content) for name, content in (durable or {}).items()}
        self.loose: list[Written] = []
        self.unnamed: set[str] = set()
        self.limit = limit
        self.calls = 0

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        content = b"".join(buffers)
        self.loose.append(Written(_name(fd), offset, content))
        self._count()
        super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._count()
        self._settle(_name(fd))

    def allocate(self, fd: int, size_bytes: int) -> None:
        name = _name(fd)
        self.durable[name] = bytearray()
        self.unnamed.add(name)
        self._count()
        super().allocate(fd, size_bytes)
        self.durable[name] = bytearray(size_bytes)

    def sync_directory(self, directory: Path) -> None:
        self._count()
        self.unnamed.clear()

    def images(self, chance: random.Random, torn: int) -> Iterable[dict[str, bytes]]:
        """What the disk may hold after a power cut now: nothing loose, all of it, and `torn` mixtures."""
        for keep in (0.0, 1.0, *(chance.random() for _ in range(torn))):
            image = {name: bytearray(content) for name, content in self.durable.items()}
            for written in self.loose:
                for at in range(0, len(written.content), SECTOR):
                    if chance.random() < keep:
                        part = written.content[at : at + SECTOR]
                        image[written.name][written.offset + at : written.offset + at + len(part)] = part
            lost = {name for name in self.unnamed if keep == 0.0}
            yield {name: bytes(content) for name, content in image.items() if name not in lost}

    def _settle(self, name: str) -> None:
        for written in self.loose:
            if written.name == name:
                content = self.durable[name]
                content[written.offset : written.offset + len(written.content)] = written.content
        self.loose = [written for written in self.loose if written.name != name]

    def _count(self) -> None:
        self.calls += 1
        if self.limit is not None and self.calls > self.limit:
            raise PowerCut


class PowerCut(BaseException):
    """The process is gone; nothing below catches this."""


def lay_out(directory: Path, image: dict[str, bytes]) -> Path:
    """A directory with these files in it, and no others."""
    directory.mkdir(exist_ok=True)
    for path in directory.iterdir():
        path.unlink()
    for name, content in image.items():
        (directory / name).write_bytes(content)
    return directory


def _name(fd: int) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
