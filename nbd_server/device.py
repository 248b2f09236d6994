"""A volume addressed in bytes: unaligned and sub-block I/O over whole blocks.

A change of part of a block reads the block, merges, and writes it: a merge. Changes are ordered so
that none is lost (two merges on one block, or a merge and a write of the whole block):

- a merge waits for every change of its block that was called before it;
- a change of whole blocks waits for the merges on them that were called before it, and for trims and
  zeroes there, and for nothing else: two such changes at once may take effect in either order, as on a disk.

Trims and zeroes are waited for because a restored volume carries them out bit by bit, as it learns what
its source maps. A client whose link broke sends one again, and then the next write of these blocks, which
the first one, not answered to anybody any more, would undo (nbd_server/links.py). Writes have their place
in the volume's order when they are called.

Each waits for earlier calls only, so there is neither deadlock nor starvation. Pieces for a block
whose merge has not read yet join that merge. A request's parts run side by side; it is answered when
all are done, and fails if one did. Aligned requests with no merge in their way cost one dictionary
entry, no task.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from blockstore.errors import CairnError
from blockstore.units import BLOCK_SIZE, Generation
from blockstore.volume.block_status import Changed, Shown
from nbd_server.command_counts import CommandCounts
from nbd_server.hold import Hold
from nbd_server.volume import Buffer, Volume

#: What blocks are, asked of the volume at once: each may cost a node some 30 ms, which its guests' I/O would wait for.
QUESTIONS: Final = 4

_OFFSET_MASK: Final = BLOCK_SIZE - 1
_BLOCK_SHIFT: Final = BLOCK_SIZE.bit_length() - 1


class _Merge:
    """What is to be changed in one block, by one read and one write."""

    __slots__ = ("pieces", "task")

    def __init__(self) -> None:
        self.pieces: list[tuple[int, Buffer]] | None = []
        """Offsets in the block, and the bytes there; None once it is too late to join."""
        self.task: asyncio.Task[None]


class Device:
    """One volume's bytes, for any number of connections of one event loop.

    All calls return a future at once, raise or complete with errors of blockstore.errors, and take
    ranges inside the volume. `data` belongs to the device from the call on.
    """

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._changing: dict[asyncio.Future[None], tuple[int, int]] = {}
        """Changes of whole blocks in flight or waiting: first block, and the one after the last."""
        self._zeroing: dict[asyncio.Future[None], tuple[int, int]] = {}
        """Those of them that are trims and zeroes."""
        self._merging: dict[int, _Merge] = {}
        """The last merge called, by block."""
        self._asking = asyncio.Semaphore(QUESTIONS)
        self.hold: Hold | None = None
        """While it is there, it keeps the answers to changes; see hold.py."""
        self.counts = CommandCounts()
        """What clients asked of it."""

    def replace_volume(self, volume: Volume) -> None:
        """From now on `volume` is asked: the same bytes, by a shorter way. What was called before goes on as it is."""
        self._volume = volume

    @property
    def size_bytes(self) -> int:
        """The volume's; it may grow."""
        return self._volume.size_bytes

    def read(self, offset: int, length: int) -> asyncio.Future[Any]:
        """The `length` bytes at `offset`, as bytes or a memoryview."""
        if not length:
            return _done(b"")
        if not (offset | length) & _OFFSET_MASK:
            return self._volume.read(offset >> _BLOCK_SHIFT, length >> _BLOCK_SHIFT)
        return _start(self._read_within(offset, length))

    def write(self, offset: int, data: Buffer) -> asyncio.Future[None]:
        """Write `data` at `offset`; done means durable."""
        if not (offset | len(data)) & _OFFSET_MASK and data:
            start = offset >> _BLOCK_SHIFT
            return self._change(start, start + (len(data) >> _BLOCK_SHIFT), lambda: self._volume.write(start, data))
        return self._write_parts(offset, data)

    def trim(self, offset: int, length: int) -> asyncio.Future[None]:
        """Give up the bytes; blocks that are only partly in the range stay as they are."""
        start = (offset + _OFFSET_MASK) >> _BLOCK_SHIFT
        end = (offset + length) >> _BLOCK_SHIFT
        if start >= end:
            return _done(None)
        return self._change_to_zeroes(start, end, lambda: self._volume.trim(start, end - start))

    def zero(self, offset: int, length: int, *, allocate: bool) -> asyncio.Future[None]:
        """Make the bytes read as zeroes. allocate: keep space for later writes there."""
        first, last = _inner_blocks(offset, length)

        def zero_blocks() -> asyncio.Future[None]:
            return self._volume.zero(first, last - first, allocate=allocate)

        parts = [self._merge(*edge) for edge in _edges(offset, length, None)]
        if first < last:
            parts.append(self._change_to_zeroes(first, last, zero_blocks))
        return _all_of(parts)

    def zero_is_fast(self, offset: int, length: int) -> bool:
        """Whether `zero` takes less than a write of as many zeroes: no block is merged, and the volume says so."""
        return not (offset | length) & _OFFSET_MASK and self._volume.zero_is_fast

    def cache(self, offset: int, length: int) -> asyncio.Future[None]:
        """Bring the bytes to where reads of them are fast; nothing else changes."""
        return self._volume.cache(*_outer_blocks(offset, length)) if length else _done(None)

    async def shown(self, offset: int, length: int) -> list[Shown]:
        """What the blocks are that the bytes lie in, as runs; they may end early."""
        async with self._asking:
            return await self._volume.shown(*_outer_blocks(offset, length))

    async def changed(self, offset: int, length: int, snapshot: str) -> list[Changed]:
        """Which of these blocks changed since a snapshot, given by its id."""
        async with self._asking:
            return await self._volume.changed(*_outer_blocks(offset, length), snapshot)

    async def snapshots(self) -> dict[str, Generation]:
        """Those that `changed` knows, with the generation that each is in the first segment."""
        return await self._volume.snapshots()

    def flush(self) -> asyncio.Future[None]:
        """Done once all that was answered before is durable."""
        return self._volume.flush()

    async def _read_within(self, offset: int, length: int) -> memoryview:
        start = offset >> _BLOCK_SHIFT
        end = (offset + length + _OFFSET_MASK) >> _BLOCK_SHIFT
        blocks = await self._volume.read(start, end - start)
        skip = offset & _OFFSET_MASK
        return memoryview(blocks)[skip : skip + length]

    def _write_parts(self, offset: int, data: Buffer) -> asyncio.Future[None]:
        first, last = _inner_blocks(offset, len(data))
        view = memoryview(data)
        parts = [self._merge(*edge) for edge in _edges(offset, len(data), view)]
        if first < last:
            at = (first << _BLOCK_SHIFT) - offset
            inner = view[at : at + ((last - first) << _BLOCK_SHIFT)]
            parts.append(self._change(first, last, lambda: self._volume.write(first, inner)))
        return _all_of(parts)

    def _change_to_zeroes(
        self, start: int, end: int, change: Callable[[], asyncio.Future[None]]
    ) -> asyncio.Future[None]:
        future = self._change(start, end, change)
        if not future.done():
            self._zeroing[future] = (start, end)
            future.add_done_callback(self._zeroing.pop)
        return future

    def _change(self, start: int, end: int, change: Callable[[], asyncio.Future[None]]) -> asyncio.Future[None]:
        """Run `change`, of the whole blocks from `start` to before `end`, when nothing that it waits for is on them."""
        if (self._merging or self._zeroing) and (earlier := self._awaited_in(start, end)):
            future: asyncio.Future[None] = _start(_after(earlier, change))
        else:
            try:
                future = change()
            except CairnError as error:  # the parts beside this one are waited for all the same
                return _failed(error)
        if not future.done():
            self._changing[future] = (start, end)
            future.add_done_callback(self._changing.pop)
        return future

    def _awaited_in(self, start: int, end: int) -> list[asyncio.Future[None]]:
        """What a change of those blocks waits for."""
        zeroing = [future for future, (first, last) in self._zeroing.items() if first < end and start < last]
        return self._merges_in(start, end) + zeroing

    def _merges_in(self, start: int, end: int) -> list[asyncio.Future[None]]:
        """The last merge on each of those blocks: it ends after all earlier ones on its block."""
        if end - start < len(self._merging):
            return [self._merging[block].task for block in range(start, end) if block in self._merging]
        return [merge.task for block, merge in self._merging.items() if start <= block < end]

    def _merge(self, block: int, within: int, piece: Buffer) -> asyncio.Future[None]:
        """Put `piece` at byte `within` of `block`, after every change of that block that was called before."""
        merge = self._merging.get(block)
        if merge is None or merge.pieces is None:
            earlier = [future for future, (start, end) in self._changing.items() if start <= block < end]
            if merge is not None:
                earlier.append(merge.task)
            merge = self._merging[block] = _Merge()
            merge.task = _start(self._run_merge(block, merge, earlier))
        assert merge.pieces is not None
        merge.pieces.append((within, piece))
        return merge.task

    async def _run_merge(self, block: int, merge: _Merge, earlier: list[asyncio.Future[None]]) -> None:
        try:
            if earlier:
                await asyncio.wait(earlier)
            merged = bytearray(await self._volume.read(block, 1))
            assert len(merged) == BLOCK_SIZE
            pieces, merge.pieces = merge.pieces, None
            for within, piece in pieces or ():
                merged[within : within + len(piece)] = piece
            await self._volume.write(block, merged)
        finally:
            merge.pieces = None
            if self._merging.get(block) is merge:
                del self._merging[block]


def _inner_blocks(offset: int, length: int) -> tuple[int, int]:
    """The first of the blocks wholly inside the range, and the one after the last; none where not first < last."""
    return (offset + _OFFSET_MASK) >> _BLOCK_SHIFT, (offset + length) >> _BLOCK_SHIFT


def _outer_blocks(offset: int, length: int) -> tuple[int, int]:
    """The first of the blocks that the range touches, and their number."""
    start = offset >> _BLOCK_SHIFT
    return start, ((offset + length + _OFFSET_MASK) >> _BLOCK_SHIFT) - start


def _edges(offset: int, length: int, data: memoryview | None) -> list[tuple[int, int, Buffer]]:
    """The parts of blocks at the ends of a range: block, offset in it, bytes (zeroes where `data` is None)."""
    edges: list[tuple[int, int, Buffer]] = []
    end = offset + length
    head_end = min(end, (offset + _OFFSET_MASK) & ~_OFFSET_MASK)
    tail_start = max(head_end, end & ~_OFFSET_MASK)
    for start, stop in ((offset, head_end), (tail_start, end)):
        if start < stop:
            piece: Buffer = bytes(stop - start) if data is None else data[start - offset : stop - offset]
            edges.append((start >> _BLOCK_SHIFT, start & _OFFSET_MASK, piece))
    return edges


async def _after(earlier: list[asyncio.Future[None]], change: Callable[[], asyncio.Future[None]]) -> None:
    await asyncio.wait(earlier)
    await change()


async def _join(parts: list[asyncio.Future[None]]) -> None:
    """Wait for all parts, also where one fails; then raise the first error."""
    await asyncio.wait(parts)
    errors = [error for part in parts if (error := part.exception()) is not None]
    if errors:
        raise errors[0]


def _all_of(parts: list[asyncio.Future[None]]) -> asyncio.Future[None]:
    """One future for all of a request's parts."""
    if not parts:
        return _done(None)
    return parts[0] if len(parts) == 1 else _start(_join(parts))


def _start(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(work)


def _done(value: Any) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


def _failed(error: CairnError) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future
