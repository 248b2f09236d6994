"""A SnapshotStore server over blocks in memory: stands in for the snapshotd process, and does what it is told.

It answers over real gRPC as the real one does: bitmaps of what is mapped, checksums, errors by status. A test
may take it away, slow it down, make it fail, and count what was asked of it.
"""

import asyncio
from typing import Any

import xxhash

from blockstore.domain import make_id
from blockstore.errors import CairnError, InvalidRequest, NotFound
from blockstore.grpc_endpoint import Endpoint
from blockstore.rpc import control_pb2, snapshot_pb2_grpc
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE
from blockstore.volume.source_client import MAX_FETCH_BLOCKS, SHARD_BLOCKS
from tests.loopback import own_host

SNAPSHOT = make_id("snap", bytes(9))
ROOT = bytes(range(32))


class SnapshotSource(snapshot_pb2_grpc.SnapshotStoreServicer):
    """One snapshot of `size_bytes`. blocks: content by block number; what is not there is not mapped."""

    def __init__(self, blocks: dict[int, bytes], size_bytes: int) -> None:
        self.blocks = blocks
        self.size_bytes = size_bytes
        self.error: CairnError | None = None
        """What every call fails with."""
        self.flip = False
        """Payloads arrive with a bit flipped."""
        self.answering = asyncio.Event()
        self.answering.set()
        """Calls wait while it is clear."""
        self.fetched: list[tuple[int, int]] = []
        """Start and count of each Fetch."""
        self.maps = 0
        self._endpoint: Endpoint | None = None
        self.address = f"{own_host()}:0"  # where its port stays free while it is away

    @property
    def message(self) -> control_pb2.Source:
        """As a ticket names it."""
        return control_pb2.Source(snapshot=SNAPSHOT, root=ROOT, size_bytes=self.size_bytes, addresses=[self.address])

    def content(self, size_bytes: int) -> bytearray:
        """What a volume of that size shows that was made from it."""
        shown = bytearray(size_bytes)
        for number, block in self.blocks.items():
            shown[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE] = block
        return shown

    @property
    def fetched_blocks(self) -> int:
        return sum(count for _, count in self.fetched)

    # ---- the process

    async def start(self) -> None:
        """At the address that it had before, if any."""
        self._endpoint = Endpoint(self.address)
        snapshot_pb2_grpc.add_SnapshotStoreServicer_to_server(self, self._endpoint.server)
        await self._endpoint.start()
        self.address = self._endpoint.address

    async def stop(self) -> None:
        if self._endpoint is not None:
            endpoint, self._endpoint = self._endpoint, None
            await endpoint.stop(0)

    # ---- the service

    async def MapShard(self, request: pb.MapShardRequest, context: Any) -> pb.MapShardResponse:
        self.maps += 1
        await self._ready(request)
        bitmap = bytearray(SHARD_BLOCKS // 8)
        for number in self.blocks:
            shard, inside = divmod(number, SHARD_BLOCKS)
            if shard == request.shard:
                bitmap[inside // 8] |= 1 << inside % 8
        return pb.MapShardResponse(mapped=bytes(bitmap) if any(bitmap) else b"")

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> pb.FetchResponse:
        self.fetched.append((request.start, request.count))
        await self._ready(request)
        if not 0 < request.count <= MAX_FETCH_BLOCKS:
            raise InvalidRequest(f"{request.count} blocks in one fetch")
        found = [(i, self.blocks.get(request.start + i)) for i in range(request.count)]
        mapped = sum(1 << i for i, block in found if block is not None)
        payload = bytearray(b"".join(block for _, block in found if block is not None))
        checksum = xxhash.xxh3_64_intdigest(bytes(payload))
        if self.flip and payload:
            payload[-1] ^= 1
        return pb.FetchResponse(
            mapped=mapped.to_bytes((request.count + 7) // 8, "little"), payload=bytes(payload), checksum=checksum
        )

    async def _ready(self, request: pb.MapShardRequest | pb.FetchRequest) -> None:
        await self.answering.wait()
        if self.error is not None:
            raise self.error
        if (request.snapshot, request.root) != (SNAPSHOT, ROOT):
            raise NotFound(f"no snapshot {request.snapshot} with that root")
