"""The background pass: everything that the source maps is fetched and filled, and then it is needed no more.

A pass asks a whole replica what is there, and copies the rest in order, several fetches at a time, behind the
guest and within the rate. After it comes another one: what was dropped on the way, or was too much to keep in
memory at once, is found again. A pass that finds nothing missing is the proof: a block that is there stays
there. Then the HYDRATED record is submitted, and once it is committed the volume is hydrated. So nothing has
to be remembered: a front-end that starts anew begins with a pass.

Whatever fails is waited for and tried again, for as long as the volume is open; `why` says what it is.
"""

import asyncio
from collections.abc import Iterator
from typing import Final

import structlog

from blockstore.errors import CairnError, Corrupt
from blockstore.rpc import control_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB
from blockstore.volume.block_bits import mask, runs_of
from blockstore.volume.hydrating_volume import HydratingVolume
from blockstore.volume.missing_blocks import Missing, find_missing
from blockstore.volume.open_volume import OpenVolume
from blockstore.volume.pace import Pace
from blockstore.volume.source_client import MAX_FETCH_BLOCKS, SHARD_BLOCKS
from blockstore.volume.source_windows import WINDOW_BLOCKS

_log = structlog.get_logger(__name__)
#: Each of at most 1 MiB: enough that snapshotd reads and unpacks some while others are on their way.
_FETCHES: Final = 4
#: Nobody waits for it: the next pass would only ask for the same again.
_PATIENCE_S: Final = 3600.0
_PAUSE_S: Final = 1.0
#: A quarter of what the log retains for a member that is behind: guests' writes come on top.
_LAG_BYTES: Final = 16 * MIB


class Hydration:
    """Of one volume at one epoch. `hydrated` is done when the volume needs its source no more."""

    def __init__(
        self,
        volume: OpenVolume,
        hydrating: HydratingVolume,
        pace: Pace | None = None,
        turn: asyncio.Lock | None = None,
    ) -> None:
        """pace, turn: shared with the other segments of the volume; one of them copies at a time."""
        self._loop = asyncio.get_running_loop()
        self.hydrated: asyncio.Future[None] = self._loop.create_future()
        self._volume = volume
        self._hydrating = hydrating
        self._pace = pace or Pace(hydrating.activity)
        self._turn = turn or asyncio.Lock()
        self._running = asyncio.Event()
        self._running.set()
        self._missing = Missing()
        self._filled_before = 0
        self._why = ""
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(self._ended)
        volume.over.add_done_callback(lambda _: self._task.cancel())

    def set(self, wanted: pb.Hydration) -> None:
        """Rate and pause, as control wants them now."""
        self._pace.limit.set(wanted.rate_bytes)
        if wanted.paused:
            self._running.clear()
        else:
            self._running.set()

    def report(self) -> pb.Hydration:
        """How far it is."""
        filled = self._hydrating.fills.filled_blocks - self._filled_before
        total = self._missing.blocks_total
        return pb.Hydration(
            blocks_total=total,
            blocks_done=min(self._missing.blocks_done + filled, total),
            rate_bytes=self._pace.limit.rate_bytes,
            paused=not self._running.is_set(),
            rate_now_bytes=self._pace.rate_now_bytes,
            why=self._trouble(),
        )

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """A defect here leaves the volume as it is: served, and in need of its source."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._why = f"the background pass failed in a way that nobody foresaw: {error!r}; attach the volume anew"
            _log.error("hydration has ended", volume=self._volume.volume, exc_info=error)

    def _trouble(self) -> str:
        if self.hydrated.done():
            return ""
        if not self._running.is_set():
            return "paused"
        return self._why or self._hydrating.client.trouble

    # ---- passes

    async def _run(self) -> None:
        while not self.hydrated.done():
            try:
                await self._pass()
            except CairnError as error:
                self._note(error)
                await asyncio.sleep(_PAUSE_S)

    async def _pass(self) -> None:
        before, self._missing = self._missing, await self._find_missing()
        self._why = ""
        if not self._missing.shards:
            await self._hydrating.finish()
            # Else nobody would know before the next attachment, where this one ends now.
            await self._volume.wait_until_known(self._volume.status().commit)
            _log.info("volume is hydrated", volume=self._volume.volume)
            self.hydrated.set_result(None)
            return
        if before.shards and self._missing.blocks_done <= before.blocks_done:
            # What was thought to be there is not listed: then nothing is thought to be, and there is no hurry.
            self._hydrating.present.forget()
            await asyncio.sleep(_PAUSE_S)
        async with self._turn:
            await self._copy(self._missing)

    async def _find_missing(self) -> Missing:
        hydrating = self._hydrating
        changes = self._volume.members.changes(self._volume.status().commit)
        deadline = self._loop.time() + _PATIENCE_S
        try:
            missing = await find_missing(hydrating.map, changes, hydrating.present, deadline)
        finally:
            await changes.aclose()
        self._filled_before = hydrating.fills.filled_blocks
        _log.info(
            "blocks of the source counted",
            volume=self._volume.volume,
            done=missing.blocks_done,
            total=missing.blocks_total,
        )
        return missing

    def _note(self, error: CairnError) -> None:
        if str(error) != self._why:
            _log.warning("hydration does not go on", volume=self._volume.volume, error=str(error))
        self._why = str(error)

    async def _copy(self, missing: Missing) -> None:
        """Fetch and fill what is missing; returns once all of that is in the log. Raises where a fill failed."""
        self._hydrating.fills.trouble = None
        tasks: set[asyncio.Task[None]] = set()
        try:
            for start, wanted in self._parts(missing):
                await self._running.wait()
                while len(tasks) >= (1 if self._hydrating.activity.busy else _FETCHES):
                    tasks = await _go_on(tasks)
                await self._volume.wait_for_slow_members(_LAG_BYTES)
                self._raise_trouble()
                tasks.add(self._loop.create_task(self._copy_part(start, wanted)))
            while tasks:
                tasks = await _go_on(tasks)
            await self._hydrating.fills.idle()
            self._raise_trouble()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _raise_trouble(self) -> None:
        if self._hydrating.fills.trouble is not None:
            raise self._hydrating.fills.trouble

    def _parts(self, missing: Missing) -> Iterator[tuple[int, int]]:
        """What is missing, in the pieces that are fetched: first block, and bits from there on.

        Small ones while a guest is busy: its requests wait behind one of them.
        """
        for shard, bits in missing.shards.items():
            first = 0
            while first < SHARD_BLOCKS:
                size = WINDOW_BLOCKS if self._hydrating.activity.busy else MAX_FETCH_BLOCKS
                size -= first % size
                wanted = bits >> first & mask(size)
                if wanted:
                    yield shard * SHARD_BLOCKS + first, wanted
                first += size

    async def _copy_part(self, start: int, wanted: int) -> None:
        """Of at most MAX_FETCH_BLOCKS from `start` on, those that are wanted and have not come meanwhile."""
        wanted &= ~self._hydrating.present.bits(start, MAX_FETCH_BLOCKS)
        if not wanted:
            return
        skipped = (wanted & -wanted).bit_length() - 1
        start, wanted = start + skipped, wanted >> skipped
        size_bytes = wanted.bit_count() * BLOCK_SIZE
        await self._pace.limit.before(size_bytes)
        began = self._loop.time()
        client = self._hydrating.client
        fetched = await client.patiently(
            lambda: client.fetch(start, wanted.bit_length(), background=True), began + _PATIENCE_S
        )
        if wanted & ~fetched.mapped:
            raise Corrupt(f"the source maps blocks from {start} on and does not bring them")
        for first, count in runs_of(wanted):
            await self._hydrating.fills.put(start + first, fetched.blocks(first, count))
        if self._hydrating.activity.busy:
            await self._hydrating.fills.idle()
        await self._pace.after(size_bytes, self._loop.time() - began)


async def _go_on(tasks: "set[asyncio.Task[None]]") -> "set[asyncio.Task[None]]":
    """Those of the tasks that are left once one more has ended. Raises what it raised."""
    done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    try:
        for task in done:
            task.result()
    except BaseException:
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        raise
    return left
