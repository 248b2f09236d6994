"""What was written to a throw-away clone: a sparse file without a name, and which of its blocks count.

The file is as long as the clone, and block i lies where it lies in the clone; the disk gives space to what is
written. It has no name from its first moment on, so it is gone with the process, however that ends. All clones of a
process share an allowance of blocks, counted before they are written.

Invariant: a block is `held` (it counts, and its bytes are the clone's), or `zero` (it reads as zeroes), or neither
(it is as in the snapshot); never both.
"""

import ctypes
import errno
import os
import tempfile
from pathlib import Path
from typing import Final

from blockstore.errors import CairnError, NoSpace
from blockstore.units import BLOCK_SIZE, format_size
from blockstore.volume.block_bits import mask

#: Source: fallocate(2); a hole keeps the file's length.
_PUNCH_HOLE_KEEP_SIZE: Final = 0x02 | 0x01
_SHARD_BLOCKS: Final = 4096


class CloneSpace:
    """What all clones of this process may hold together, in blocks."""

    def __init__(self, limit_bytes: int) -> None:
        self.used_blocks = 0
        self._limit_blocks = limit_bytes // BLOCK_SIZE

    def take(self, count: int) -> None:
        """Raises NoSpace."""
        if self.used_blocks + count > self._limit_blocks:
            raise NoSpace(
                f"the clones here hold {format_size(self.used_blocks * BLOCK_SIZE)} of the "
                f"{format_size(self._limit_blocks * BLOCK_SIZE)} that they may: end one, or raise --clone-space"
            )
        self.used_blocks += count

    def give_back(self, count: int) -> None:
        self.used_blocks -= count


class BlockSet:
    """Some blocks of a volume, as bits in shards that are made when they are needed: 512 bytes for 16 MiB."""

    def __init__(self) -> None:
        self._shards: dict[int, int] = {}

    def bits(self, start: int, count: int) -> int:
        """Bit i: block start + i is in it."""
        found = at = 0
        while at < count:
            shard, first = divmod(start + at, _SHARD_BLOCKS)
            inside = min(count - at, _SHARD_BLOCKS - first)
            found |= (self._shards.get(shard, 0) >> first & mask(inside)) << at
            at += inside
        return found

    def put(self, start: int, count: int, *, inside: bool) -> None:
        """These blocks are in it from now on, or are not."""
        at, end = start, start + count
        while at < end:
            shard, first = divmod(at, _SHARD_BLOCKS)
            part = min(end - at, _SHARD_BLOCKS - first)
            now, changed = self._shards.get(shard, 0), mask(part) << first
            self._shards[shard] = now | changed if inside else now & ~changed
            if not self._shards[shard]:
                del self._shards[shard]
            at += part


class CloneOverlay:
    """Of one clone of `block_count` blocks, in a file below `directory`.

    `write` and `punch` block, and are called one at a time; whoever calls them says afterwards what holds by `keep`.
    """

    def __init__(self, directory: Path, block_count: int, space: CloneSpace) -> None:
        self.held = BlockSet()
        self.zero = BlockSet()
        self._space = space
        self._held_count = 0
        directory.mkdir(parents=True, exist_ok=True)
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed by `close`
            self._file.truncate(block_count * BLOCK_SIZE)
        except OSError as error:
            raise _as_ours(error) from error

    def close(self) -> None:
        """All of it is gone. The same again does nothing."""
        self._space.give_back(self._held_count)
        self._held_count = 0
        self._file.close()

    def reserve(self, start: int, count: int) -> int:
        """Count those of the blocks that are not held yet; how many these are. Raises NoSpace."""
        new = count - self.held.bits(start, count).bit_count()
        self._space.take(new)
        self._held_count += new
        return new

    def release(self, count: int) -> None:
        """So many blocks that were counted are not held after all, or not any more."""
        self._held_count -= count
        self._space.give_back(count)

    def keep(self, start: int, count: int, *, zero: bool) -> None:
        """From now on these blocks are what was written, or zeroes."""
        self.held.put(start, count, inside=not zero)
        self.zero.put(start, count, inside=zero)

    def read(self, start: int, count: int) -> bytes:
        """Blocks that are held. Blocks the caller."""
        try:
            return _whole(os.pread(self._file.fileno(), count * BLOCK_SIZE, start * BLOCK_SIZE), count)
        except OSError as error:
            raise _as_ours(error) from error

    def write(self, start: int, data: bytes | bytearray | memoryview) -> None:
        """The content of blocks. Blocks the caller. Raises NoSpace where the disk is full."""
        view, offset = memoryview(data), start * BLOCK_SIZE
        try:
            while view:
                written = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise _as_ours(error) from error

    def punch(self, start: int, count: int) -> bool:
        """Give the disk back what these blocks took; false where its file system cannot."""
        libc = ctypes.CDLL(None, use_errno=True)
        offset, length = ctypes.c_int64(start * BLOCK_SIZE), ctypes.c_int64(count * BLOCK_SIZE)
        if libc.fallocate(self._file.fileno(), _PUNCH_HOLE_KEEP_SIZE, offset, length) == 0:
            return True
        if (number := ctypes.get_errno()) in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise _as_ours(OSError(number, os.strerror(number)))


def _whole(data: bytes, count: int) -> bytes:
    if len(data) != count * BLOCK_SIZE:
        raise CairnError(f"a clone's file gave {len(data)} bytes of {count * BLOCK_SIZE}: it was cut by somebody else")
    return data


def _as_ours(error: OSError) -> CairnError:
    kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else CairnError
    return kind(f"a clone's file in the front-end's state directory: {error}")
