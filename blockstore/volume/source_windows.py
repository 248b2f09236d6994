"""A source's blocks for guests who wait: fetched in aligned windows, each once however many ask.

A window is what one frame of the snapshot usually holds, so a call costs the store one read. Windows that
were fetched are kept for a while: until their fill is committed, reads find their blocks absent still; and who
reads part of one usually reads the rest. What is fetched ahead (`expect`) is nobody's wait, and dropped where it fails.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from blockstore.volume.single_flight import SingleFlight
from blockstore.volume.source_client import Fetched

WINDOW_BLOCKS: Final = 64
#: 8 MiB for each volume that hydrates.
_KEPT_WINDOWS: Final = 32
#: Calls at once, whoever waits: snapshotd shares its threads among all volumes.
_CALLS: Final = 8


class WindowSource(Protocol):
    """Whom windows are fetched from: SourceClient, or whatever else has blocks that do not change."""

    @property
    def block_count(self) -> int:
        """Blocks that it has."""

    async def fetch(self, start: int, count: int, *, background: bool) -> Fetched:
        """Blocks [start, start + count)."""

    async def patiently(self, attempt: Callable[[], Awaitable[Fetched]], deadline: float) -> Fetched:
        """`attempt`, again and again until the loop's time `deadline`."""


class SourceWindows:
    """By number: a window's first block / WINDOW_BLOCKS. fetched: told of each that arrives, once."""

    def __init__(self, client: WindowSource, fetched: Callable[[Fetched], None]) -> None:
        self._client = client
        self._fetched = fetched
        self._kept: OrderedDict[int, Fetched] = OrderedDict()
        self._fetching: SingleFlight[int, Fetched] = SingleFlight()
        self._calls = asyncio.Semaphore(_CALLS)

    async def get(self, number: int, deadline: float) -> Fetched:
        """Raises QuorumUnavailable at the loop's time `deadline`, Corrupt."""
        kept = self._kept.get(number)
        if kept is not None:
            self._kept.move_to_end(number)
            return kept
        return await self._client.patiently(lambda: self._fetching.get(number, lambda: self._fetch(number)), deadline)

    def expect(self, number: int) -> None:
        """Somebody will ask for it soon."""
        if number not in self._kept and number not in self._fetching:
            self._fetching.begin(number, lambda: self._fetch(number))

    async def close(self) -> None:
        """Nobody asks any more: what is kept takes memory."""
        await self._fetching.close()
        self._kept.clear()

    async def _fetch(self, number: int) -> Fetched:
        start = number * WINDOW_BLOCKS
        count = min(WINDOW_BLOCKS, self._client.block_count - start)
        async with self._calls:
            window = await self._client.fetch(start, count, background=False)
        self._kept[number] = window
        if len(self._kept) > _KEPT_WINDOWS:
            self._kept.popitem(last=False)
        self._fetched(window)
        return window
