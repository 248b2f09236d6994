"""Diff: the ranges of bytes in which two snapshots differ, without reading data where the manifests tell.

Shards with the same name are the same, blocks with the same reference too: neither costs more than the comparison. A
block that only one of the two maps differs, because blocks of zeroes are never mapped. Where both are mapped to
different places, what they hold may be the same all the same (content that was shipped twice); that is
decided by the hashes in the trailers of their objects. So time grows with what differs, and with the number of shards
that map something.
"""

from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Final, NamedTuple

from blockstore.errors import NotFound
from blockstore.units import BLOCK_SIZE
from snapshotd.ahead import ahead
from snapshotd.inventory import INDEX_WIDTH, load_trailer
from snapshotd.manifest import SHARD_BLOCKS, BlockRef, Shard
from snapshotd.reader import SnapshotReader
from snapshotd.root import Root

#: Trailers of 4,096 blocks or so each, 16 bytes a block and Python's overhead: 0.3 MB.
_KEPT_TRAILERS: Final = 64

_Hashes = dict[tuple[bytes, int], tuple[bytes, ...]]
"""By pack and frame, of each block."""


class Range(NamedTuple):
    """`size` bytes from byte `offset` on differ. zero: they read as zeroes in the newer snapshot."""

    offset: int
    size: int
    zero: bool


async def diff(reader: SnapshotReader, old: Root | None, new: Root) -> AsyncGenerator[Range, None]:
    """Where `new` differs from `old` (None: from zeroes), in order; the ranges of one kind do not touch.

    Beyond the end of the smaller snapshot, zeroes are compared with; ranges end at the new one's size.
    Raises Corrupt, QuorumUnavailable.
    """
    hashes = _StoredHashes(reader)
    shards = dict(old.shards) if old else {}
    numbers = sorted(
        number for number in shards.keys() | new.shards.keys() if shards.get(number) != new.shards.get(number)
    )

    async def load(number: int) -> tuple[int, Shard | None, Shard | None]:
        before = await reader.shard(old, number, background=True) if old else None
        return number, before, await reader.shard(new, number, background=True)

    open_range: Range | None = None
    async with aclosing(ahead(load, numbers, INDEX_WIDTH)) as loaded:
        async for number, before, after in loaded:
            for start, zero in await _differing(hashes, before, after):
                offset = (number * SHARD_BLOCKS + start) * BLOCK_SIZE
                size = min(BLOCK_SIZE, new.size_bytes - offset)
                if size <= 0:
                    continue
                if open_range and open_range.zero == zero and open_range.offset + open_range.size == offset:
                    open_range = open_range._replace(size=open_range.size + size)
                    continue
                if open_range:
                    yield open_range
                open_range = Range(offset, size, zero)
    if open_range:
        yield open_range


async def _differing(hashes: "_StoredHashes", before: Shard | None, after: Shard | None) -> list[tuple[int, bool]]:
    """(block of the shard, whether it is zero now) of each block that differs."""
    found = []
    for block, (old, new) in enumerate(zip(_refs(before), _refs(after), strict=True)):
        if old == new:
            continue
        if old is None or new is None or await hashes.of(old) != await hashes.of(new):
            found.append((block, new is None))
    return found


def _refs(shard: Shard | None) -> Iterator[BlockRef | None]:
    return iter([None] * SHARD_BLOCKS if shard is None else shard.refs(0, SHARD_BLOCKS))


class _StoredHashes:
    """The hashes of stored blocks, out of the trailers of their objects."""

    def __init__(self, reader: SnapshotReader) -> None:
        self._reader = reader
        self._kept: OrderedDict[str, _Hashes] = OrderedDict()

    async def of(self, ref: BlockRef) -> bytes:
        """Of the content of that block. Raises Corrupt."""
        await self._reader.index.load()
        for name, _ in self._reader.index.locate(ref.pack, ref.frame):
            try:
                found = (self._kept.get(name) or await self._load(name)).get((ref.pack, ref.frame), ())
            except NotFound:
                continue  # repacked: the reader knows what to do then
            if ref.slot < len(found):
                return found[ref.slot]
        return self._reader.repository.keys.block_hash(await self._reader.block(ref, background=True))

    async def _load(self, name: str) -> _Hashes:
        entry = self._reader.index.map.entries.get(name)
        if entry is None:  # the index was read anew since it was located
            raise NotFound(f"{name} is not in the index any more")
        trailer = await load_trailer(self._reader.repository, name, entry.size)
        hashes = {
            (part.pack, number): digests
            for part, of_frames in zip(trailer.parts, trailer.hashes, strict=True)
            for number, digests in zip(part.numbers, of_frames, strict=True)
        }
        self._kept[name] = hashes
        if len(self._kept) > _KEPT_TRAILERS:
            self._kept.popitem(last=False)
        return hashes
