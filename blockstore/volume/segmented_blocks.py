"""The blocks of a volume that is made of several segments, each by its own way.

A request that lies in one segment is that segment's, and costs one look at a short list more. One that crosses a
boundary is divided, its parts run side by side, and it is answered when all are done; it fails if one did. Parts are
not atomic together, and need not be: NBD promises no order between requests that were not answered. A segment without
a quorum keeps waiting who touches it, and nobody else. Once the attachment is over in one segment, none is asked
any more: an epoch is over for the volume as a whole.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from blockstore.errors import CairnError, NotFound
from blockstore.units import BLOCK_SIZE, Generation
from blockstore.volume.block_status import Changed, Shown
from blockstore.volume.futures import finished, joined

Data = bytes | bytearray | memoryview
Run = TypeVar("Run", Shown, Changed)


class Blocks(Protocol):
    """What the open volume of one segment can do, hydrating or not; see nbd_server.volume.Volume for the contract."""

    @property
    def size_bytes(self) -> int: ...
    @property
    def zero_is_fast(self) -> bool: ...
    def cache(self, start: int, count: int) -> "asyncio.Future[None]": ...
    def read(self, start: int, count: int) -> "asyncio.Future[bytes | memoryview]": ...
    def write(self, start: int, data: Data) -> "asyncio.Future[None]": ...
    def trim(self, start: int, count: int) -> "asyncio.Future[None]": ...
    def zero(self, start: int, count: int, *, allocate: bool) -> "asyncio.Future[None]": ...
    def flush(self) -> "asyncio.Future[None]": ...
    def shown(self, start: int, count: int) -> "asyncio.Future[list[Shown]]": ...
    def changed(self, start: int, count: int, snapshot: str) -> "asyncio.Future[list[Changed]]": ...
    async def snapshots(self) -> dict[str, Generation]: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks [start, start + count) of the segment with that index."""

    index: int
    start: int
    count: int


def pieces(starts: Sequence[int], start: int, count: int) -> list[Piece]:
    """The range of a volume's blocks, divided by segments.

    starts: the first block of each segment, 0 first, growing; the last one is as long as it takes. count: above 0.
    """
    assert starts[0] == 0
    assert count > 0
    found = []
    index, end = bisect_right(starts, start) - 1, start + count
    while start < end:
        stop = min(end, starts[index + 1]) if index + 1 < len(starts) else end
        found.append(Piece(index, start - starts[index], stop - start))
        index, start = index + 1, stop
    return found


class SegmentedBlocks:
    """Segments one behind the other; keeps the calls of nbd_server.volume.Volume.

    starts: as in `pieces`. over: done when no segment may be asked any more, with the reason.
    """

    def __init__(self, segments: Sequence[Blocks], starts: Sequence[int], over: "asyncio.Future[CairnError]") -> None:
        assert len(segments) == len(starts)
        self._segments = tuple(segments)
        self._starts = tuple(starts)
        self._over = over
        self._loop = asyncio.get_running_loop()

    @property
    def size_bytes(self) -> int:
        return self._starts[-1] * BLOCK_SIZE + self._segments[-1].size_bytes

    def read(self, start: int, count: int) -> "asyncio.Future[bytes | memoryview]":
        return self._ask(start, count, lambda segment, piece, _: segment.read(piece.start, piece.count), joined)

    def write(self, start: int, data: Data) -> "asyncio.Future[None]":
        def write(segment: Blocks, piece: Piece, at: int) -> "asyncio.Future[None]":
            if piece.count * BLOCK_SIZE == len(data):
                return segment.write(piece.start, data)
            return segment.write(piece.start, memoryview(data)[at : at + piece.count * BLOCK_SIZE])

        return self._ask(start, len(data) // BLOCK_SIZE, write, finished)

    def trim(self, start: int, count: int) -> "asyncio.Future[None]":
        return self._ask(start, count, lambda segment, piece, _: segment.trim(piece.start, piece.count), finished)

    def zero(self, start: int, count: int, *, allocate: bool) -> "asyncio.Future[None]":
        def zero(segment: Blocks, piece: Piece, _: int) -> "asyncio.Future[None]":
            return segment.zero(piece.start, piece.count, allocate=allocate)

        return self._ask(start, count, zero, finished)

    @property
    def zero_is_fast(self) -> bool:
        return all(segment.zero_is_fast for segment in self._segments)

    def cache(self, start: int, count: int) -> "asyncio.Future[None]":
        return self._ask(start, count, lambda segment, piece, _: segment.cache(piece.start, piece.count), finished)

    def flush(self) -> "asyncio.Future[None]":
        if self._over.done():
            return self._failed(self._over.result())
        return self._loop.create_task(finished([segment.flush() for segment in self._segments]))

    def shown(self, start: int, count: int) -> "asyncio.Future[list[Shown]]":
        return self._loop.create_task(self._told(start, count, lambda segment, *piece: segment.shown(*piece)))

    def changed(self, start: int, count: int, snapshot: str) -> "asyncio.Future[list[Changed]]":
        """A segment that came after the snapshot has changed wherever it has anything: it was not there before."""

        async def changed(segment: Blocks, start: int, count: int) -> list[Changed]:
            try:
                return await segment.changed(start, count, snapshot)
            except NotFound:
                if segment is self._segments[0]:
                    raise
                return [Changed(run.length, run.depth > 0) for run in await segment.shown(start, count)]

        return self._loop.create_task(self._told(start, count, changed))

    async def _told(
        self, start: int, count: int, ask: "Callable[[Blocks, int, int], Awaitable[list[Run]]]"
    ) -> "list[Run]":
        """Of one segment after the other, until one does not tell all of its piece."""
        runs: list[Run] = []
        for piece in pieces(self._starts, start, count):
            if self._over.done():
                raise self._over.result()
            runs += (told := await ask(self._segments[piece.index], piece.start, piece.count))
            if sum(run.length for run in told) < piece.count:
                break
        return runs

    async def snapshots(self) -> dict[str, Generation]:
        """Of the first segment, with which every snapshot begins; later ones may be younger."""
        return await self._segments[0].snapshots()

    def _ask(
        self,
        start: int,
        count: int,
        ask: Callable[[Blocks, Piece, int], "asyncio.Future[Any]"],
        join: Callable[[list["asyncio.Future[Any]"]], Any],
    ) -> "asyncio.Future[Any]":
        """ask: of a segment, its piece, and where in the request's bytes that begins."""
        if self._over.done():
            return self._failed(self._over.result())
        parts: list[asyncio.Future[Any]] = []
        at = 0
        for piece in pieces(self._starts, start, count):
            try:
                parts.append(ask(self._segments[piece.index], piece, at))
            except CairnError as error:  # the parts beside this one are waited for all the same
                parts.append(self._failed(error))
            at += piece.count * BLOCK_SIZE
        return parts[0] if len(parts) == 1 else self._loop.create_task(join(parts))

    def _failed(self, error: CairnError) -> "asyncio.Future[Any]":
        future: asyncio.Future[Any] = self._loop.create_future()
        future.set_exception(error)
        return future
