"""The journal's way to the disk: every write, sync and allocation passes here.

One small class, so that a test can record what reaches the disk and in which order, or make a call
fail, while the journal above it runs as it is. Invariants: a new file is allocated and filled with
zeroes, and both it and its directory entry are synced, before it is used; so a later fdatasync of
it has no metadata to write. No error is retried.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from blockstore.errors import CairnError, NoSpace
from blockstore.storage.space import NO_ROOM
from blockstore.units import MIB

_ZEROES: Final = bytes(MIB)


class JournalFull(NoSpace):
    """No file has room and none can be added: nothing was written, and a checkpoint helps."""


class JournalFailed(CairnError):
    """A write or sync failed, so nothing is known of what the disk holds: the process must stop."""


class Disk:
    """The calls themselves. All raise OSError."""

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """All of the buffers in one call; a short write is an error."""
        size = sum(map(len, buffers))
        written = os.pwritev(fd, buffers, offset)
        if written != size:
            raise OSError(errno.EIO, f"a write of {size} bytes at {offset} ended after {written}")

    def sync(self, fd: int) -> None:
        """The file's content, on the disk."""
        os.fdatasync(fd)

    def allocate(self, fd: int, size_bytes: int) -> None:
        """Room for the whole of a new file, written once, on the disk with its metadata."""
        room = os.fstatvfs(fd)
        # Asked first: a try that fills the disk fails the writes of others before it is undone.
        if room.f_bavail * room.f_frsize < size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(fd, 0, size_bytes)
        for offset in range(0, size_bytes, len(_ZEROES)):
            self.write(fd, [_ZEROES[: size_bytes - offset]], offset)
        os.fsync(fd)

    def sync_directory(self, directory: Path) -> None:
        """The directory's entries, on the disk."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def create_file(disk: Disk, path: Path, size_bytes: int) -> None:
    """A new file of zeroes that survives a crash.

    Raises JournalFull where the disk has no room, and leaves no file then; JournalFailed otherwise.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            disk.allocate(fd, size_bytes)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)
        disk.sync_directory(path.parent)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise JournalFull(f"no room for a journal file of {size_bytes} bytes at {path}: {error}") from error
        raise JournalFailed(f"cannot make the journal file {path}: {error}") from error


def open_file(path: Path) -> int:
    """A descriptor for reading and writing. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)
