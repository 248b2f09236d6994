"""What every kind of fault is, and what several of them are made of."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Final, TypeAlias, TypeVar

import grpc

from blockstore.rpc import snapshot_pb2
from tests.daemons import Daemon, wait_for
from tests.faults.fault_cluster import FaultCluster

Fault: TypeAlias = Callable[[FaultCluster, random.Random], AbstractContextManager[str]]
"""There for the `with` block and healed at its end. Chance says who is hit; what it yields is said in the report."""

#: The one that serves.
FRONT_END: Final = "front-end-0"
#: Of what stops and goes on: half of the time, for so long each.
_FLAP_S: Final = 0.05
_LIMIT_S: Final = 60.0
_AWAY: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

T = TypeVar("T")


def insist(call: Callable[[], T], limit_s: float = _LIMIT_S) -> T:
    """What it answers, asked again where no control was there, or the one that was asked went away."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() not in _AWAY or time.monotonic() > deadline:
                raise


def complete_and_delete(cluster: FaultCluster, snapshot: str) -> None:
    """One that is sealed; where a daemon gave it up, it is tried again."""

    def completed() -> bool:
        found = cluster.call("GetSnapshot", snapshot_pb2.GetSnapshotRequest(snapshot=snapshot))
        if found.state == snapshot_pb2.SNAPSHOT_STATE_ERROR:
            insist(lambda: cluster.call("RetrySnapshot", snapshot_pb2.RetrySnapshotRequest(snapshot=snapshot)))
        return bool(found.state == snapshot_pb2.SNAPSHOT_STATE_COMPLETED)

    wait_for(f"{snapshot} to be completed", completed)
    insist(lambda: cluster.call("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(snapshot=snapshot)))


@contextmanager
def killed(cluster: FaultCluster, daemons: Sequence[Daemon]) -> Iterator[str]:
    for daemon in daemons:
        daemon.kill()
    yield ", ".join(daemon.name for daemon in daemons)
    cluster.start(*daemons)


@contextmanager
def paused_now(daemon: Daemon) -> Iterator[str]:
    daemon.pause()
    try:
        yield daemon.name
    finally:
        daemon.resume()


@contextmanager
def healed(cluster: FaultCluster) -> Iterator[None]:
    """The network, at the end of the block."""
    try:
        yield
    finally:
        cluster.network.heal()


@contextmanager
def now_and_then(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """From a thread: begin, end, begin, end, until the block ends. Raises what they raised."""
    stopping = threading.Event()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            while not stopping.is_set():
                begin()
                stopping.wait(_FLAP_S)
                end()
                stopping.wait(_FLAP_S)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="now and then")
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
    if failure:
        raise failure[0]
