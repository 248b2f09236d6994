"""Control with nodes and front-ends around it, in one process: real gRPC, real metastore.

The nodes and front-ends are real servicers of their services that keep in memory which replicas and
volumes they have, and beat as real ones do; no I/O of a guest passes here. `CrashPoints` stops
control at its n-th step to the outside: from there on it does nothing any more, as if killed.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from blockstore.config import ControlSettings
from blockstore.control.daemon import assemble
from blockstore.control.metastore.embedded import open_embedded
from blockstore.control.metastore.interface import Metastore, Revision
from blockstore.control.peers import Peers
from blockstore.errors import CairnError, Conflict, Fenced
from blockstore.grpc_endpoint import Endpoint, open_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import control_pb2, control_pb2_grpc, replica_pb2, replica_pb2_grpc
from blockstore.units import GIB, MIB

LIMIT_S = 30
BEAT_S = 0.1
#: Long enough that a busy machine does not end a lease by accident.
LEASE_S = 3.0


async def until(condition: Callable[[], Awaitable[Any]], what: str) -> Any:
    """What `condition` gives as soon as that is true; fails after LIMIT_S seconds."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + LIMIT_S
    while loop.time() < give_up_at:
        if found := await asyncio.wait_for(condition(), LIMIT_S):
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"never came true: {what}")


def settings_for(directory: Path, **changes: Any) -> ControlSettings:
    values: dict[str, Any] = {"lease_s": LEASE_S, "reconcile_s": 0.1, "map_size_bytes": 16 * MIB, **changes}
    return ControlSettings(state=directory, listen="127.0.0.1:0", **values)


# ---- stopping control


class CrashPoints:
    """Counts control's steps to the outside; at number `stop_at` nothing goes on any more."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at = stop_at
        self.passed = 0
        self.stopped = asyncio.Event()

    async def step(self) -> None:
        """One step is about to be made, or was just made."""
        self.passed += 1
        if self.stopped.is_set() or self.passed == self.stop_at:
            self.stopped.set()
            await asyncio.Event().wait()


class CrashingStore:
    """A metastore that may stop before and after each transaction."""

    def __init__(self, store: Metastore, points: CrashPoints) -> None:
        self._store = store
        self._points = points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def transact(
        self, conditions: Mapping[str, Revision], puts: Mapping[str, bytes] | None = None, deletes: Iterable[str] = ()
    ) -> Revision | None:
        await self._points.step()
        revision = await self._store.transact(conditions, puts, deletes)
        await self._points.step()
        return revision


class CrashingPeers(Peers):
    """Calls that may stop before they leave, and after they were answered."""

    def __init__(self, settings: ControlSettings, points: CrashPoints) -> None:
        super().__init__(settings)
        self._points = points

    async def create(self, *arguments: Any) -> None:
        await self._between(super().create(*arguments))

    async def delete(self, *arguments: Any) -> None:
        await self._between(super().delete(*arguments))

    async def open_volume(self, *arguments: Any) -> None:
        await self._between(super().open_volume(*arguments))

    async def close_volume(self, *arguments: Any) -> None:
        await self._between(super().close_volume(*arguments))

    async def _between(self, call: Awaitable[None]) -> None:
        try:
            await self._points.step()
            await call
            await self._points.step()
        finally:
            if asyncio.iscoroutine(call):
                call.close()


# ---- control


@dataclass
class Control:
    """A running control and a client of it."""

    address: str
    stub: "control_pb2_grpc.ControlAsyncStub"
    channel: grpc.aio.Channel
    store: Metastore

    async def call(self, name: str, request: Any, timeout_s: float = LIMIT_S) -> Any:
        """One call of the Control service; raises errors of the tree."""
        with cairn_errors("control"):
            return await getattr(self.stub, name)(request, timeout=timeout_s)

    async def create(self, size_bytes: int = GIB, **fields: Any) -> control_pb2.Volume:
        request = control_pb2.CreateVolumeRequest(size_bytes=size_bytes, **fields)
        with cairn_errors("control"):
            return await self.stub.CreateVolume(request, timeout=LIMIT_S)

    async def attach(self, volume: str, **fields: Any) -> control_pb2.Volume:
        request = control_pb2.AttachVolumeRequest(volume=volume, **fields)
        with cairn_errors("control"):
            return await self.stub.AttachVolume(request, timeout=LIMIT_S)

    async def detach(self, volume: str, **fields: Any) -> control_pb2.Volume:
        request = control_pb2.DetachVolumeRequest(volume=volume, **fields)
        with cairn_errors("control"):
            return await self.stub.DetachVolume(request, timeout=LIMIT_S)

    async def delete(self, volume: str) -> control_pb2.DeleteVolumeResponse:
        with cairn_errors("control"):
            return await self.stub.DeleteVolume(control_pb2.DeleteVolumeRequest(volume=volume), timeout=LIMIT_S)

    async def get(self, volume: str) -> control_pb2.Volume:
        with cairn_errors("control"):
            return await self.stub.GetVolume(control_pb2.GetVolumeRequest(volume=volume), timeout=LIMIT_S)

    async def volumes(self) -> list[control_pb2.Volume]:
        return list((await self.call("ListVolumes", control_pb2.ListVolumesRequest())).volumes)

    async def status(self) -> control_pb2.StatusResponse:
        with cairn_errors("control"):
            return await self.stub.Status(control_pb2.StatusRequest(), timeout=LIMIT_S)


@asynccontextmanager
async def control_at(directory: Path, points: CrashPoints | None = None, **changes: Any) -> AsyncIterator[Control]:
    """Control on `directory`, killed at the end: nothing is said or saved when it goes."""
    settings = settings_for(directory, **changes)
    opened = open_embedded(settings.state, settings.map_size_bytes)
    store: Any = CrashingStore(opened, points) if points else opened
    peers = CrashingPeers(settings, points) if points else Peers(settings)
    endpoint, reconciler, _ = await assemble(settings, store, peers)
    await endpoint.start()
    reconciling = asyncio.ensure_future(reconciler.run())
    channel = open_channel(endpoint.address)
    try:
        yield Control(endpoint.address, control_pb2_grpc.ControlStub(channel), channel, opened)
    finally:
        await channel.close(None)
        await endpoint.stop(0)
        reconciling.cancel()
        await asyncio.gather(reconciling, return_exceptions=True)
        await peers.keep_only(())
        await opened.close()


# ---- what control calls


class Beating(ABC):
    """Registers with control and beats, as blockstore.heartbeat does, at whatever address control has now."""

    id: str

    def __init__(self) -> None:
        self.control = ""
        self.endpoint = Endpoint("127.0.0.1:0")
        self._beats: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.endpoint.start()
        self._beats = asyncio.ensure_future(self._beat())

    async def fall_silent(self) -> None:
        """Beat no more; it serves on."""
        if self._beats:
            self._beats.cancel()
            await asyncio.gather(self._beats, return_exceptions=True)

    async def stop(self) -> None:
        """Gone, without a word."""
        await self.fall_silent()
        await self.endpoint.stop(0)

    async def _beat(self) -> None:
        known = ""
        while True:
            if self.control:
                control, channel = self.control, open_channel(self.control)
                try:
                    with suppress(CairnError), cairn_errors("control"):
                        while control == self.control:
                            stub = control_pb2_grpc.ControlStub(channel)
                            if known != control:
                                await self.register(stub)
                                known = control
                            await self.report(stub)
                            await asyncio.sleep(BEAT_S)
                finally:
                    await channel.close(None)
            await asyncio.sleep(BEAT_S)

    @abstractmethod
    async def register(self, stub: Any) -> None: ...

    @abstractmethod
    async def report(self, stub: Any) -> None: ...


class MemoryNode(Beating, replica_pb2_grpc.ReplicaServicer):
    """A node whose replicas are names."""

    def __init__(self, number: int, zone: str = "") -> None:
        super().__init__()
        self.id = f"node-{number:017x}"
        self.zone = zone or f"zone-{number}"
        self.replicas: dict[str, replica_pb2.ReplicaStatus] = {}
        self.refuses: CairnError | None = None
        self.full = False
        self.used_bytes = 0
        self.known: dict[str, tuple[int, int]] = {}
        self.to_delete: set[str] = set()
        replica_pb2_grpc.add_ReplicaServicer_to_server(self, self.endpoint.server)

    @classmethod
    def make(cls, number: int, zone: str = "") -> "MemoryNode":
        """Of the data plane it serves only what control calls; gRPC answers UNIMPLEMENTED to the rest."""
        return cls(number, zone)

    async def restart(self) -> "MemoryNode":
        """The same node and its replicas in a new process, at another address."""
        await self.stop()
        again = MemoryNode.make(int(self.id[5:], 16), self.zone)
        again.replicas, again.control = self.replicas, self.control
        await again.start()
        return again

    async def Create(self, request: replica_pb2.CreateRequest, context: Any) -> replica_pb2.CreateResponse:
        if self.refuses:
            raise self.refuses
        assert not request.filling
        assert request.target.configuration == 1
        created = request.target.replica not in self.replicas
        if created:
            self.replicas[request.target.replica] = replica_pb2.ReplicaStatus(target=request.target, whole=True)
        return replica_pb2.CreateResponse(created=created)

    async def Delete(self, request: replica_pb2.DeleteRequest, context: Any) -> replica_pb2.DeleteResponse:
        if self.refuses:
            raise self.refuses
        return replica_pb2.DeleteResponse(deleted=self.replicas.pop(request.target.replica, None) is not None)

    async def register(self, stub: Any) -> None:
        request = control_pb2.RegisterNodeRequest(
            node=self.id, address=self.endpoint.address, zone=self.zone, capacity_bytes=100 * GIB
        )
        self._learn((await stub.RegisterNode(request, timeout=LIMIT_S)).known)

    async def report(self, stub: Any) -> None:
        request = control_pb2.NodeHeartbeatRequest(
            node=self.id,
            address=self.endpoint.address,
            capacity_bytes=100 * GIB,
            used_bytes=self.used_bytes,
            full=self.full,
            replicas=self.replicas.values(),
        )
        response = await stub.NodeHeartbeat(request, timeout=LIMIT_S)
        self._learn(response.known)
        self.to_delete |= {each.replica for each in response.delete}

    def _learn(self, known: Iterable[control_pb2.KnownPosition]) -> None:
        self.known.update({each.replica: (each.position.epoch, each.position.sequence) for each in known})


@dataclass
class Opened:
    """A volume that a front-end serves."""

    epoch: int
    size_bytes: int
    ticket: control_pb2.OpenTicket


class MemoryFrontEnd(Beating, control_pb2_grpc.FrontEndServicer):
    """A front-end whose volumes are numbers: it opens at once, or ends as it is told."""

    def __init__(self, number: int, instance: int = 1) -> None:
        super().__init__()
        self.id = f"fe-{number:017x}"
        self.instance = f"instance-{instance}"
        self.volumes: dict[str, Opened] = {}
        self.newest: dict[str, int] = {}
        self.outcome: CairnError | None = None
        self.says: dict[str, control_pb2.VolumeReport] = {}
        self.fenced = False
        self.opening = asyncio.Event()
        self.may_open = asyncio.Event()
        self.may_open.set()
        control_pb2_grpc.add_FrontEndServicer_to_server(self, self.endpoint.server)

    async def restart(self) -> "MemoryFrontEnd":
        """The same front-end in a new process: it has nothing open."""
        await self.stop()
        again = MemoryFrontEnd(int(self.id[3:], 16), int(self.instance.split("-")[1]) + 1)
        again.control = self.control
        await again.start()
        return again

    async def OpenVolume(self, request: control_pb2.OpenVolumeRequest, context: Any) -> control_pb2.OpenVolumeResponse:
        if (request.front_end, request.instance) != (self.id, self.instance):
            raise Conflict(f"{request.front_end}/{request.instance} is not {self.id}/{self.instance}")
        ticket = request.ticket
        self._check_newest(ticket)
        self.opening.set()
        await self.may_open.wait()
        if self.outcome:
            raise self.outcome
        self._open(ticket)
        return control_pb2.OpenVolumeResponse()

    async def CloseVolume(
        self, request: control_pb2.CloseVolumeRequest, context: Any
    ) -> control_pb2.CloseVolumeResponse:
        opened = self.volumes.get(request.volume)
        self.newest[request.volume] = max(self.newest.get(request.volume, 0), request.epoch + 1)
        if opened and opened.epoch <= request.epoch:
            del self.volumes[request.volume]
            return control_pb2.CloseVolumeResponse(closed=True)
        return control_pb2.CloseVolumeResponse(closed=False)

    async def ResizeVolume(
        self, request: control_pb2.ResizeExportRequest, context: Any
    ) -> control_pb2.ResizeExportResponse:
        self.volumes[request.volume].size_bytes = request.size_bytes
        return control_pb2.ResizeExportResponse()

    async def register(self, stub: Any) -> None:
        request = control_pb2.RegisterFrontEndRequest(
            front_end=self.id, instance=self.instance, address=self.endpoint.address, uris=["nbd://127.0.0.1:10809"]
        )
        for volume in (await stub.RegisterFrontEnd(request, timeout=LIMIT_S)).volumes:
            if volume not in self.volumes:
                renewal = control_pb2.RenewAttachmentRequest(volume=volume, front_end=self.id, instance=self.instance)
                self._open(await stub.RenewAttachment(renewal, timeout=LIMIT_S))

    async def report(self, stub: Any) -> None:
        request = control_pb2.FrontEndHeartbeatRequest(
            front_end=self.id,
            instance=self.instance,
            address=self.endpoint.address,
            uris=["nbd://127.0.0.1:10809"],
            volumes=[self._report(name, opened) for name, opened in self.volumes.items()],
        )
        try:
            with cairn_errors("control"):
                response = await stub.FrontEndHeartbeat(request, timeout=LIMIT_S)
        except Fenced:
            self.fenced = True
            raise
        current = {each.volume: each for each in response.attachments}
        for name in [name for name in self.volumes if name not in current]:
            del self.volumes[name]

    def _report(self, name: str, opened: Opened) -> control_pb2.VolumeReport:
        serving = control_pb2.VolumeReport(
            volume=name, epoch=opened.epoch, state=control_pb2.SERVING_STATE_SERVING, size_bytes=opened.size_bytes
        )
        for segment in opened.ticket.segments:
            for member in segment.configuration.members:
                serving.members.add(replica=member.replica, connected=True, whole=True)
        return self.says.get(name, serving)

    def _check_newest(self, ticket: control_pb2.OpenTicket) -> None:
        if ticket.epoch < self.newest.get(ticket.volume, 0):
            raise Fenced(f"epoch {ticket.epoch} of {ticket.volume} is over")
        self.newest[ticket.volume] = ticket.epoch

    def _open(self, ticket: control_pb2.OpenTicket) -> None:
        self._check_newest(ticket)
        self.volumes[ticket.volume] = Opened(ticket.epoch, ticket.size_bytes, ticket)


# ---- all of it


@dataclass
class Cluster:
    """Nodes and front-ends, which outlive any control."""

    directory: Path
    nodes: list[MemoryNode] = field(default_factory=list)
    front_ends: list[MemoryFrontEnd] = field(default_factory=list)

    @asynccontextmanager
    async def control(self, points: CrashPoints | None = None, **changes: Any) -> AsyncIterator[Control]:
        """A control that all nodes and front-ends know, and that has heard all of them."""
        async with control_at(self.directory, points, **changes) as control:
            for each in (*self.nodes, *self.front_ends):
                each.control = control.address
            await until(lambda: self._is_heard(control), "all are up")
            yield control

    async def _is_heard(self, control: Control) -> bool:
        status = await control.status()
        up = {node.id for node in status.nodes if node.up} | {each.id for each in status.front_ends if each.up}
        return up == {each.id for each in (*self.nodes, *self.front_ends)}

    def held(self) -> dict[str, str]:
        """Replica to node, of all replicas that exist."""
        return {replica: node.id for node in self.nodes for replica in node.replicas}


@asynccontextmanager
async def cluster_at(directory: Path, nodes: int = 3, front_ends: int = 1) -> AsyncIterator[Cluster]:
    cluster = Cluster(directory)
    cluster.nodes = [MemoryNode.make(number) for number in range(1, nodes + 1)]
    cluster.front_ends = [MemoryFrontEnd(number) for number in range(1, front_ends + 1)]
    for each in (*cluster.nodes, *cluster.front_ends):
        await each.start()
    try:
        yield cluster
    finally:
        for each in (*cluster.nodes, *cluster.front_ends):
            await each.stop()


def expected_replicas(volumes: Iterable[control_pb2.Volume]) -> dict[str, str]:
    """Replica to node, of all replicas that the catalog has placed."""
    return {
        member.replica: member.node
        for volume in volumes
        for segment in volume.segments
        for member in segment.configuration.members
    }
