"""Calls to snapshotd, which control gives the address of. What it does takes long: it answers with streams."""

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from blockstore.cli.client import CALL_TIMEOUT_S, ControlClient, run_with_control
from blockstore.cli.meters import Amount, Meters, Rate
from blockstore.errors import QuorumUnavailable
from blockstore.grpc_endpoint import open_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.rpc.snapshot_pb2_grpc import SnapshotStoreStub

if TYPE_CHECKING:
    from blockstore.rpc.snapshot_pb2_grpc import SnapshotStoreAsyncStub

Response = TypeVar("Response")
T = TypeVar("T")


class _Working(Protocol):
    """A message of a stream that tells how far the work is."""

    @property
    def progress(self) -> pb.WorkProgress: ...

    def HasField(self, field_name: Any) -> bool: ...


Working = TypeVar("Working", bound=_Working)


class StoreClient:
    """snapshotd at one address. Each call raises the CairnError that it answered."""

    def __init__(self, address: str, stub: "SnapshotStoreAsyncStub", control: ControlClient) -> None:
        self.address = address
        self.stub = stub
        self.control = control

    async def call(
        self, method: Callable[..., Awaitable[Response]], request: Any, timeout_s: float = CALL_TIMEOUT_S
    ) -> Response:
        """What `method` of the stub answers to `request`."""
        with cairn_errors(f"snapshotd at {self.address}"):
            return await method(request, timeout=timeout_s)

    async def stream(self, method: Callable[..., AsyncIterable[Response]], request: Any) -> AsyncIterator[Response]:
        """The messages that `method` of the stub answers; probes of the connection find a peer that is gone."""
        with cairn_errors(f"snapshotd at {self.address}"):
            async for message in method(request):
                yield message

    async def work(
        self, method: Callable[..., AsyncIterable[Working]], request: Any, show: Meters
    ) -> AsyncIterator[Working]:
        """As `stream`, and `show` is told how far it is."""
        rate = Rate()
        async for message in self.stream(method, request):
            if message.HasField("progress"):
                show.update(message.progress.phase or "working", _amount(message.progress, rate))
            yield message


def _amount(value: pb.WorkProgress, rate: Rate) -> Amount:
    return Amount(value.done, value.total, value.unit, rate.after(value.done))


async def find_store(control: ControlClient) -> str:
    """The address of a snapshotd that is up. Raises QuorumUnavailable where none is."""
    answer = await control.whole(control.snapshots.GetStore, pb.GetStoreRequest())
    for each in answer.daemons:
        if each.up:
            return each.address
    known = ", ".join(f"{each.id} at {each.address} is down" for each in answer.daemons)
    raise QuorumUnavailable(
        f"no snapshotd is up{f' ({known})' if known else ''}: start it with `cairn snapshotd run`, "
        "or look at its log; `cairn up` runs one"
    )


@asynccontextmanager
async def store_connected(control: ControlClient) -> AsyncIterator[StoreClient]:
    """A client of a snapshotd that is up. Raises QuorumUnavailable where none is."""
    address = await find_store(control)
    async with open_channel(address) as channel:
        yield StoreClient(address, SnapshotStoreStub(channel), control)


def run_with_store(control_address: str, work: Callable[[StoreClient], Coroutine[Any, Any, T]]) -> T:
    """What `work` returns; it is given a client of a snapshotd of the cluster."""

    async def connect_and_work(control: ControlClient) -> T:
        async with store_connected(control) as store:
            return await work(store)

    return run_with_control(control_address, connect_and_work)
