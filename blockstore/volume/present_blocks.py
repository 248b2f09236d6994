"""Blocks of a hydrating volume that are known to be there: whatever the source says, they are not asked for.

Only ever a part of what is there: it is learnt from what was filled, written or trimmed here and from what
replicas list, and forgotten where it grows too large. A block that is there stays so until the volume is
hydrated, so what is known stays true.
"""

from collections import OrderedDict
from typing import Final

from blockstore.volume.block_bits import bits_of, set_bits
from blockstore.volume.source_client import SHARD_BLOCKS

#: 4 KiB each: 4 MiB for 128 GiB of volume.
_MAX_SHARDS: Final = 1024


class PresentBlocks:
    """Of one volume, by shards of its source, which has `block_count` blocks; beyond them nothing is remembered."""

    def __init__(self, block_count: int) -> None:
        self._block_count = block_count
        self._shards: OrderedDict[int, bytearray] = OrderedDict()

    def add(self, start: int, count: int) -> None:
        """These blocks are there."""
        at, end = start, min(start + count, self._block_count)
        while at < end:
            shard, first = divmod(at, SHARD_BLOCKS)
            inside = min(end - at, SHARD_BLOCKS - first)
            set_bits(self._shard(shard), first, inside)
            at += inside

    def add_bits(self, shard: int, bits: int) -> None:
        """The same of one shard: bit i is its block i."""
        bitmap = self._shard(shard)
        bits |= int.from_bytes(bitmap, "little")
        bitmap[:] = bits.to_bytes(len(bitmap), "little")

    def forget(self) -> None:
        """Nothing is known."""
        self._shards.clear()

    def bits(self, start: int, count: int) -> int:
        """Bit i: block start + i is known to be there."""
        bits = at = 0
        while at < count:
            shard, first = divmod(start + at, SHARD_BLOCKS)
            inside = min(count - at, SHARD_BLOCKS - first)
            bitmap = self._shards.get(shard)
            if bitmap is not None:
                bits |= bits_of(bitmap, first, inside) << at
            at += inside
        return bits

    def _shard(self, shard: int) -> bytearray:
        bitmap = self._shards.get(shard)
        if bitmap is None:
            bitmap = self._shards[shard] = bytearray(SHARD_BLOCKS // 8)
            if len(self._shards) > _MAX_SHARDS:
                self._shards.popitem(last=False)
        else:
            self._shards.move_to_end(shard)
        return bitmap
