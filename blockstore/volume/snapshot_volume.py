"""A snapshot as a volume that is only read: bytes for NBD, in windows that are kept for a while.

Nothing is attached, no epoch is taken and nothing is written anywhere. Memory is bounded: windows of 256 KiB, 32 that
are kept and 8 on their way (blockstore/volume/source_windows.py), and the maps of what has content, 4 KiB for 128 MiB.
Who reads on and on finds the next window fetched.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

from blockstore.errors import CairnError, NotFound, ReadOnly
from blockstore.units import BLOCK_SIZE, Generation
from blockstore.volume.block_bits import mask, runs_of
from blockstore.volume.block_status import Changed, Shown, merged
from blockstore.volume.snapshot_content import SnapshotContent
from blockstore.volume.source_client import SHARD_BLOCKS
from blockstore.volume.source_windows import WINDOW_BLOCKS, SourceWindows

#: Half of the windows that are kept.
_CACHED_WINDOWS: Final = 16
#: Whose maps one question what blocks are may need: 8 GiB of the snapshot.
_SHOWN_SHARDS: Final = 64


class SnapshotVolume:
    """One snapshot. patience_s: how long a read waits for whoever has the content; then it fails."""

    def __init__(self, content: SnapshotContent, patience_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._content = content
        self._patience_s = patience_s
        self._windows = SourceWindows(content, lambda _: None)
        self._behind = 0
        """The block behind the last read: who begins there reads on."""

    @property
    def size_bytes(self) -> int:
        return self._content.size_bytes

    def read(self, start: int, count: int) -> "asyncio.Future[bytes | memoryview]":
        """`count` blocks from block `start` on."""
        return self._loop.create_task(self._read(start, count))

    def write(self, start: int, data: object) -> "asyncio.Future[None]":
        return self._refuse()

    def trim(self, start: int, count: int) -> "asyncio.Future[None]":
        return self._refuse()

    def zero(self, start: int, count: int, *, allocate: bool) -> "asyncio.Future[None]":
        return self._refuse()

    @property
    def zero_is_fast(self) -> bool:
        return False

    def cache(self, start: int, count: int) -> "asyncio.Future[None]":
        """Begin to fetch as much of it as would be kept until it is read; nobody waits for that."""
        first, last = start // WINDOW_BLOCKS, (start + count - 1) // WINDOW_BLOCKS
        for number in range(first, min(last + 1, first + _CACHED_WINDOWS)):
            self._windows.expect(number)
        return self._nothing_to_do()

    def flush(self) -> "asyncio.Future[None]":
        """Nothing is ever written."""
        return self._nothing_to_do()

    def _nothing_to_do(self) -> "asyncio.Future[None]":
        done: asyncio.Future[None] = self._loop.create_future()
        done.set_result(None)
        return done

    async def mapped(self, start: int, count: int) -> int:
        """Bit i: block start + i may have content; the others are zeroes."""
        return await self._content.mapped(start, count, self._loop.time() + self._patience_s)

    def shown(self, start: int, count: int) -> "asyncio.Future[list[Shown]]":
        """What the snapshot has content for; of a few shards of its maps at once."""
        return self._loop.create_task(self._shown(start, count))

    def changed(self, start: int, count: int, snapshot: str) -> "asyncio.Future[list[Changed]]":
        raise NotFound(f"a snapshot does not tell what changed since {snapshot}: its volume does")

    async def snapshots(self) -> dict[str, Generation]:
        """None that changes are told since."""
        return {}

    async def close(self) -> None:
        """Nobody reads any more."""
        await self._windows.close()
        await self._content.close()

    async def _shown(self, start: int, count: int) -> list[Shown]:
        runs: list[Shown] = []
        at, end = start, start + min(count, _SHOWN_SHARDS * SHARD_BLOCKS)
        while at < end:
            size = min(SHARD_BLOCKS - at % SHARD_BLOCKS, end - at)
            told = 0
            for first, length in runs_of(await self.mapped(at, size)):
                if told < first:
                    runs.append(Shown(first - told, data=False, depth=0, here=True))
                runs.append(Shown(length, data=True, depth=1, here=False))
                told = first + length
            if told < size:
                runs.append(Shown(size - told, data=False, depth=0, here=True))
            at += size
        return merged(runs)

    def _refuse(self) -> "asyncio.Future[None]":
        raise ReadOnly("a snapshot is never changed: its clone can be, under its name with +rw behind it")

    async def _read(self, start: int, count: int) -> bytes | memoryview:
        deadline = self._loop.time() + self._patience_s
        reads_on, self._behind = start == self._behind, start + count
        bits = await self._content.mapped(start, count, deadline)
        if not bits:
            return bytes(count * BLOCK_SIZE)
        result = bytearray(count * BLOCK_SIZE)
        first, last = start // WINDOW_BLOCKS, (start + count - 1) // WINDOW_BLOCKS
        wanted: list[Coroutine[Any, Any, None]] = []
        for number in range(first, last + 1):
            base = number * WINDOW_BLOCKS
            low, high = max(base, start), min(base + WINDOW_BLOCKS, start + count)
            if inside := bits >> low - start & mask(high - low):
                wanted.append(
                    self._copy(number, low - base, inside, memoryview(result)[(low - start) * BLOCK_SIZE :], deadline)
                )
        if reads_on and (last + 1) * WINDOW_BLOCKS < self._content.block_count:
            self._windows.expect(last + 1)
        if len(wanted) == 1:
            await wanted[0]
        else:
            await _all(wanted)
        return memoryview(result)

    async def _copy(self, number: int, first: int, bits: int, into: memoryview, deadline: float) -> None:
        """Blocks of one window, counted from its block `first`; window and map need not be of one attempt."""
        window = await self._windows.get(number, deadline)
        for at, length in runs_of(bits & window.mapped >> first):
            content = window.blocks(first + at, length)
            into[at * BLOCK_SIZE : (at + length) * BLOCK_SIZE] = content


async def _all(reads: list[Coroutine[Any, Any, None]]) -> None:
    """All of them, side by side; the first that fails ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for read in reads:
                group.create_task(read)
    except* CairnError as failed:
        raise failed.exceptions[0] from None
