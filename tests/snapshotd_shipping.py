"""What the tests of shipping share: real nodes, a store in memory, and a control that the test plays."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, cast

from blockstore.errors import AlreadyExists, CairnError, Fenced
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB, BlockNumber
from blockstore.volume.sealed_segment import NodeChannels
from snapshotd.control_client import ControlClient
from snapshotd.memory_store import MemoryStore
from snapshotd.root import Statistics
from snapshotd.ship import Ship, ShipParts
from tests.snapshot_parts import CLUSTER, CountingStore, Parts, opened, snapshot_id
from tests.stack import VOLUME, Stack, running_stack

SIZE = 8 * MIB


class PlayedControl:
    """Control's side of a ship. errors: what the next calls of `complete` raise, after (True) or before it counts."""

    def __init__(self) -> None:
        self.number = 1
        self.errors: list[tuple[bool, CairnError]] = []
        self.completed: dict[str, bytes] = {}
        self.failed: dict[str, str] = {}
        self.retries: dict[str, int] = {}
        """By snapshot, how often it was retried."""
        self.calls = 0
        self.before_complete: Callable[[], Awaitable[None]] | None = None

    @property
    def catalog(self) -> "PlayedControl":
        return self

    async def prune_number(self) -> int:
        return self.number

    async def complete(
        self, snapshot: str, root: bytes, statistics: Statistics, prune_number: int, retries: int
    ) -> None:
        self.calls += 1
        before, self.before_complete = self.before_complete, None
        if before is not None:
            await before()
        counts, error = self.errors.pop(0) if self.errors else (True, None)
        if prune_number != self.number:
            raise Fenced("the prune number has moved")
        if self.retries.get(snapshot, 0) != retries:
            raise Fenced("it was retried since")
        if self.completed.get(snapshot, root) != root:
            raise AlreadyExists(f"{snapshot} is completed with another root")
        if counts:
            self.completed[snapshot] = root
        if error is not None:
            raise error

    async def fail(self, snapshot: str, reason: str, retries: int) -> None:
        self.failed[snapshot] = reason


class Shipping:
    """One volume on three nodes, the parts of a daemon, and control."""

    def __init__(self, stack: Stack, parts: Parts, store: CountingStore) -> None:
        self.stack, self.parts, self.store = stack, parts, store
        self.control = PlayedControl()
        self.channels = NodeChannels()

    def task(self, number: int, generation: int, base: int = 0) -> pb.ShipTask:
        """Control's. base: the number of the snapshot that it is shipped as a change of; 0 for none."""
        segment = self.stack.where().segments[0]
        segment.size_bytes = SIZE
        snapshot = pb.Snapshot(
            id=snapshot_id(number), volume=VOLUME, volume_name="disk", size_bytes=SIZE, generation=generation
        )
        task = pb.ShipTask(snapshot=snapshot, segments=[segment], retries=self.control.retries.get(snapshot.id, 0))
        if base:
            task.base, task.base_generation = snapshot_id(base), base
            task.base_root = self.control.completed[task.base]
        return task

    def ship(self, number: int, generation: int, base: int = 0) -> Ship:
        task, parts = self.task(number, generation, base), self.parts
        control = cast(ControlClient, self.control)
        return Ship(
            task,
            ShipParts(parts.packs, parts.reader, control, self.channels, 5.0, asyncio.Semaphore(1), CLUSTER),
        )

    async def content(self, number: int) -> bytes:
        """As completed."""
        root = await self.parts.reader.root(snapshot_id(number), self.control.completed[snapshot_id(number)])
        return await self.parts.content(root)


@asynccontextmanager
async def shipping(tmp_path: Path) -> AsyncIterator[tuple[Shipping, Any, bytearray]]:
    store = CountingStore(MemoryStore())
    async with running_stack(tmp_path) as stack, opened(tmp_path, store) as parts:
        volume = await stack.open(SIZE)
        content = bytearray(SIZE)
        data = Random(1).randbytes(200 * BLOCK_SIZE)
        await volume.write(BlockNumber(50), data)
        content[50 * BLOCK_SIZE : 250 * BLOCK_SIZE] = data
        await volume.seal(snapshot_id(1).encode())
        here = Shipping(stack, parts, store)
        yield here, volume, content
        await here.channels.close()
