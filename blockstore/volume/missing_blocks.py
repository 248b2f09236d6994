"""What a hydrating volume lacks still: the source's maps against what a whole replica lists.

The list and the maps are both in order, so one pass over both counts everything, and keeps in memory what is
missing of the first shards only: the copying of those comes first, and then there is another pass.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from blockstore.errors import Corrupt
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import EXTENT_BLOCKS
from blockstore.volume.present_blocks import PresentBlocks
from blockstore.volume.source_client import SHARD_BLOCKS
from blockstore.volume.source_map import SourceMap

_SHARD_EXTENTS: Final = SHARD_BLOCKS // EXTENT_BLOCKS
_EXTENT_BYTES: Final = EXTENT_BLOCKS // 8
#: 4 KiB each: 4 MiB for what is copied in one pass, 128 GiB.
_MAX_SHARDS: Final = 1024


@dataclass(slots=True)
class Missing:
    """blocks_total: that the source maps; blocks_done: of these, what is there. shards: what is not, as bits."""

    blocks_total: int = 0
    blocks_done: int = 0
    shards: dict[int, int] = field(default_factory=dict)


async def find_missing(
    source: SourceMap, changes: AsyncIterator[pb.ChangedExtent], present: PresentBlocks, deadline: float
) -> Missing:
    """One pass. present: is told of what is there. Raises what ends the list, or keeps the maps away."""
    missing = Missing()
    shards = _by_shard(changes)
    listed = await anext(shards, None)
    for shard in range(source.shard_count):
        while listed is not None and listed[0] < shard:
            listed = await anext(shards, None)
        mapped = int.from_bytes(await source.shard(shard, deadline), "little")
        if not mapped:
            continue
        there = mapped & listed[1] if listed is not None and listed[0] == shard else 0
        missing.blocks_total += mapped.bit_count()
        missing.blocks_done += there.bit_count()
        if mapped != there and len(missing.shards) < _MAX_SHARDS:
            missing.shards[shard] = mapped & ~there
            present.add_bits(shard, there)
    return missing


async def _by_shard(changes: AsyncIterator[pb.ChangedExtent]) -> AsyncIterator[tuple[int, int]]:
    """The listed extents put together: shard, and the bits of its blocks that are there."""
    shard, bits = -1, 0
    async for extent in changes:
        number, inside = divmod(extent.extent, _SHARD_EXTENTS)
        if number < shard or len(extent.blocks) != _EXTENT_BYTES:
            raise Corrupt(f"a list of changes has extent {extent.extent} out of order, or {len(extent.blocks)} bytes")
        if number != shard:
            if bits:
                yield shard, bits
            shard, bits = number, 0
        bits |= int.from_bytes(extent.blocks, "little") << inside * EXTENT_BLOCKS
    if bits:
        yield shard, bits
