"""A source's blocks for guests who wait: fetched in aligned windows, each once however many ask.

A window is what one frame of the snapshot usually holds, so a call costs the store one read. Windows that
were fetched are kept for a while: until their fill is committed, reads find their blocks absent still.
What is fetched ahead (`expect`) is nobody's wait, and dropped where it fails.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from blockstore.units import BLOCK_SIZE
from blockstore.volume.single_flight import SingleFlight
from blockstore.volume.source_client import Fetched, SourceClient

WINDOW_BLOCKS: Final = 64
#: 8 MiB for each volume that hydrates.
_KEPT_WINDOWS: Final = 32
#: Calls at once, whoever waits: snapshotd shares its threads among all volumes.
_CALLS: Final = 8


class Window:
    """The blocks of one window that the source maps. number: of the window, its first block / WINDOW_BLOCKS."""

    __slots__ = ("_payload", "mapped", "number")

    def __init__(self, number: int, fetched: Fetched) -> None:
        self.number = number
        self.mapped = fetched.mapped
        self._payload = fetched.payload

    @property
    def start(self) -> int:
        return self.number * WINDOW_BLOCKS

    def blocks(self, first: int, count: int) -> memoryview:
        """Blocks [first, first + count), counted from the window's first; all of them are mapped."""
        assert (self.mapped >> first) & ((1 << count) - 1) == (1 << count) - 1
        at = (self.mapped & ((1 << first) - 1)).bit_count() * BLOCK_SIZE
        return self._payload[at : at + count * BLOCK_SIZE]


class SourceWindows:
    """fetched: told of each window that arrives, once."""

    def __init__(self, client: SourceClient, fetched: Callable[[Window], None]) -> None:
        self._client = client
        self._fetched = fetched
        self._kept: OrderedDict[int, Window] = OrderedDict()
        self._fetching: SingleFlight[int, Window] = SingleFlight()
        self._calls = asyncio.Semaphore(_CALLS)

    async def get(self, number: int, deadline: float) -> Window:
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
        await self._fetching.close()

    async def _fetch(self, number: int) -> Window:
        start = number * WINDOW_BLOCKS
        count = min(WINDOW_BLOCKS, self._client.block_count - start)
        async with self._calls:
            window = Window(number, await self._client.fetch(start, count, background=False))
        self._kept[number] = window
        if len(self._kept) > _KEPT_WINDOWS:
            self._kept.popitem(last=False)
        self._fetched(window)
        return window
