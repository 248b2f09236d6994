"""What the NBD server needs of a volume.

The front-end's volume and the RAM volume of the tests both are one; nothing here knows which.
"""

import asyncio
from typing import Protocol

from blockstore.units import Generation
from blockstore.volume.block_status import Changed, Shown

Buffer = bytes | bytearray | memoryview


class Volume(Protocol):
    """A volume, in whole blocks of BLOCK_SIZE.

    Every call returns at once with a future of the running loop, and starts no task of the caller's.
    Errors are those of blockstore.errors; they are raised, or come with the future. A volume holds
    its callers back by not completing. Ranges are inside the volume, of any length: it is the volume
    that divides them. A read sees every change that was complete when it was called.
    """

    @property
    def size_bytes(self) -> int:
        """A multiple of BLOCK_SIZE; it may grow, and never shrinks."""

    def read(self, start: int, count: int) -> "asyncio.Future[bytes | memoryview]":
        """`count` blocks from block `start` on."""

    def write(self, start: int, data: Buffer) -> "asyncio.Future[None]":
        """Write whole blocks from block `start` on; done means durable on a quorum.

        The caller does not change `data` any more, ever.
        """

    def trim(self, start: int, count: int) -> "asyncio.Future[None]":
        """Blocks that are not needed any more; they read as zeroes."""

    def zero(self, start: int, count: int, *, allocate: bool) -> "asyncio.Future[None]":
        """Blocks that read as zeroes from now on. allocate: a later write there finds its space."""

    @property
    def zero_is_fast(self) -> bool:
        """Whether `zero` of blocks always takes less than a write of them."""

    def cache(self, start: int, count: int) -> "asyncio.Future[None]":
        """Have blocks that are elsewhere brought here; done when they are, or at once where there is nothing to do."""

    def shown(self, start: int, count: int) -> "asyncio.Future[list[Shown]]":
        """What the blocks are, as runs from `start` on; they may end early. A block that is told to read as zeroes did
        so at some moment since the call.
        """

    def changed(self, start: int, count: int, snapshot: str) -> "asyncio.Future[list[Changed]]":
        """Which of them changed since a snapshot of this volume, given by its id; NotFound where it is not kept."""

    async def snapshots(self) -> dict[str, Generation]:
        """The snapshots that `changed` knows, oldest first, each with its generation in the first segment."""
        ...

    def flush(self) -> "asyncio.Future[None]":
        """Done once all that was complete when it was called is durable."""
