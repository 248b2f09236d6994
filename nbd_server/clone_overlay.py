"""What was written to a throw-away clone: a sparse file without a name, and which of its blocks count.

The file is as long as the clone, and block i lies where it lies in the clone; the disk gives space to what is
written. It has no name from its first moment on, so it is gone with the process, however that ends. All clones of a
process share an allowance of blocks, counted before they are written.

A client may trim or zero all of a clone by one request, which may be of 64 TiB: so zeroes are kept as ranges, whose
number all clones share an allowance of as well.

Invariant: a block is `held` (it counts, and its bytes are the clone's), or `zero` (it reads as zeroes), or neither
(it is as in the snapshot); never both.
"""

import ctypes
import errno
import os
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from blockstore.errors import CairnError, NoSpace
from blockstore.units import BLOCK_SIZE, format_size
from blockstore.volume.block_bits import mask, runs_of

#: Source: fallocate(2); a hole keeps the file's length.
_PUNCH_HOLE_KEEP_SIZE: Final = 0x02 | 0x01
_SHARD_BLOCKS: Final = 4096
#: Of zeroes in all clones: 20 MiB. An `fstrim` makes one for each free piece of a file system.
MAX_RANGES: Final = 1 << 18


class CloneSpace:
    """What all clones of this process may hold together: blocks, and ranges of zeroes."""

    def __init__(self, limit_bytes: int) -> None:
        self.used_blocks = 0
        self.used_ranges = 0
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

    def check_ranges(self) -> None:
        """Raises NoSpace where there are as many ranges of zeroes as there may be."""
        if self.used_ranges >= MAX_RANGES:
            raise NoSpace(
                f"the clones here have {self.used_ranges} separate ranges of zeroes, and {MAX_RANGES} may be: "
                "end one, or trim longer ranges"
            )


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

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Those in the range, in order: first block, count."""
        for shard in self._shards_in(start, count):
            base = shard * _SHARD_BLOCKS
            first, last = max(start, base), min(start + count, base + _SHARD_BLOCKS)
            for at, length in runs_of(self.bits(first, last - first)):
                yield first + at, length

    def add(self, start: int, count: int) -> None:
        """These blocks are in it from now on."""
        at, end = start, start + count
        while at < end:
            shard, first = divmod(at, _SHARD_BLOCKS)
            part = min(end - at, _SHARD_BLOCKS - first)
            self._shards[shard] = self._shards.get(shard, 0) | mask(part) << first
            at += part

    def remove(self, start: int, count: int) -> None:
        """These blocks are not in it from now on."""
        for shard in list(self._shards_in(start, count)):
            base = shard * _SHARD_BLOCKS
            first, last = max(0, start - base), min(start + count - base, _SHARD_BLOCKS)
            left = self._shards.get(shard, 0) & ~(mask(last - first) << first)
            if left:
                self._shards[shard] = left
            else:
                self._shards.pop(shard, None)

    def _shards_in(self, start: int, count: int) -> Iterable[int]:
        """In order; those without a block may be left out, where that is shorter."""
        shards = range(start // _SHARD_BLOCKS, -(-(start + count) // _SHARD_BLOCKS))
        return shards if len(shards) <= len(self._shards) else sorted(each for each in self._shards if each in shards)


class BlockRanges:
    """Some blocks of a volume, as ranges: 80 bytes for each, however long it is."""

    def __init__(self) -> None:
        self._edges: list[int] = []
        """The first block of a range, and the one after its last, of one range after the other; ascending."""

    def __len__(self) -> int:
        return len(self._edges) // 2

    def bits(self, start: int, count: int) -> int:
        """Bit i: block start + i is in it."""
        found, end = 0, start + count
        at = bisect_right(self._edges, start) & ~1
        while at < len(self._edges) and self._edges[at] < end:
            first, last = max(start, self._edges[at]), min(end, self._edges[at + 1])
            found |= mask(last - first) << first - start
            at += 2
        return found

    def put(self, start: int, count: int, *, inside: bool) -> None:
        """These blocks are in it from now on, or are not. count: above 0."""
        low, high = bisect_left(self._edges, start), bisect_right(self._edges, start + count)
        # Behind an even number of edges a block is in no range.
        edges = [start] if (low % 2 == 0) is inside else []
        if (high % 2 == 0) is inside:
            edges.append(start + count)
        self._edges[low:high] = edges


class CloneOverlay:
    """Of one clone of `block_count` blocks, in a file below `directory`.

    `write` and `punch` block, and are called one at a time; whoever calls them says afterwards what holds by `keep`.
    """

    def __init__(self, directory: Path, block_count: int, space: CloneSpace) -> None:
        self.held = BlockSet()
        self.zero = BlockRanges()
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
        self._space.used_ranges -= len(self.zero)
        self.zero = BlockRanges()
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

    def check_ranges(self) -> None:
        """Raises NoSpace where no more blocks may be made zeroes."""
        self._space.check_ranges()

    def keep(self, start: int, count: int, *, zero: bool) -> None:
        """From now on these blocks are what was written, or zeroes. count: above 0."""
        if zero:
            self.held.remove(start, count)
        else:
            self.held.add(start, count)
        before = len(self.zero)
        self.zero.put(start, count, inside=zero)
        self._space.used_ranges += len(self.zero) - before

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
