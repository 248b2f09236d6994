"""A snapshot's content, wherever it is: in the object store once it is whole there, on the nodes until then.

`StoredContent` asks snapshotd, as hydration does. `SealedContent` reads the sealed generations of the volume's
segments from replicas, as snapshotd does to ship them: the blocks that the nodes list are theirs, all others the
volume's source has, or they are zeroes. `SnapshotContent` is the one or the other. Where it fails, it asks where the
content is now, and takes that: a daemon at another address, or the object store in place of generations that
were given up since. So a reader goes on through all of it, and only waits.

Invariant: both show the same bytes, those of the instant, for as long as they show any: a generation is sealed, a
stored snapshot never changes, and what either needs is kept while it is read (blockstore/control/snapshot_reading.py).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol, TypeVar

import structlog

from blockstore.errors import CairnError, Corrupt, InvalidRequest, QuorumUnavailable
from blockstore.units import BLOCK_SIZE, FILL_GENERATION
from blockstore.volume.block_bits import mask, runs_of
from blockstore.volume.changes import Changes, Run
from blockstore.volume.sealed_segment import SealedSegment
from blockstore.volume.single_flight import SingleFlight
from blockstore.volume.source_client import Fetched, Source, SourceClient
from blockstore.volume.source_map import SourceMap

_log = structlog.get_logger(__name__)

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
#: How long one daemon after the other is tried before control is asked where they are now.
_ATTEMPT_S: Final = 2.0

Result = TypeVar("Result")


class Content(Protocol):
    """Blocks that do not change. Both calls raise what keeps them away; another attempt may do."""

    async def mapped(self, start: int, count: int) -> int:
        """Bit i: block start + i may have content; the others are zeroes."""

    async def fetch(self, start: int, count: int) -> Fetched:
        """Blocks [start, start + count), of one window of 64."""

    async def close(self) -> None:
        """Nobody asks any more."""


class StoredContent:
    """Of one snapshot in the object store."""

    def __init__(self, source: Source, call_timeout_s: float) -> None:
        self.client = SourceClient(source, call_timeout_s)
        self._map = SourceMap(self.client)

    async def mapped(self, start: int, count: int) -> int:
        return await self._map.bits(start, count, asyncio.get_running_loop().time() + _ATTEMPT_S)

    async def fetch(self, start: int, count: int) -> Fetched:
        return await self.client.fetch(start, count, background=False)

    async def close(self) -> None:
        await self._map.close()
        await self.client.close()


class SealedContent:
    """Of generations that are on the nodes. source: what the volume came from, where it had not all of it yet."""

    def __init__(self, segments: Sequence[SealedSegment], source: StoredContent | None) -> None:
        self.segments = segments
        self.source = source
        self._lists: dict[int, Changes] = {}
        """By the segment's index: the blocks that are the generations', not the source's."""
        self._listing: SingleFlight[int, Changes] = SingleFlight()

    async def mapped(self, start: int, count: int) -> int:
        bits = 0
        for index, first, inside, at in self._parts(start, count):
            bits |= (await self._list(index)).bits(first, inside) << at
        if self.source:
            bits |= await self.source.mapped(start, count)
        return bits

    async def fetch(self, start: int, count: int) -> Fetched:
        """In order: a run is the nodes' or the source's."""
        mapped, pieces = await self.mapped(start, count), []
        for index, first, inside, at in self._parts(start, count):
            ours = (await self._list(index)).bits(first, inside)
            wanted = mapped >> at & mask(inside)
            for run, length in runs_of(wanted):
                pieces += await self._read(index, first + run, ours >> run & mask(length), length, start + at + run)
        return Fetched(start, mapped, memoryview(b"".join(pieces)))

    async def close(self) -> None:
        await self._listing.close()
        if self.source:
            await self.source.close()

    async def _read(self, index: int, first: int, ours: int, length: int, number: int) -> list[memoryview]:
        """Blocks of one segment from its block `first` on, block `number` of the volume. ours: those of the nodes."""
        read = memoryview(b"")
        segment = self.segments[index]
        if ours:
            runs = [Run(first + start, count) for start, count in runs_of(ours)]
            read = await segment.read(segment.generation, runs)
        if ours == mask(length):
            return [read]
        assert self.source is not None
        fetched = await self.source.fetch(number, length)
        pieces = []
        for place in range(length):
            if ours >> place & 1:
                at = (ours & mask(place)).bit_count() * BLOCK_SIZE
                pieces.append(read[at : at + BLOCK_SIZE])
            else:
                pieces.append(fetched.blocks(place, 1))
        return pieces

    async def _list(self, index: int) -> Changes:
        """Listed once: it is sealed. Without a source the fills count as well: they are in generation 0."""
        if index not in self._lists:
            segment = self.segments[index]
            lowest = FILL_GENERATION + 1 if self.source else FILL_GENERATION
            self._lists[index] = await self._listing.get(
                index, lambda: segment.list_changes(lowest, segment.generation)
            )
        return self._lists[index]

    def _parts(self, start: int, count: int) -> list[tuple[int, int, int, int]]:
        """What of the blocks each segment has: its index, its first block there, how many, the first one's place."""
        parts, base = [], 0
        for index, segment in enumerate(self.segments):
            first, end = max(start, base), min(start + count, base + segment.blocks)
            if first < end:
                parts.append((index, first - base, end - first, first - start))
            base += segment.blocks
        return parts


class SnapshotContent:
    """One snapshot of `size_bytes`, wherever it is.

    find: asks where it is now, and returns a new content in place of the present one, or None where that one goes on
    (perhaps at other addresses); raises where nobody knows.
    """

    def __init__(
        self,
        name: str,
        size_bytes: int,
        content: Content,
        find: Callable[[], Awaitable[Content | None]],
    ) -> None:
        self.size_bytes = size_bytes
        self._name = name
        self._content = content
        self._find = find
        self._finding: SingleFlight[str, bool] = SingleFlight()
        self._failed = ""
        """Why it could not be read, as it was logged last."""
        self._past: list[Content] = []
        """Somebody may be in the middle of a call to one of these."""

    @property
    def block_count(self) -> int:
        """A snapshot ends with a whole block."""
        return self.size_bytes // BLOCK_SIZE

    async def mapped(self, start: int, count: int, deadline: float) -> int:
        """Bit i: block start + i may have content; the others are zeroes. Raises as `patiently`."""
        return await self.patiently(lambda: self._content.mapped(start, count), deadline)

    async def fetch(self, start: int, count: int, *, background: bool) -> Fetched:
        """One attempt."""
        return await self._content.fetch(start, count)

    async def patiently(self, attempt: Callable[[], Awaitable[Result]], deadline: float) -> Result:
        """`attempt`, again and again until the loop's time `deadline`, with a look where the content is in between.

        Raises QuorumUnavailable then, and Corrupt at once where it is damaged, and nowhere else; the log says so once.
        """
        try:
            return await self._try_on(attempt, deadline)
        except CairnError as error:
            if str(error) != self._failed:
                _log.error("a snapshot cannot be read; its clients get errors", snapshot=self._name, error=str(error))
                self._failed = str(error)
            raise

    async def _try_on(self, attempt: Callable[[], Awaitable[Result]], deadline: float) -> Result:
        loop, pause_s = asyncio.get_running_loop(), _FIRST_PAUSE_S
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    return await attempt()
            except InvalidRequest:
                raise
            except TimeoutError:
                raise QuorumUnavailable(f"{self._name} cannot be read: no answer in time") from None
            except CairnError as error:
                moved = await self._look_again(deadline)
                if isinstance(error, Corrupt) and not moved:
                    raise
                if loop.time() + pause_s >= deadline:
                    raise QuorumUnavailable(f"{self._name} cannot be read: {error}") from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def close(self) -> None:
        await self._finding.close()
        for each in (self._content, *self._past):
            await each.close()

    async def _look_again(self, deadline: float) -> bool:
        """Whether there is another content now; one look for all who ask. A control that is away is no news."""
        try:
            async with asyncio.timeout_at(deadline):
                return await self._finding.get("", self._find_content)
        except TimeoutError:
            return False
        except CairnError as error:
            _log.info("nobody says where a snapshot is now", snapshot=self._name, error=str(error))
            return False

    async def _find_content(self) -> bool:
        found = await self._find()
        if found is None:
            return False
        self._past.append(self._content)
        self._content = found
        return True
