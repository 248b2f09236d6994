"""The blocks that a snapshot may differ in from its base, as the nodes list them: compact, and in order.

A node lists extents of 256 blocks with a bitmap each; 40 bytes an extent are kept here, so a list
takes 40 MB for a TiB that changed everywhere. What is listed may be more than what changed.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from blockstore.errors import InvalidRequest
from blockstore.units import EXTENT_BLOCKS
from blockstore.volume.block_bits import mask, runs_of

_BITMAP_BYTES: Final = EXTENT_BLOCKS // 8
_ALL: Final = (1 << EXTENT_BLOCKS) - 1


class Run(NamedTuple):
    """`length` blocks from block `start` on."""

    start: int
    length: int


class Changes:
    """Of one segment. blocks: that it has; what lies beyond is ignored."""

    def __init__(self, blocks: int) -> None:
        self.count = 0
        """Blocks that are listed."""
        self._blocks = blocks
        self._extents: array[int] = array("Q")
        self._bitmaps = bytearray()

    def add(self, extent: int, blocks: bytes) -> None:
        """The next extent. Raises InvalidRequest where it comes out of order, or its bitmap has another size."""
        if len(blocks) != _BITMAP_BYTES or (self._extents and extent <= self._extents[-1]):
            raise InvalidRequest(f"a node listed extent {extent} out of order or with {len(blocks)} bytes of bitmap")
        left = self._blocks - extent * EXTENT_BLOCKS
        if left <= 0:
            return
        bits = int.from_bytes(blocks, "little") & (_ALL >> max(0, EXTENT_BLOCKS - left))
        if bits:
            self.count += bits.bit_count()
            self._extents.append(extent)
            self._bitmaps += bits.to_bytes(_BITMAP_BYTES, "little")

    def runs(self) -> Iterator[Run]:
        """In order; none reaches over the end of an extent."""
        for index, extent in enumerate(self._extents):
            for start, length in runs_of(self._bits(index)):
                yield Run(extent * EXTENT_BLOCKS + start, length)

    def bits(self, start: int, count: int) -> int:
        """Bit i: block start + i is listed."""
        found = 0
        first = start // EXTENT_BLOCKS
        index = bisect_left(self._extents, first)
        while index < len(self._extents) and (at := self._extents[index] * EXTENT_BLOCKS) < start + count:
            bits = self._bits(index)
            found |= bits >> start - at if at < start else bits << at - start
            index += 1
        return found & mask(count)

    def _bits(self, index: int) -> int:
        at = index * _BITMAP_BYTES
        return int.from_bytes(self._bitmaps[at : at + _BITMAP_BYTES], "little")

    def batches(self, limit: Callable[[], int]) -> Iterator[list[Run]]:
        """The runs in order, in batches of at most `limit()` blocks; a run is cut where a batch is full."""
        return batches(self.runs(), limit)


def batches(runs: Iterator[Run], limit: Callable[[], int]) -> Iterator[list[Run]]:
    """`runs` in their order, in batches of at most `limit()` blocks, asked as each begins."""
    batch: list[Run] = []
    room = limit()
    for start, length in runs:
        at, end = start, start + length
        while at < end:
            taken = min(end - at, room)
            batch.append(Run(at, taken))
            at, room = at + taken, room - taken
            if not room:
                yield batch
                batch, room = [], limit()
    if batch:
        yield batch
