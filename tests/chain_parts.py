"""ChainService over a store and the parts of snapshotd, with the catalog of roots in memory; and ways to do damage."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from blockstore.domain import SnapshotId
from blockstore.errors import Fenced, QuorumUnavailable
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE
from snapshotd.chain_service import ChainParts, ChainService
from snapshotd.inventory import load_quarantines
from snapshotd.keyring import FileKeyring
from snapshotd.memory_store import MemoryStore
from snapshotd.object_store import ObjectStore
from snapshotd.prune_plan import Marks, merge_marks
from snapshotd.root import Root
from snapshotd.root_objects import roots_of
from snapshotd.roots import Roots
from snapshotd.writer import SnapshotWriter
from tests.chain_schedule import MemoryControl, Record
from tests.snapshot_parts import CLUSTER, Parts, facts, opened, snapshot_id

#: Of one upload, while prunes follow one another without a pause.
_MAX_ATTEMPTS = 50
CONTEXT: Any = None
"""Of calls that are made without gRPC: no method looks at it."""


class LocalCatalog:
    """MemoryControl as the object store's upkeep sees it."""

    def __init__(self, control: MemoryControl | None = None) -> None:
        self.control = control or MemoryControl()

    async def roots(self) -> Roots:
        return self.control.roots()

    async def prune_number(self) -> int:
        return self.control.number

    async def raise_number(self, expected: int) -> int:
        return self.control.raise_number(expected)

    async def add(self, snapshot: pb.Snapshot, number: int) -> pb.Snapshot:
        return self.control.add(snapshot, number)

    async def snapshots(self) -> Mapping[SnapshotId, pb.Snapshot]:
        return self.control.snapshots()

    async def deleted(self, snapshots: Iterable[SnapshotId]) -> frozenset[SnapshotId]:
        return self.control.deleted & frozenset(snapshots)


@dataclass
class Chain:
    """One daemon's parts with its service."""

    parts: Parts
    catalog: LocalCatalog
    service: ChainService
    store: ObjectStore

    async def snapshot(self, number: int, size_bytes: int, changes: dict[int, bytes], base: Root | None = None) -> Root:
        """A completed snapshot; control knows it."""
        root, digest = await self.parts.snapshot(number, size_bytes, changes, base)
        self.catalog.control.records[SnapshotId(root.snapshot)] = Record(pb.SNAPSHOT_STATE_COMPLETED, {}, digest)
        return root

    async def upload(self, number: int, size_bytes: int, changes: dict[int, bytes]) -> bytes:
        """Write a snapshot beside prunes, by the rules that snapshotd.prune states for writers; its root's SHA-256.

        As often as a pack that it shares with another upload goes before it is indexed: so does snapshotd.ship.
        """
        self.catalog.control.records[SnapshotId(snapshot_id(number))] = Record(pb.SNAPSHOT_STATE_PENDING, {})
        for _ in range(_MAX_ATTEMPTS):
            writer = SnapshotWriter(self.parts.packs, self.parts.reader, snapshot_id(number), size_bytes)
            try:
                return await self._attempt(writer, facts(number, size_bytes), changes)
            except QuorumUnavailable:
                await writer.cancel()
        raise AssertionError(f"snapshot {number} did not complete in {_MAX_ATTEMPTS} attempts")

    async def _attempt(self, writer: SnapshotWriter, root: Root, changes: dict[int, bytes]) -> bytes:
        snapshot = SnapshotId(writer.snapshot)
        prune_number, marks = await self._look(snapshot)
        writer.shunned = marks
        for block, content in sorted(changes.items()):
            await writer.put_blocks(block, content)
        await writer.settle()
        while True:
            while await self.catalog.prune_number() != prune_number:
                prune_number, marks = await self._look(snapshot)
                writer.shunned = marks
                await writer.mend_shards(marks)
                for run in await writer.stale_runs(marks):
                    for block in range(run.start, run.start + run.length):
                        await writer.put_blocks(block, changes[block])
                await writer.settle()
            _, digest = await writer.finish(root)
            await asyncio.sleep(0)
            try:
                self.catalog.control.complete(snapshot, digest, prune_number)
                return digest
            except Fenced:
                continue

    async def _look(self, snapshot: str) -> tuple[int, Marks]:
        """The prune number, then the quarantines, then what is stored."""
        number = await self.catalog.prune_number()
        marks = merge_marks((await load_quarantines(self.parts.repository)).values())
        await self.parts.packs.look(snapshot)
        return number, marks

    async def delete(self, root: Root) -> None:
        """As control and a daemon do it."""
        for each in await roots_of(self.store, root.snapshot):
            await self.store.delete(each.key)
        self.parts.reader.forget_root(root.snapshot)
        del self.catalog.control.records[SnapshotId(root.snapshot)]

    async def prune(self, **request: Any) -> list[pb.PruneResponse]:
        return [each async for each in self.service.Prune(pb.PruneRequest(**request), CONTEXT)]

    async def verify(self, **request: Any) -> dict[str, set[str]]:
        """Problems: by object, the snapshots that need it."""
        responses = [each async for each in self.service.Verify(pb.VerifyRequest(**request), CONTEXT)]
        problems: dict[str, set[str]] = {}
        for each in responses[-1].problems:
            problems.setdefault(each.object, set()).update(each.snapshots)
        return problems

    async def check(self) -> pb.CheckStoreResponse:
        return [each async for each in self.service.CheckStore(pb.CheckStoreRequest(), CONTEXT)][-1]

    async def keys(self, folder: str = "") -> dict[str, int]:
        """Of all objects in the folder, with their sizes."""
        return {info.key: info.size async for info in self.store.list(folder)}


@asynccontextmanager
async def chain_at(
    directory: Path, store: ObjectStore | None = None, catalog: LocalCatalog | None = None
) -> AsyncIterator[Chain]:
    """A daemon's parts over `store` (default: memory), its keyring in `directory`."""
    store, catalog = store or MemoryStore(), catalog or LocalCatalog()
    async with opened(directory, store) as parts:
        service = ChainService(
            ChainParts(
                parts.repository,
                parts.packs,
                parts.reader,
                catalog,
                CLUSTER,
                lambda: FileKeyring(directory / "keyring"),
            )
        )
        yield Chain(parts, catalog, service, store)


def content(seed: int, size: int = BLOCK_SIZE) -> bytes:
    """Bytes that no other seed has."""
    return Random(seed).randbytes(size)


def blocks(numbers: range, seed: int = 0) -> dict[int, bytes]:
    """Different content for each block."""
    return {number: content(seed * 1_000_003 + number) for number in numbers}


async def exported(chain: Chain, **request: Any) -> dict[int, bytes]:
    """Snapshot 1 by offset, as Export gives it. request: its further fields."""
    return {
        each.offset: each.data
        async for each in chain.service.Export(pb.ExportRequest(snapshot=snapshot_id(1), **request), CONTEXT)
    }
