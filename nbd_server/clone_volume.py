"""A throw-away clone of a snapshot: reads from it, writes into an overlay of its own, all gone at the end.

Changes of one clone run one after the other, each in a thread, because a file's writes may wait for a disk; reads run
beside them. A change takes effect at its end, when the overlay's bits are set, and long zeroes a step at a time: the
event loop serves others between. Nothing of it is durable, and nothing has to be: FLUSH and FUA only promise what was
answered before, and that is in the page cache or on the disk.
"""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, Final, Protocol

from blockstore.errors import NotFound
from blockstore.units import BLOCK_SIZE, Generation
from blockstore.volume.block_bits import mask, runs_of
from blockstore.volume.block_status import Changed, Shown, merged
from blockstore.volume.source_client import SHARD_BLOCKS
from nbd_server.clone_overlay import CloneOverlay
from nbd_server.volume import Buffer

#: Blocks that are made zeroes at one stroke, 64 GiB: what is written there is looked at within a millisecond.
_ZERO_STEP: Final = 1 << 24


class Base(Protocol):
    """What is cloned: blocks that do not change."""

    @property
    def size_bytes(self) -> int:
        """A multiple of BLOCK_SIZE."""

    def read(self, start: int, count: int) -> Awaitable[bytes | memoryview]:
        """`count` blocks from block `start` on."""

    def cache(self, start: int, count: int) -> "asyncio.Future[None]":
        """They will be read soon."""

    def shown(self, start: int, count: int) -> Awaitable[list[Shown]]:
        """What they are, as runs that may end early."""


class CloneVolume:
    """`base` with what was written to `overlay` over it."""

    def __init__(self, base: Base, overlay: CloneOverlay) -> None:
        self._loop = asyncio.get_running_loop()
        self._base = base
        self._overlay = overlay
        self._changing = asyncio.Lock()

    @property
    def size_bytes(self) -> int:
        return self._base.size_bytes

    def read(self, start: int, count: int) -> "asyncio.Future[bytes | memoryview]":
        """`count` blocks from block `start` on."""
        return self._loop.create_task(self._read(start, count))

    def write(self, start: int, data: Buffer) -> "asyncio.Future[None]":
        """Done means that reads see it. NoSpace beyond what clones may hold."""
        return self._loop.create_task(self._write(start, data))

    def trim(self, start: int, count: int) -> "asyncio.Future[None]":
        """They read as zeroes."""
        return self._loop.create_task(self._zero(start, count))

    def zero(self, start: int, count: int, *, allocate: bool) -> "asyncio.Future[None]":
        """They read as zeroes. Space is not kept for them: a clone's space is what it has written."""
        return self._loop.create_task(self._zero(start, count))

    @property
    def zero_is_fast(self) -> bool:
        """It sets bits, and gives space back."""
        return True

    def cache(self, start: int, count: int) -> "asyncio.Future[None]":
        """What was written here is here."""
        return self._base.cache(start, count)

    def shown(self, start: int, count: int) -> "asyncio.Future[list[Shown]]":
        """The clone's own blocks are the first layer, those of the snapshot lie below; of one shard at most."""
        return self._loop.create_task(self._shown(start, min(count, SHARD_BLOCKS)))

    def changed(self, start: int, count: int, snapshot: str) -> "asyncio.Future[list[Changed]]":
        raise NotFound(f"a clone does not tell what changed since {snapshot}: the volume does")

    async def snapshots(self) -> dict[str, Generation]:
        """None that changes are told since."""
        return {}

    def flush(self) -> "asyncio.Future[None]":
        """What was answered can be read."""
        done: asyncio.Future[None] = self._loop.create_future()
        done.set_result(None)
        return done

    async def _read(self, start: int, count: int) -> bytes | memoryview:
        held, zero = self._overlay.held.bits(start, count), self._overlay.zero.bits(start, count)
        others = mask(count) & ~held & ~zero
        if others == mask(count):
            return await self._base.read(start, count)
        result = memoryview(bytearray(count * BLOCK_SIZE))

        async def copy(at: int, length: int, content: Awaitable[bytes | memoryview]) -> None:
            result[at * BLOCK_SIZE : (at + length) * BLOCK_SIZE] = await content

        parts: list[Coroutine[Any, Any, None]] = []
        for at, length in runs_of(others):
            parts.append(copy(at, length, self._base.read(start + at, length)))
        for at, length in runs_of(held):
            parts.append(copy(at, length, asyncio.to_thread(self._overlay.read, start + at, length)))
        await asyncio.gather(*parts)
        return result

    async def _shown(self, start: int, count: int) -> list[Shown]:
        runs: list[Shown] = []
        at = start
        for below in await self._base.shown(start, count):
            held, zero = self._overlay.held.bits(at, below.length), self._overlay.zero.bits(at, below.length)
            own = sorted([(*run, True) for run in runs_of(held)] + [(*run, False) for run in runs_of(zero)])
            lower = below._replace(depth=below.depth + 1) if below.depth else below
            told = 0
            for first, length, data in own:
                if told < first:
                    runs.append(lower._replace(length=first - told))
                runs.append(Shown(length, data, depth=1, here=True))
                told = first + length
            if told < below.length:
                runs.append(lower._replace(length=below.length - told))
            at += below.length
        return merged(runs)

    async def _write(self, start: int, data: Buffer) -> None:
        count = len(data) // BLOCK_SIZE
        async with self._changing:
            new = self._overlay.reserve(start, count)
            try:
                await asyncio.to_thread(self._overlay.write, start, data)
            except BaseException:
                self._overlay.release(new)
                raise
            self._overlay.keep(start, count, zero=False)

    async def _zero(self, start: int, count: int) -> None:
        async with self._changing:
            self._overlay.check_ranges()
            for first in range(start, start + count, _ZERO_STEP):
                await self._zero_step(first, min(_ZERO_STEP, start + count - first))
                await asyncio.sleep(0)

    async def _zero_step(self, start: int, count: int) -> None:
        freed = 0
        for at, length in self._overlay.held.runs(start, count):
            if await asyncio.to_thread(self._overlay.punch, at, length):
                freed += length
        self._overlay.keep(start, count, zero=True)
        self._overlay.release(freed)
