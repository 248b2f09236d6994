"""Room on a node's disk: when to refuse writes, and what is kept back for finishing.

A ballast file holds `reserve_bytes`. The node calls itself full before the disk is: once what is free,
less what checkpoints still have to write, falls below the reserve. It stays full until twice the
reserve is free and the ballast is whole, so that it does not flap. A checkpoint or deletion that
finds no room all the same gives the ballast up, and goes on.
"""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from blockstore.durable_files import sync_path

#: What a full disk says: of the disk, of a quota, of a limit on the size of files.
NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
#: Full until this many times the reserve is free.
_RELIEF: Final = 2


def disk_free_bytes(directory: Path) -> int:
    """What an ordinary process may still write to the file system of `directory`."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


class SpaceGuard:
    """Watches the file system of `directory`, which holds the ballast. Thread-safe."""

    def __init__(
        self, directory: Path, reserve_bytes: int, free_bytes: Callable[[Path], int] = disk_free_bytes
    ) -> None:
        self._directory = directory
        self._ballast = directory / "ballast"
        self.reserve_bytes = reserve_bytes
        self._free_bytes = free_bytes
        self._lock = threading.Lock()
        self.full = False
        with self._lock:
            self._restore_ballast(_RELIEF * reserve_bytes)

    def poll(self, pending_bytes: int = 0) -> bool:
        """Look at the disk; whether writes must be refused, save by a replica that has room of its own.

        pending_bytes: what checkpoints still have to write.
        """
        with self._lock:
            free = self._free_bytes(self._directory) - pending_bytes
            if free < self.reserve_bytes:
                self.full = True
            elif free >= _RELIEF * self.reserve_bytes:
                self.full = not self._restore_ballast(free)
            return self.full

    def make_room(self) -> bool:
        """The disk is full: give up the ballast. False where there is none (left)."""
        with self._lock:
            self.full = True
            try:
                self._ballast.unlink()
            except FileNotFoundError:
                return False
            return self.reserve_bytes > 0

    def _restore_ballast(self, free: int) -> bool:
        """Whether the ballast is whole, made anew if there is room for it."""
        size = self._ballast.stat().st_size if self._ballast.exists() else -1
        if size == self.reserve_bytes:
            return True
        if self.reserve_bytes and min(free, self._free_bytes(self._directory)) < _RELIEF * self.reserve_bytes:
            return False
        return self._write_ballast()

    def _write_ballast(self) -> bool:
        descriptor = os.open(self._ballast, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        try:
            if self.reserve_bytes:
                os.posix_fallocate(descriptor, 0, self.reserve_bytes)
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self._ballast.unlink()
            return False
        finally:
            os.close(descriptor)
        sync_path(self._directory)
        return True
