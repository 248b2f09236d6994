"""The SnapshotStore service: what front-ends fetch to hydrate volumes, and what people ask of stored snapshots.

A request is bounded before anything is read for it. What is asked for a guest comes before what is asked for the
background (snapshotd.gate); a call that its client gave up is given up here.
"""

from typing import TYPE_CHECKING, Any, Final

import grpc
import xxhash

from blockstore.domain import check_id
from blockstore.errors import InvalidRequest, OutOfRange
from blockstore.grpc_endpoint import Endpoint
from blockstore.grpc_payload import put_in
from blockstore.rpc import snapshot_pb2, snapshot_pb2_grpc
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import EXTENT_BLOCKS
from snapshotd.chain_service import ChainParts, ChainService
from snapshotd.crypto import NAME_SIZE
from snapshotd.manifest import SHARD_BLOCKS
from snapshotd.root import Root

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext

#: 1 MiB: the largest payload of any message.
MAX_FETCH_BLOCKS: Final = EXTENT_BLOCKS


def add_snapshot_store_service(parts: ChainParts, endpoint: Endpoint) -> "SnapshotStoreService":
    """Serve the repository at `endpoint`, the hot call with messages as bytes."""
    service = SnapshotStoreService(parts)
    fetch = grpc.unary_unary_rpc_method_handler(service.Fetch, pb.FetchRequest.FromString, None)
    name = snapshot_pb2.DESCRIPTOR.services_by_name["SnapshotStore"].full_name
    endpoint.add_service(name, snapshot_pb2_grpc.add_SnapshotStoreServicer_to_server, service, {"Fetch": fetch})
    return service


class SnapshotStoreService(ChainService, snapshot_pb2_grpc.SnapshotStoreServicer):
    """Blocks here, whole snapshots in ChainService. Errors leave it as CairnError; the endpoint translates them."""

    def __init__(self, parts: ChainParts) -> None:
        super().__init__(parts)
        self._reader = parts.reader

    async def MapShard(self, request: pb.MapShardRequest, context: Context) -> pb.MapShardResponse:
        root = await self._served_root(request.snapshot, request.root, background=False)
        if request.shard * SHARD_BLOCKS >= max(1, root.blocks):
            raise OutOfRange(f"shard {request.shard} of {root.snapshot}, which has {root.blocks} blocks")
        return pb.MapShardResponse(mapped=await self._reader.mapped(root, request.shard))

    async def Fetch(  # type: ignore[override]  # serialized by hand
        self, request: pb.FetchRequest, context: Context
    ) -> bytes:
        if not 0 < request.count <= MAX_FETCH_BLOCKS:
            raise InvalidRequest(f"{request.count} blocks in one call: 1 to {MAX_FETCH_BLOCKS}")
        root = await self._served_root(request.snapshot, request.root, background=request.background)
        mapped, payload = await self._reader.read(root, request.start, request.count, background=request.background)
        if request.background:
            self.served.background_bytes += len(payload)
        else:
            self.served.guest_bytes += len(payload)
        rest = pb.FetchResponse(mapped=mapped, checksum=xxhash.xxh3_64_intdigest(payload))
        return b"".join(put_in(rest, pb.FetchResponse.PAYLOAD_FIELD_NUMBER, [payload]))

    async def _served_root(self, snapshot: str, expected: bytes, *, background: bool) -> Root:
        check_id("snap", snapshot)
        if len(expected) != NAME_SIZE:
            raise InvalidRequest(f"a root's hash of {len(expected)} bytes: {NAME_SIZE} are needed")
        return await self._reader.root(snapshot, expected, background=background)
