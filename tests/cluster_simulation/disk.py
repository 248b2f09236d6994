"""The disks of the simulated machines: what of a file survives a power cut, and how a disk is damaged.

A journal's writes reach the disk when their sync has returned (SimulatedDisk). A power cut loses each write that is not
covered by one, altogether or sector by sector, whatever the order; also the group that is on its way in that moment.

LMDB syncs within each commit, and everything that works for a thread happens in one moment of virtual time, either when
it was asked for or when it ends (loop.py): so a cut finds a commit made or not made, as its sync promises. What LMDB's
pages, new names and the object store's files look like in the middle of one is shown on the system calls of real
processes (tests/faults/power.py), which this does not repeat.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from blockstore.storage.journal import Journal, Recovered
from blockstore.storage.journal_disk import Disk
from blockstore.storage.tables import FILE_NAME
from blockstore.units import MIB
from tests.cluster_simulation.processes import CURRENT, Process

SECTOR: Final = 512
#: So small that files are reused all the time.
JOURNAL_FILE_BYTES: Final = 4 * MIB
#: LMDB's header of a page with a block's head, and what follows in that page.
_PAGE, _HEADER = 4096, 16
#: How many rot at once.
_BAD_BLOCKS: Final = 1, 8, 64


class PowerLost(OSError):
    """The machine's power went before the sync returned."""


@dataclass(frozen=True, slots=True)
class _Write:
    path: str
    offset: int
    before: bytes
    data: bytes


class SimulatedDisk(Disk):
    """One process's journal: knows what no sync has covered yet."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._unsynced: dict[int, list[_Write]] = {}
        self.powered = True

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        data = b"".join(buffers)
        before = os.pread(fd, len(data), offset)
        super().write(fd, buffers, offset)
        path = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), self._directory)
        self._unsynced.setdefault(os.fstat(fd).st_ino, []).append(_Write(path, offset, before, data))

    def sync(self, fd: int) -> None:
        if not self.powered:
            raise PowerLost(5, "the power is gone")
        self._unsynced.pop(os.fstat(fd).st_ino, None)

    def allocate(self, fd: int, size_bytes: int) -> None:
        """The zeroes of a new file are written and synced in one moment."""
        room = os.fstatvfs(fd)
        if room.f_bavail * room.f_frsize < size_bytes:
            raise OSError(28, os.strerror(28))
        os.posix_fallocate(fd, 0, size_bytes)

    def lose(self, left: Path, random: Random) -> int:
        """Take from `left`, a copy of the directory, what is lost of the writes that no sync covered: how many are."""
        lost = 0
        everything = random.random() < 0.3
        for write in (each for writes in self._unsynced.values() for each in reversed(writes)):
            path = left / write.path
            if path.exists() and (everything or random.random() < 0.5):
                _take_back(path, write, None if everything else random)
                lost += 1
        return lost


def _take_back(path: Path, write: _Write, random: Random | None) -> None:
    """All of it, or with `random` some of its sectors."""
    with path.open("r+b") as file:
        for at in range(0, len(write.data), SECTOR):
            if random is None or random.random() < 0.5:
                os.pwrite(file.fileno(), write.before[at : at + SECTOR], write.offset + at)


class SimulatedJournal(Journal):
    """Journals are opened on such a disk."""

    @classmethod
    def open(cls, directory: Path, **options: Any) -> tuple[Journal, Recovered]:
        process = CURRENT.get()
        assert process is not None
        disk = SimulatedDisk(process.directory)
        process.disks.append(disk)
        return super().open(directory, disk=disk, file_bytes=JOURNAL_FILE_BYTES, **options)


def lose_power(process: Process, left: Path, random: Random) -> int:
    """What it had not synced is gone from `left`, the copy of its directory; how many writes that took.

    Whatever happened until now was in the journal's group that is under way, or is synced.
    """
    return sum(disk.lose(left, random) for disk in process.disks)


def rot(directory: Path, random: Random) -> bool:
    """Flip a bit of a stopped node's data: of blocks in some replica's tables, or of its journal.

    Tells whether it is in the journal. Other pages of LMDB's are left alone: a bad one may end the process,
    and all are one here (tests/test_node_broken_tables.py does that).
    """
    blocks = [(path, at) for path in sorted(directory.glob(f"replicas/*/{FILE_NAME}")) for at in _block_pages(path)]
    if blocks and random.random() < 0.7:
        hit = random.sample(blocks, min(len(blocks), random.choice(_BAD_BLOCKS)))
        for path, page in hit:
            _flip(path, page + random.randrange(_HEADER, _PAGE), random)
        return False
    journals = sorted(directory.glob("journal/journal-*"))
    used = [(path, size) for path in journals if (size := len(path.read_bytes().rstrip(b"\0")))]
    if used:
        path, size = random.choice(used)
        _flip(path, random.randrange(size), random)
    return bool(used)


def _flip(path: Path, at: int, random: Random) -> None:
    with path.open("r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte ^ 1 << random.randrange(8)]), at)


def _block_pages(path: Path) -> list[int]:
    """Where pages are that hold a block as tests here fill it: one number again and again."""
    content = path.read_bytes()
    found = []
    for page in range(0, len(content) - _PAGE + 1, _PAGE):
        number = content[page + _HEADER : page + _HEADER + 8]
        if any(number) and content[page + _HEADER : page + _PAGE] == number * ((_PAGE - _HEADER) // 8):
            found.append(page)
    return found
