"""Which blocks a source maps: a bitmap for each 128 MiB, fetched when it is first asked for, and kept.

A shard that maps nothing takes a bit; the others 4 KiB each, so many of them at most. The source never
changes, and neither do these.
"""

from collections import OrderedDict
from typing import Final

from blockstore.volume.block_bits import bits_of, mask
from blockstore.volume.single_flight import SingleFlight
from blockstore.volume.source_client import SHARD_BLOCKS, SourceClient

#: 4 MiB, for 128 GiB of volume; beyond that the one that was not asked for the longest is fetched again.
_MAX_SHARDS: Final = 1024


class SourceMap:
    """The bitmaps of one source."""

    def __init__(self, client: SourceClient) -> None:
        self._client = client
        self.shard_count = -(-client.block_count // SHARD_BLOCKS)
        self._shards: OrderedDict[int, bytes] = OrderedDict()
        self._empty = bytearray(self.shard_count // 8 + 1)
        self._fetching: SingleFlight[int, bytes] = SingleFlight()

    async def bits(self, start: int, count: int, deadline: float) -> int:
        """Bit i: the source maps block start + i. Raises QuorumUnavailable at the loop's time `deadline`, Corrupt."""
        bits = at = 0
        while at < count:
            shard, first = divmod(start + at, SHARD_BLOCKS)
            inside = min(count - at, SHARD_BLOCKS - first)
            if shard < self.shard_count:
                bits |= bits_of(await self.shard(shard, deadline), first, inside) << at
            at += inside
        return bits & mask(min(count, max(0, self._client.block_count - start)))

    def known_bits(self, start: int, count: int) -> int:
        """The same of one shard without asking anybody: 0 where it was not asked for before."""
        shard, first = divmod(start, SHARD_BLOCKS)
        bitmap = self._shards.get(shard, b"")
        return bits_of(bitmap, first, min(count, SHARD_BLOCKS - first))

    async def shard(self, shard: int, deadline: float) -> bytes:
        """The bitmap of one, empty where it maps nothing."""
        known = self._known(shard)
        if known is not None:
            return known
        return await self._client.patiently(lambda: self._fetching.get(shard, lambda: self._fetch(shard)), deadline)

    async def close(self) -> None:
        """Nobody asks any more: what is kept takes memory."""
        await self._fetching.close()
        self._shards.clear()

    def _known(self, shard: int) -> bytes | None:
        if self._empty[shard // 8] >> shard % 8 & 1:
            return b""
        bitmap = self._shards.get(shard)
        if bitmap is not None:
            self._shards.move_to_end(shard)
        return bitmap

    async def _fetch(self, shard: int) -> bytes:
        bitmap = await self._client.map_shard(shard)
        if not any(bitmap):
            self._empty[shard // 8] |= 1 << shard % 8
            return b""
        self._shards[shard] = bitmap
        if len(self._shards) > _MAX_SHARDS:
            self._shards.popitem(last=False)
        return bitmap
