"""What service SnapshotStore does with whole snapshots, beside serving their blocks: verify, diff, export, and so on.

Long calls stream how far they are and end with what they found. A call that is cancelled stops its work: each is
one chain of generators, closed from here. None holds more in memory than what its module says.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc

from blockstore.domain import SnapshotId, check_id, make_id
from blockstore.errors import Corrupt, InvalidRequest, NotFound
from blockstore.rpc import snapshot_pb2 as pb
from snapshotd import adopt, check, prune, statistics, verify
from snapshotd.diff import diff
from snapshotd.export import export
from snapshotd.export_frames import export_frames
from snapshotd.import_image import Chunk, ImageFacts, import_image
from snapshotd.keyring import Keyring
from snapshotd.pack_store import PackStore
from snapshotd.prune_plan import DEFAULT_REPACK_SHARE
from snapshotd.reader import SnapshotReader
from snapshotd.repository import Repository
from snapshotd.root import Root
from snapshotd.roots import Catalog
from snapshotd.totals import PruneTotals, ServedTotals

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext

#: Ranges in one message: some 20 KiB.
_RANGES_AT_ONCE: Final = 1024


@dataclass(frozen=True, slots=True)
class ChainParts:
    """What the daemon has. cluster: its id, the owner of the repository. keyring: opens the keyring as it is now."""

    repository: Repository
    packs: PackStore
    reader: SnapshotReader
    catalog: Catalog
    cluster: str
    keyring: Callable[[], Keyring]


class ChainService:
    """The methods have the names and shapes of service SnapshotStore; errors leave as CairnError."""

    def __init__(self, parts: ChainParts) -> None:
        self.served = ServedTotals()
        self.pruned = PruneTotals()
        self._parts = parts
        self._importing: set[str] = set()
        """Snapshots that are being imported here: control does not know them yet, so prune is told by us."""

    async def Verify(self, request: pb.VerifyRequest, context: Context) -> AsyncIterator[pb.VerifyResponse]:
        work = verify.verify(
            self._parts.repository,
            self._parts.catalog,
            self._parts.keyring,
            [check_id("snap", each) for each in request.snapshots],
            sample=request.sample or 1.0,
            seed=secrets.token_bytes(8),
        )
        async with aclosing(work) as progress:
            async for each in progress:
                yield verify.to_message(each)

    async def Diff(self, request: pb.DiffRequest, context: Context) -> AsyncIterator[pb.DiffResponse]:
        before = await self._root(getattr(request, "from")) if getattr(request, "from") else None
        after = await self._root(request.to)
        ranges: list[pb.ByteRange] = []
        async with aclosing(diff(self._parts.reader, before, after)) as found:
            async for each in found:
                ranges.append(pb.ByteRange(offset=each.offset, size=each.size, zero=each.zero))
                if len(ranges) == _RANGES_AT_ONCE:
                    yield pb.DiffResponse(ranges=ranges)
                    ranges = []
        if ranges:
            yield pb.DiffResponse(ranges=ranges)

    async def Export(self, request: pb.ExportRequest, context: Context) -> AsyncIterator[pb.ExportResponse]:
        root = await self._root(request.snapshot)
        if request.frames:
            async with aclosing(export_frames(self._parts.reader, root)) as messages:
                async for message in messages:
                    yield message
            return
        async with aclosing(export(self._parts.reader, root, request.offset, request.size)) as pieces:
            async for piece in pieces:
                yield pb.ExportResponse(offset=piece.offset, data=piece.data)

    async def Import(self, request_iterator: AsyncIterator[pb.ImportRequest], context: Context) -> pb.Snapshot:
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None:
            raise InvalidRequest("an import begins with the image's size")
        snapshot = make_id("snap", secrets.token_bytes(9))
        facts = ImageFacts(snapshot, first.size_bytes, first.description, dict(first.tags), time.time_ns() // 1_000_000)
        self._importing.add(snapshot)
        try:
            parts = self._parts
            chunks = _chunks(first, requests)
            return await import_image(parts.packs, parts.reader, parts.catalog, facts, chunks, cluster=parts.cluster)
        finally:
            self._importing.discard(snapshot)

    async def Prune(self, request: pb.PruneRequest, context: Context) -> AsyncIterator[pb.PruneResponse]:
        pruner = prune.Pruner(
            self._parts.repository,
            self._parts.catalog,
            request.repack_share if request.HasField("repack_share") else DEFAULT_REPACK_SHARE,
            lambda: frozenset(self._importing),
        )
        await self._parts.repository.check_owner(self._parts.cluster)
        self.pruned.begun += not request.dry_run
        async with aclosing(pruner.run(dry_run=request.dry_run)) as progress:
            async for each in progress:
                self._count(each)
                yield prune.to_progress_message(each)

    def _count(self, progress: prune.Progress) -> None:
        """What a prune did, once it is through."""
        if progress.ended and progress.plan is not None:
            plan = prune.to_plan_message(progress.plan)
            self.pruned.ended += 1
            self.pruned.objects_deleted += plan.objects_deleted
            self.pruned.packs_repacked += plan.packs_repacked
            self.pruned.bytes_freed += plan.bytes_freed

    async def CheckStore(self, request: pb.CheckStoreRequest, context: Context) -> AsyncIterator[pb.CheckStoreResponse]:
        async with aclosing(check.check(self._parts.repository, self._parts.catalog, self._parts.keyring)) as progress:
            async for each in progress:
                yield check.to_message(each)

    async def StoreStatistics(
        self, request: pb.StoreStatisticsRequest, context: Context
    ) -> AsyncIterator[pb.StoreStatisticsResponse]:
        async with aclosing(statistics.statistics(self._parts.repository, self._parts.catalog)) as progress:
            async for each in progress:
                yield statistics.to_message(each)

    async def Adopt(self, request: pb.AdoptRequest, context: Context) -> AsyncIterator[pb.AdoptResponse]:
        repository = self._parts.repository
        if request.force:
            await repository.take_over(self._parts.cluster)
        await repository.check_owner(self._parts.cluster)
        async with aclosing(adopt.adopt(repository, self._parts.catalog)) as progress:
            async for each in progress:
                yield adopt.to_message(each)

    async def RotateKey(self, request: pb.RotateKeyRequest, context: Context) -> pb.RotateKeyResponse:
        # Another cluster's keyring would not open what this one's wraps, and the old ones go.
        await self._parts.repository.check_owner(self._parts.cluster)
        keyring = await asyncio.to_thread(self._parts.keyring)
        count = await self._parts.repository.rotate(keyring)
        return pb.RotateKeyResponse(key=keyring.description, rewrapped=count)

    async def _root(self, snapshot: str) -> Root:
        """The root of a completed snapshot. Raises NotFound where control knows none, Corrupt."""
        expected = await self._expected_root(snapshot)
        try:
            return await self._parts.reader.root(snapshot, expected)
        except Corrupt:
            await self._expected_root(snapshot)  # It may have been deleted meanwhile.
            raise

    async def _expected_root(self, snapshot: str) -> bytes:
        """Its SHA-256, as control has it. Raises NotFound where that knows no such completed snapshot."""
        name = SnapshotId(check_id("snap", snapshot))
        expected = (await self._parts.catalog.roots()).completed.get(name)
        if expected is None:
            raise NotFound(f"there is no completed snapshot {snapshot}: see `cairn snapshot list`")
        return expected


async def _chunks(first: pb.ImportRequest, others: AsyncIterator[pb.ImportRequest]) -> AsyncIterator[Chunk]:
    request: pb.ImportRequest | None = first
    while request is not None:
        if request.data:
            yield Chunk(request.offset, request.data)
        if request.last:
            return
        request = await anext(others, None)
    raise InvalidRequest("the image was cut off: its stream ended without saying that this was all; nothing was made")
