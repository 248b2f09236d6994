"""A front-end with its NBD server and its gRPC service in this process, over the stack's nodes; control is the test."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from blockstore.config import FrontEndSettings, ShortCircuitMode
from blockstore.grpc_endpoint import Endpoint, open_channel
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import control_pb2_grpc
from nbd_server.exports import Exports
from nbd_server.front_end import FrontEnd
from nbd_server.limits import Limits
from nbd_server.server import NbdServer
from tests.nbd_client import NbdClient
from tests.stack import FAST, LIMIT_S, VOLUME, Stack


class ServedFrontEnd:
    """Calls as control makes them. Errors are grpc.RpcError, as they arrive there."""

    def __init__(self, front_end: FrontEnd, stub: Any, nbd_port: int) -> None:
        self.front_end = front_end
        self.stub = stub
        self._nbd_port = nbd_port

    async def open(self, ticket: pb.OpenTicket) -> None:
        request = pb.OpenVolumeRequest(front_end=self.front_end.id, instance=self.front_end.instance, ticket=ticket)
        await self.stub.OpenVolume(request, timeout=LIMIT_S)

    async def close(self, epoch: int) -> None:
        request = pb.CloseVolumeRequest(front_end=self.front_end.id, volume=VOLUME, epoch=epoch)
        await self.stub.CloseVolume(request, timeout=LIMIT_S)

    async def client(self, export: str = VOLUME) -> NbdClient:
        return await NbdClient.connect(f"nbd://127.0.0.1:{self._nbd_port}/{export}")

    async def hold(self, epoch: int, barrier: str, limit_s: float = 10.0) -> None:
        request = pb.HoldWritesRequest(
            front_end=self.front_end.id, volume=VOLUME, epoch=epoch, barrier=barrier, limit_s=limit_s
        )
        await self.stub.HoldWrites(request, timeout=LIMIT_S)

    async def release(self, epoch: int, barrier: str) -> bool:
        request = pb.ReleaseWritesRequest(front_end=self.front_end.id, volume=VOLUME, epoch=epoch, barrier=barrier)
        response: pb.ReleaseWritesResponse = await self.stub.ReleaseWrites(request, timeout=LIMIT_S)
        return response.held

    async def seal(self, epoch: int, snapshot: str, *, again: bool = False) -> pb.SealVolumeResponse:
        request = pb.SealVolumeRequest(
            front_end=self.front_end.id, volume=VOLUME, epoch=epoch, snapshot=snapshot, again=again
        )
        response: pb.SealVolumeResponse = await self.stub.SealVolume(request, timeout=LIMIT_S)
        return response

    async def unpin(self, epoch: int, generation: int, snapshot: str) -> None:
        request = pb.UnpinGenerationRequest(
            front_end=self.front_end.id, volume=VOLUME, epoch=epoch, generation=generation, snapshot=snapshot
        )
        await self.stub.UnpinGeneration(request, timeout=LIMIT_S)


@asynccontextmanager
async def serving_front_end(
    directory: Path, stack: Stack, retry_limit_s: float = 20.0, limits: Limits | None = None
) -> AsyncIterator[ServedFrontEnd]:
    """One front-end; control is nowhere, and not needed."""
    settings = FrontEndSettings(
        state=directory,
        control="127.0.0.1:1",
        call_timeout_s=2.0,
        lease_s=FAST.lease_s,
        drift_s=FAST.drift_s,
        retry_limit_s=retry_limit_s,
        short_circuit=ShortCircuitMode.NEVER,  # nodes of this process: LMDB opens an environment once in each
    )
    server = NbdServer(Exports(), limits)
    _, port = await server.listen_tcp("127.0.0.1", 0)
    front_end = FrontEnd(settings, server)
    endpoint = Endpoint("127.0.0.1:0")
    control_pb2_grpc.add_FrontEndServicer_to_server(front_end, endpoint.server)
    await endpoint.start()
    channel = open_channel(endpoint.address)
    try:
        yield ServedFrontEnd(front_end, control_pb2_grpc.FrontEndStub(channel), port)
    finally:
        await channel.close(None)
        await asyncio.wait_for(front_end.close(), LIMIT_S)
        await front_end.end()
        await server.close()
        await endpoint.stop(0)
