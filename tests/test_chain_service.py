"""The methods over gRPC: their streams, their errors, and a call that its client gives up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockstore.errors import Conflict, NotFound
from blockstore.grpc_endpoint import Endpoint, open_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.rpc import snapshot_pb2_grpc
from blockstore.units import MIB
from snapshotd.chain_service import ChainParts
from snapshotd.keyring import FileKeyring
from snapshotd.memory_store import MemoryStore
from snapshotd.service import add_snapshot_store_service
from tests.chain_parts import Chain, blocks, chain_at
from tests.snapshot_parts import CLUSTER, CountingStore, snapshot_id

SIZE = 8 * MIB
LIMIT_S = 60.0


class StuckStore(CountingStore):
    """Whole packs never come; it knows when who waited for one has gone."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.asked = asyncio.Event()
        self.given_up = asyncio.Event()

    async def get(self, key: str) -> bytes:
        if not key.startswith("packs/"):
            return await super().get(key)
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.given_up.set()
        raise AssertionError


@asynccontextmanager
async def _served(chain: Chain, directory: Path, cluster: str = CLUSTER) -> AsyncIterator[Any]:
    """A stub of the service of `chain`, in a cluster which may be another than the store's owner."""
    parts = chain.parts
    served = ChainParts(
        parts.repository,
        parts.packs,
        parts.reader,
        chain.catalog,
        cluster,
        lambda: FileKeyring(directory / "keyring"),
    )
    endpoint = Endpoint("127.0.0.1:0")
    add_snapshot_store_service(served, endpoint)
    await endpoint.start()
    channel = open_channel(endpoint.address)
    try:
        yield snapshot_pb2_grpc.SnapshotStoreStub(channel)
    finally:
        await channel.close(None)
        await endpoint.stop(0)


def test_a_call_that_is_given_up_stops_its_work(tmp_path: Path) -> None:
    async def check() -> None:
        store = StuckStore()
        async with chain_at(tmp_path, store) as chain, _served(chain, tmp_path) as stub:
            await chain.snapshot(1, SIZE, blocks(range(100)))
            call = stub.Verify(pb.VerifyRequest(), timeout=LIMIT_S)
            assert (await call.read()).progress.phase == "manifests"
            await asyncio.wait_for(store.asked.wait(), LIMIT_S)
            assert not store.given_up.is_set()
            call.cancel()
            await asyncio.wait_for(store.given_up.wait(), LIMIT_S)

    asyncio.run(check())


async def _whole(call: Any) -> None:
    """Until it has ended, whether it answers once or with a stream."""
    if isinstance(call, grpc.aio.UnaryStreamCall):
        async for _ in call:
            pass
    else:
        await call


@pytest.mark.parametrize("name", ["RotateKey", "Prune", "Import", "Adopt"])
def test_a_cluster_that_does_not_own_the_store_changes_nothing_in_it(tmp_path: Path, name: str) -> None:
    """Keys that it wraps anew are for its own keyring, and the owner's would be gone."""
    requests: dict[str, Any] = {
        "RotateKey": pb.RotateKeyRequest(),
        "Prune": pb.PruneRequest(),
        "Import": iter([pb.ImportRequest(size_bytes=SIZE, last=True)]),
        "Adopt": pb.AdoptRequest(),
    }

    async def check() -> None:
        store = MemoryStore()
        async with chain_at(tmp_path, CountingStore(store)) as chain, _served(chain, tmp_path, "another") as stub:
            await chain.snapshot(1, SIZE, blocks(range(10)))
            before = [info async for info in store.list()]
            with pytest.raises(Conflict, match="belongs to the cluster"), cairn_errors():
                await _whole(getattr(stub, name)(requests[name], timeout=LIMIT_S))
            assert [info async for info in store.list()] == before

    asyncio.run(check())


def test_every_stream_ends_with_what_it_found(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain, _served(chain, tmp_path) as stub:
            first = await chain.snapshot(1, SIZE, blocks(range(300)))
            await chain.snapshot(2, SIZE, blocks(range(5, 10), 3), first)
            calls = {
                "Verify": pb.VerifyRequest(),
                "Diff": pb.DiffRequest(**{"from": snapshot_id(1), "to": snapshot_id(2)}),
                "Export": pb.ExportRequest(snapshot=snapshot_id(2)),
                "Prune": pb.PruneRequest(),
                "CheckStore": pb.CheckStoreRequest(),
                "StoreStatistics": pb.StoreStatisticsRequest(),
                "Adopt": pb.AdoptRequest(),
            }
            last = {}
            for name, request in calls.items():
                async for each in getattr(stub, name)(request, timeout=LIMIT_S):
                    last[name] = each
            assert not last["Verify"].problems and not last["CheckStore"].problems  # noqa: PT018
            assert [each.size for each in last["Diff"].ranges] == [5 * 4096]
            assert last["Export"].offset + len(last["Export"].data) == 300 * 4096
            assert last["Prune"].done
            assert len(last["StoreStatistics"].snapshots) == 2
            assert last["Adopt"].progress.done == last["Adopt"].progress.total == 2
            with pytest.raises(NotFound), cairn_errors():
                async for _ in stub.Export(pb.ExportRequest(snapshot=snapshot_id(9)), timeout=LIMIT_S):
                    pass

    asyncio.run(check())
