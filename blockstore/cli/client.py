"""Calls to control, each with a deadline, for commands that run once and end.

Whether control can be reached at all is settled before the first call, so that "nobody is there" and
"there is no quorum", which gRPC tells with one code, are told apart for people.
"""

import asyncio
import signal
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc

from blockstore.cli.ending import Terminated
from blockstore.errors import NotFound, QuorumUnavailable
from blockstore.grpc_endpoint import open_control_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.grpc_parts import Answer, whole
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import snapshot_pb2 as spb
from blockstore.rpc.control_pb2_grpc import ControlStub
from blockstore.rpc.snapshot_pb2_grpc import SnapshotsStub

if TYPE_CHECKING:
    # There is one class of each; the stubs tell its two uses apart.
    from blockstore.rpc.control_pb2_grpc import ControlAsyncStub
    from blockstore.rpc.snapshot_pb2_grpc import SnapshotsAsyncStub

#: A daemon that was just started may still be on its way to listening.
CONNECT_TIMEOUT_S: Final = 5.0
#: Of several controls, another one may be about to take over: a lease of 5 s by default, and an election.
TAKE_OVER_TIMEOUT_S: Final = 15.0
#: Creating, deleting and resizing wait for nodes; each of those calls has 5 s by default.
CALL_TIMEOUT_S: Final = 30.0
#: Opening a volume has 30 s at control by default; the answer comes after that.
ATTACH_TIMEOUT_S: Final = 45.0
#: Between two looks at something that is waited for.
POLL_S: Final = 0.2

Response = TypeVar("Response")
T = TypeVar("T")


class ControlClient:
    """Control at one address, or the active one of several. Each call raises the CairnError that control answered."""

    def __init__(self, address: str, stub: "ControlAsyncStub", snapshots: "SnapshotsAsyncStub") -> None:
        self.address = address
        self.stub = stub
        self.snapshots = snapshots

    async def call(
        self,
        method: Callable[..., Awaitable[Response]],
        request: Any,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Response:
        """What `method` of the stub answers to `request`."""
        with cairn_errors(f"control at {self.address}"):
            return await method(request, timeout=timeout_s)

    async def whole(
        self, method: Callable[..., AsyncIterable[Answer]], request: Any, timeout_s: float = CALL_TIMEOUT_S
    ) -> Answer:
        """The same of a method that answers in parts."""
        with cairn_errors(f"control at {self.address}"):
            return await whole(method(request, timeout=timeout_s))

    async def volume(self, volume: str) -> pb.Volume:
        """The volume of that id or name. Raises NotFound."""
        return await self.call(self.stub.GetVolume, pb.GetVolumeRequest(volume=volume))

    async def snapshot(self, snapshot: str) -> spb.Snapshot:
        """The snapshot of that id. Raises NotFound."""
        return await self.call(self.snapshots.GetSnapshot, spb.GetSnapshotRequest(snapshot=snapshot))

    async def status(self) -> pb.StatusResponse:
        """All that control knows."""
        return await self.whole(self.stub.Status, pb.StatusRequest())

    async def health(self, volume_id: str) -> pb.VolumeHealth | None:
        """How the volume of that id does; None where it is gone."""
        try:
            return await self.call(self.stub.GetVolumeHealth, pb.GetVolumeRequest(volume=volume_id))
        except NotFound:
            return None


@asynccontextmanager
async def connected(address: str, timeout_s: float | None = None) -> AsyncIterator[ControlClient]:
    """A client of control at `address`, or of the active one of several, with commas between them.

    timeout_s: None for what fits one, or several. Raises QuorumUnavailable where nothing answers there.
    """
    several = "," in address
    timeout_s = timeout_s or (TAKE_OVER_TIMEOUT_S if several else CONNECT_TIMEOUT_S)
    async with open_control_channel(address) as channel:
        try:
            async with asyncio.timeout(timeout_s):
                await channel.channel_ready()
        except (TimeoutError, grpc.aio.UsageError) as error:
            if several:
                raise QuorumUnavailable(
                    f"none of the controls at {address} is active: see what each says (`cairn status --control "
                    "HOST:PORT`), and whether etcd answers"
                ) from error
            raise QuorumUnavailable(
                f"no control answers at {address}: start a cluster with `cairn up`, "
                "or say where one is with --control HOST:PORT or CAIRN_CONTROL"
            ) from error
        yield ControlClient(address, ControlStub(channel), SnapshotsStub(channel))


def run_with_control(address: str, work: Callable[[ControlClient], Coroutine[Any, Any, T]]) -> T:
    """What `work` returns; it is given a client of control at `address`. Raises Terminated at SIGTERM."""
    terminated = False

    def terminate(working: "asyncio.Task[Any]") -> None:
        nonlocal terminated
        terminated = True
        working.cancel()

    async def connect_and_work() -> T:
        working = asyncio.current_task()
        assert working is not None
        if threading.current_thread() is threading.main_thread():  # no other one may
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate, working)
        async with connected(address) as client:
            return await work(client)

    try:
        return asyncio.run(connect_and_work())
    except asyncio.CancelledError:
        if terminated:
            raise Terminated from None
        raise


async def wait_until(check: Callable[[], Awaitable[T | None]], limit_s: float, give_up: Callable[[], Exception]) -> T:
    """The first answer of `check` that is not None. Raises what `give_up` makes after `limit_s` seconds."""
    deadline = asyncio.get_running_loop().time() + limit_s
    while True:
        found = await check()
        if found is not None:
            return found
        if asyncio.get_running_loop().time() >= deadline:
            raise give_up()
        await asyncio.sleep(POLL_S)
