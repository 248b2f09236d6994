"""A volume that was made from a snapshot and does not have all of its blocks yet.

It stands in front of the open volume, and keeps its calls (nbd_server.volume.Volume):

- a read asks the replicas first. Blocks that they lack come from the source where that maps them, and are
  zeroes where it does not; what came is filled behind the guest;
- a write of whole blocks goes straight through, and covers what the source has;
- a trim leaves a zero entry where the source maps a block, or its old content would show again; where the source
  maps nothing it becomes a DISCARD, which leaves none.

A fill never covers a guest's change: it lies in generation 0, below all of them. So a fill may come late or
twice; only after the record that says "hydrated" none may come at all (`finish`). What of the source cannot be
had is waited for until the retry limit; other blocks go on working meanwhile. Source: design, section 5.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Final, TypeVar

from blockstore.errors import Corrupt
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, MAX_RECORD_PAYLOAD, Generation
from blockstore.volume.block_bits import bits_of, mask, runs_of
from blockstore.volume.block_status import ABSENT, DATA, Changed, Depths, Shown, StatusQuery, merged, shown_runs
from blockstore.volume.fill_queue import FillQueue
from blockstore.volume.guest_activity import GuestActivity
from blockstore.volume.open_volume import OpenVolume, SparseBlocks
from blockstore.volume.present_blocks import PresentBlocks
from blockstore.volume.source_client import SHARD_BLOCKS, Fetched, SourceClient
from blockstore.volume.source_map import SourceMap
from blockstore.volume.source_windows import WINDOW_BLOCKS, SourceWindows

_READ_BLOCKS: Final = MAX_RECORD_PAYLOAD // BLOCK_SIZE
#: Of one trim, in the log's queue at once: long ones are looked at by every read and write that comes meanwhile.
_PARTS_IN_FLIGHT: Final = 256
#: Whose maps are looked at for one question what blocks are: 32 GiB of volume.
_STATUS_SHARDS: Final = 256
#: Blocks between two that the source maps, below which a trim does not tell them apart.
_NARROW_GAP: Final = 8

Blocks = bytes | bytearray | memoryview
Result = TypeVar("Result")
Zeroes = Callable[[int, int], "asyncio.Future[None]"]
"""TRIM or ZERO of blocks."""


class HydratingVolume:
    """`volume` with a source.

    retry_limit_s: how long a request waits for what the source has. activity: of the guests that the background
    gives way to.
    """

    def __init__(
        self,
        volume: OpenVolume,
        client: SourceClient,
        retry_limit_s: float,
        activity: GuestActivity | None = None,
    ) -> None:
        self.client = client
        self.map = SourceMap(client)
        self.activity = activity or GuestActivity()
        self.present = PresentBlocks(client.block_count)
        self.fills = FillQueue(volume, self.present.add, lambda: self.activity.busy)
        self._volume = volume
        self._retry_limit_s = retry_limit_s
        self._windows = SourceWindows(client, self._fill_window)
        self._loop = asyncio.get_running_loop()
        self._requests: set[asyncio.Future[Any]] = set()
        self._read_up_to = -1
        self._caching = asyncio.Lock()

    # ---- life

    async def finish(self) -> None:
        """All that the source maps is there, and verified: say so in the log, for good.

        From here on nothing is filled, also where this fails and is tried again.
        """
        self.fills.close()
        await self._volume.hydrated()

    async def close(self) -> None:
        """Once the requests that came here have ended; no more may come."""
        while self._requests:
            await asyncio.wait(self._requests)
        await self.abandon()

    async def abandon(self) -> None:
        """At once: the volume behind it has ended, or will not be asked again."""
        self.fills.close()
        for request in list(self._requests):
            request.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)
        await self._windows.close()
        await self.map.close()
        await self.client.close()
        self.present.forget()

    # ---- the guest's calls

    @property
    def size_bytes(self) -> int:
        return self._volume.size_bytes

    def read(self, start: int, count: int) -> "asyncio.Future[bytes | memoryview]":
        return self._begin(self._read(start, count, self._deadline()))

    def write(self, start: int, data: Blocks) -> "asyncio.Future[None]":
        future = self._volume.write(start, data)
        self.activity.note(future)
        future.add_done_callback(partial(self._written, start, len(data) // BLOCK_SIZE))
        return future

    def trim(self, start: int, count: int) -> "asyncio.Future[None]":
        return self._begin(self._zero(start, count, self._volume.trim))

    def zero(self, start: int, count: int, *, allocate: bool) -> "asyncio.Future[None]":
        return self._begin(self._zero(start, count, partial(self._volume.zero, allocate=allocate)))

    @property
    def zero_is_fast(self) -> bool:
        """What the source maps has to be known, and be covered part by part; a write needs neither."""
        return False

    def cache(self, start: int, count: int) -> "asyncio.Future[None]":
        return self._begin(self._cache(start, count))

    def shown(self, start: int, count: int) -> "asyncio.Future[list[Shown]]":
        return self._begin(self._shown(start, count))

    def changed(self, start: int, count: int, snapshot: str) -> "asyncio.Future[list[Changed]]":
        """A fill is no change."""
        return self._volume.changed(start, count, snapshot)

    async def snapshots(self) -> dict[str, Generation]:
        return await self._volume.snapshots()

    def flush(self) -> "asyncio.Future[None]":
        return self._volume.flush()

    def _begin(self, work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
        task = self._loop.create_task(work)
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        self.activity.note(task)
        return task

    def _deadline(self) -> float:
        return self._loop.time() + self._retry_limit_s

    # ---- reads

    async def _read(self, start: int, count: int, deadline: float) -> bytes | memoryview:
        self._read_ahead(start, count)
        if count <= _READ_BLOCKS:
            return await self._read_part(start, count, deadline)
        starts = range(start, start + count, _READ_BLOCKS)
        return b"".join(
            await asyncio.gather(
                *(self._read_part(at, min(_READ_BLOCKS, start + count - at), deadline) for at in starts)
            )
        )

    async def _read_part(self, start: int, count: int, deadline: float) -> bytes | memoryview:
        found = await self._volume.read_present(start, count)
        if not isinstance(found, SparseBlocks):
            return found
        mapped = await self.map.bits(start, count, deadline)
        wanted = sum(mask(length) << first for first, length in found.absent) & mapped
        if not wanted:
            return found.data
        data = bytearray(found.data)
        windows = range(start // WINDOW_BLOCKS, (start + count - 1) // WINDOW_BLOCKS + 1)
        await asyncio.gather(*(self._copy(number, start, wanted, data, deadline) for number in windows))
        return memoryview(data)

    async def _copy(self, number: int, start: int, wanted: int, data: bytearray, deadline: float) -> None:
        """Put what is wanted of one window into `data`, whose first block is `start`."""
        skipped = number * WINDOW_BLOCKS - start
        inside = (wanted >> skipped if skipped >= 0 else wanted << -skipped) & mask(WINDOW_BLOCKS)
        if not inside:
            return
        window = await self._windows.get(number, deadline)
        if inside & ~window.mapped:
            raise Corrupt(f"the source maps blocks of window {number} and does not bring them")
        for first, length in runs_of(inside):
            at = (first + skipped) * BLOCK_SIZE
            data[at : at + length * BLOCK_SIZE] = window.blocks(first, length)

    def _read_ahead(self, start: int, count: int) -> None:
        """Of a guest that reads on and on: fetch the window behind this read before it is asked for."""
        sequential, self._read_up_to = start == self._read_up_to, start + count
        number = (start + count - 1) // WINDOW_BLOCKS + 1
        first = number * WINDOW_BLOCKS
        if sequential and self.map.known_bits(first, WINDOW_BLOCKS) & ~self.present.bits(first, WINDOW_BLOCKS):
            self._windows.expect(number)

    def _fill_window(self, window: Fetched) -> None:
        absent = window.mapped & ~self.present.bits(window.start, WINDOW_BLOCKS)
        for first, count in runs_of(absent):
            self.fills.offer(window.start + first, window.blocks(first, count))

    async def _shown(self, start: int, count: int) -> list[Shown]:
        """What replicas lack is the source's where that maps it. Of few shards of the source at once."""
        response = await self._volume.block_status(start, count, StatusQuery())
        if not response.source:
            return shown_runs(response)
        depths = Depths(response.pinned)
        runs: list[Shown] = []
        at = start
        stop = (start // SHARD_BLOCKS + _STATUS_SHARDS) * SHARD_BLOCKS
        for length, kind, generation in zip(response.counts, response.kinds, response.generations, strict=True):
            if kind == ABSENT:
                runs += await self._absent(at, min(at + length, stop), depths.of_source)
            else:
                runs.append(Shown(length, kind == DATA, depths.of(Generation(generation)), True))
            at += length
            if at >= stop:
                break
        return merged(runs)

    async def _absent(self, start: int, end: int, depth: int) -> list[Shown]:
        """Blocks that the replicas lack: content of the source, or zeroes that nobody has."""
        runs: list[Shown] = []
        async for _, count, mapped in self._parts(start, end, self._deadline(), gap=1):
            runs.append(Shown(count, mapped, depth if mapped else 0, not mapped))
        return runs

    async def _cache(self, start: int, count: int) -> None:
        """Fetch and fill what the source maps there and is not known to be here, one window after the other.

        One request of a volume at a time: else a few of them, of any length, would take all fetches from the guests.
        """
        end = min(start + count, self.client.block_count)
        async with self._caching:
            for shard in range(start // SHARD_BLOCKS, -(-end // SHARD_BLOCKS)):
                base = shard * SHARD_BLOCKS
                bitmap = await self.map.shard(shard, self._deadline())
                first = max(start - base, 0)
                wanted = bits_of(bitmap, first, min(end - base, SHARD_BLOCKS) - first) << first
                for number in _windows_of(wanted & ~self.present.bits(base, SHARD_BLOCKS)):
                    await self.fills.room()
                    if self.fills.closed:
                        return  # all that the source has is here
                    await self._windows.get(base // WINDOW_BLOCKS + number, self._deadline())

    # ---- changes

    def _written(self, start: int, count: int, future: "asyncio.Future[None]") -> None:
        if not future.cancelled() and future.exception() is None:
            self.present.add(start, count)

    async def _zero(self, start: int, count: int, zero: Zeroes) -> None:
        deadline = self._deadline()
        waiting: list[asyncio.Future[None]] = []
        async for first, length, mapped in self._parts(start, start + count, deadline):
            waiting.append(zero(first, length) if mapped else self._volume.discard(first, length))
            if len(waiting) >= _PARTS_IN_FLIGHT:
                await asyncio.gather(*waiting)
                waiting.clear()
        await asyncio.gather(*waiting)
        self.present.add(start, count)

    async def _parts(
        self, start: int, end: int, deadline: float, gap: int = _NARROW_GAP
    ) -> AsyncIterator[tuple[int, int, bool]]:
        """The blocks [start, end) in parts: first block, count, whether the source maps some of it.

        What has nothing to do with the source stays together, however long it is. gap: as for _mapped_ranges.
        """
        at = start
        for shard in range(start // SHARD_BLOCKS, min(self.map.shard_count, -(-end // SHARD_BLOCKS))):
            bitmap = await self.map.shard(shard, deadline)
            base = shard * SHARD_BLOCKS
            for first, last in _mapped_ranges(bitmap, max(0, start - base), min(SHARD_BLOCKS, end - base), gap):
                if at < base + first:
                    yield at, base + first - at, False
                yield base + first, last - first, True
                at = base + last
        if at < end:
            yield at, end - at, False


def _windows_of(bits: int) -> Iterator[int]:
    """The windows, counted from the first bit's, that have a bit set, in order."""
    number = 0
    while bits:
        skipped = ((bits & -bits).bit_length() - 1) // WINDOW_BLOCKS
        number += skipped
        yield number
        number += 1
        bits >>= (skipped + 1) * WINDOW_BLOCKS


def _mapped_ranges(bitmap: bytes, start: int, end: int, gap: int = _NARROW_GAP) -> Iterator[tuple[int, int]]:
    """The ranges [first, last) of [start, end) that a bitmap maps; those with less than `gap` between them as one.

    A zero entry for a block that is not mapped is right, too: a few of them are cheaper than many operations.
    """
    first = last = start
    if bitmap:
        for extent in range(start // EXTENT_BLOCKS * EXTENT_BLOCKS, end, EXTENT_BLOCKS):
            low = max(start, extent)
            for skipped, count in runs_of(bits_of(bitmap, low, min(end, extent + EXTENT_BLOCKS) - low)):
                if low + skipped - last >= gap:
                    if first < last:
                        yield first, last
                    first = low + skipped
                elif first == last:
                    first = low + skipped
                last = low + skipped + count
    if first < last:
        yield first, last
