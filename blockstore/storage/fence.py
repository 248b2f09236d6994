"""The epoch that reads of a replica's tables have to be of, for who reads them beside the node (shared_tables).

Eight bytes in the file `fence` of the replica's directory, in memory that the processes share. A node writes the
epoch there before it answers the seal: so who finds its own epoch there *after* it has read the tables read them
before the next front-end could have served anybody. They outlive the node's process, like the tables, and need not
be durable: when the machine goes down, who reads them does so as well.
"""

import mmap
import os
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

#: No epoch gets there: nothing that is read counts.
NO_EPOCH: Final = 2**64 - 1
_NAME: Final = "fence"
_EPOCH: Final = struct.Struct("<Q")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_PIDS: Final = "/proc/self/ns/pid"


@cache
def this_host() -> str:
    """The boot of this machine and the processes' namespace: LMDB knows readers by the ids of their processes.

    Empty where the system does not say.
    """
    try:
        return f"{_BOOT_ID.read_text().strip()} {os.readlink(_PIDS)}"
    except OSError:
        return ""


class Fence:
    """The node's side. identity: device and inode of the file; who finds another one there reads nothing."""

    def __init__(self, directory: Path) -> None:
        """Shows no epoch before the first `put`. Makes the file where there is none. Raises OSError."""
        self._descriptor = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self.put(NO_EPOCH)
            status = os.fstat(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.identity = status.st_dev, status.st_ino

    def put(self, epoch: int) -> None:
        """From the return on nobody takes what is read under another epoch. Raises OSError."""
        os.pwrite(self._descriptor, _EPOCH.pack(epoch), 0)

    def close(self) -> None:
        os.close(self._descriptor)


def lower_fence(directory: Path) -> None:
    """What is read from here on counts for nobody until the next seal: a node starts, and may put files in place."""
    path = directory / _NAME
    if not path.exists():
        return
    try:
        Fence(directory).close()
    except OSError:  # as on a full disk that writes everything anew: then nobody finds it any more
        with suppress(OSError):
            path.unlink()


class FenceView:
    """The side of who reads the tables."""

    def __init__(self, directory: Path, identity: tuple[int, int]) -> None:
        """Raises OSError, also where it is another file than the node's."""
        descriptor = os.open(directory / _NAME, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) != identity or status.st_size != _EPOCH.size:
                raise FileNotFoundError(f"{directory} is another one than the node's")
            self._memory = mmap.mmap(descriptor, _EPOCH.size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)

    def shows(self, epoch: int) -> bool:
        """Whether this epoch was sealed last."""
        return bool(_EPOCH.unpack_from(self._memory)[0] == epoch)

    def close(self) -> None:
        self._memory.close()
