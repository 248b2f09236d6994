"""Control with nodes and front-ends around it, in one process: real gRPC, real metastore.

The nodes and front-ends are real servicers of their services that keep in memory which replicas and
volumes they have, and beat as real ones do; no I/O of a guest passes here.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from blockstore.config import ControlSettings
from blockstore.control.daemon import assemble
from blockstore.control.gate import Gate
from blockstore.control.leadership import ControlPlace
from blockstore.control.metastore.embedded import open_embedded
from blockstore.control.metastore.interface import Metastore
from blockstore.control.peers import Peers
from blockstore.errors import CairnError, Conflict, Fenced
from blockstore.grpc_endpoint import Endpoint, open_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import control_pb2, control_pb2_grpc, replica_pb2, replica_pb2_grpc, snapshot_pb2
from blockstore.units import GIB, MIB
from tests.control_beating import LIMIT_S, Beating, Stubs, answer_of
from tests.control_crashing import CrashingPeers, CrashingStore, CrashPoints
from tests.control_seals import MemorySeals, Volumes
from tests.control_store import MemoryDaemon

#: Long enough that a busy machine does not end a lease by accident.
LEASE_S = 3.0


async def until(condition: Callable[[], Awaitable[Any]], what: str) -> Any:
    """What `condition` gives as soon as that is true; fails after LIMIT_S seconds."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + LIMIT_S
    while loop.time() < give_up_at:
        # Not wait_for: before Python 3.12 it may swallow a cancellation.
        async with asyncio.timeout(LIMIT_S):
            if found := await condition():
                return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"never came true: {what}")


def settings_for(directory: Path, **changes: Any) -> ControlSettings:
    values: dict[str, Any] = {"lease_s": LEASE_S, "reconcile_s": 0.1, "map_size_bytes": 16 * MIB, **changes}
    return ControlSettings(state=directory, listen="127.0.0.1:0", **values)


# ---- control


@dataclass
class Control:
    """A running control and a client of it."""

    address: str
    stub: Any
    """Of both services."""
    channel: grpc.aio.Channel
    store: Metastore

    async def call(self, name: str, request: Any, timeout_s: float = LIMIT_S) -> Any:
        """One call of either service; raises errors of the tree."""
        with cairn_errors("control"):
            return await answer_of(getattr(self.stub, name)(request, timeout=timeout_s))

    async def create(self, size_bytes: int = GIB, **fields: Any) -> control_pb2.Volume:
        volume: control_pb2.Volume = await self.call(
            "CreateVolume", control_pb2.CreateVolumeRequest(size_bytes=size_bytes, **fields)
        )
        return volume

    async def attach(self, volume: str, **fields: Any) -> control_pb2.Volume:
        attached: control_pb2.Volume = await self.call(
            "AttachVolume", control_pb2.AttachVolumeRequest(volume=volume, **fields)
        )
        return attached

    async def detach(self, volume: str, **fields: Any) -> control_pb2.Volume:
        detached: control_pb2.Volume = await self.call(
            "DetachVolume", control_pb2.DetachVolumeRequest(volume=volume, **fields)
        )
        return detached

    async def delete(self, volume: str) -> control_pb2.DeleteVolumeResponse:
        deleted: control_pb2.DeleteVolumeResponse = await self.call(
            "DeleteVolume", control_pb2.DeleteVolumeRequest(volume=volume)
        )
        return deleted

    async def get(self, volume: str) -> control_pb2.Volume:
        found: control_pb2.Volume = await self.call("GetVolume", control_pb2.GetVolumeRequest(volume=volume))
        return found

    async def snapshot(self, *volumes: str, **fields: Any) -> list[snapshot_pb2.Snapshot]:
        request = snapshot_pb2.CreateSnapshotRequest(volumes=volumes, **fields)
        return list((await self.call("CreateSnapshot", request)).snapshots)

    async def get_snapshot(self, snapshot: str) -> snapshot_pb2.Snapshot:
        found: snapshot_pb2.Snapshot = await self.call(
            "GetSnapshot", snapshot_pb2.GetSnapshotRequest(snapshot=snapshot)
        )
        return found

    async def snapshots(self, volume: str = "") -> list[snapshot_pb2.Snapshot]:
        request = snapshot_pb2.ListSnapshotsRequest(volume=volume)
        return list((await self.call("ListSnapshots", request)).snapshots)

    async def delete_snapshot(self, snapshot: str) -> snapshot_pb2.Snapshot:
        deleting: snapshot_pb2.Snapshot = await self.call(
            "DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(snapshot=snapshot)
        )
        return deleting

    async def volumes(self) -> list[control_pb2.Volume]:
        return list((await self.call("ListVolumes", control_pb2.ListVolumesRequest())).volumes)

    async def status(self) -> control_pb2.StatusResponse:
        status: control_pb2.StatusResponse = await self.call("Status", control_pb2.StatusRequest())
        return status


@asynccontextmanager
async def control_at(directory: Path, points: CrashPoints | None = None, **changes: Any) -> AsyncIterator[Control]:
    """Control on `directory`, killed at the end: nothing is said or saved when it goes."""
    settings = settings_for(directory, **changes)
    opened = open_embedded(settings.state, settings.map_size_bytes)
    store: Any = CrashingStore(opened, points) if points else opened
    peers = CrashingPeers(settings, points) if points else Peers(settings)
    endpoint = Endpoint("127.0.0.1:0")
    gate = Gate(endpoint)
    services, reconciler, _ = await assemble(
        settings,
        store,
        peers,
        lambda: (ControlPlace(endpoint.address, True),),
        asyncio.get_running_loop().time,  # that of a PatientLoop, where the test runs in one
    )
    await gate.open(*services)
    await endpoint.start()
    reconciling = asyncio.ensure_future(reconciler.run())
    channel = open_channel(endpoint.address)
    try:
        yield Control(endpoint.address, Stubs(channel), channel, opened)
    finally:
        await channel.close(None)
        await endpoint.stop(0)
        reconciling.cancel()
        await asyncio.gather(reconciling, return_exceptions=True)
        await peers.keep_only(())
        await opened.close()


# ---- what control calls


class MemoryNode(Beating, replica_pb2_grpc.ReplicaServicer):
    """A node whose replicas are names."""

    def __init__(self, number: int, zone: str = "") -> None:
        super().__init__()
        self.id = f"node-{number:017x}"
        self.zone = zone or f"zone-{number}"
        self.replicas: dict[str, replica_pb2.ReplicaStatus] = {}
        self.sources: dict[str, bytes] = {}
        self.refuses: CairnError | None = None
        self.creating, self.may_create = asyncio.Event(), asyncio.Event()
        self.may_create.set()
        self.full = False
        self.broken: dict[str, str] = {}
        self.used_bytes = 0
        self.known: dict[str, tuple[int, int]] = {}
        self.to_delete: set[str] = set()
        self.scrubs: list[replica_pb2.ScrubRequest] = []
        self.peers: dict[str, list[replica_pb2.Peer]] = {}
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
        if not self.may_create.is_set():
            self.creating.set()
            await self.may_create.wait()
        self.sources[request.target.replica] = request.source
        created = request.target.replica not in self.replicas
        if created:
            whole = not request.filling
            self.replicas[request.target.replica] = replica_pb2.ReplicaStatus(target=request.target, whole=whole)
        return replica_pb2.CreateResponse(created=created)

    async def Delete(self, request: replica_pb2.DeleteRequest, context: Any) -> replica_pb2.DeleteResponse:
        if self.refuses:
            raise self.refuses
        return replica_pb2.DeleteResponse(deleted=self.replicas.pop(request.target.replica, None) is not None)

    async def Scrub(self, request: replica_pb2.ScrubRequest, context: Any) -> replica_pb2.ScrubResponse:
        if self.refuses:
            raise self.refuses
        self.scrubs.append(request)
        return replica_pb2.ScrubResponse(number=len(self.scrubs))

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
            broken=[control_pb2.BrokenReplica(replica=each, place=place) for place, each in self.broken.items()],
        )
        response = await stub.NodeHeartbeat(request, timeout=LIMIT_S)
        self._learn(response.known)
        self.to_delete |= {each.replica for each in response.delete}
        self.peers.update({each.replica: list(each.peers) for each in response.peers})

    def _learn(self, known: Iterable[control_pb2.KnownPosition]) -> None:
        self.known.update({each.replica: (each.position.epoch, each.position.sequence) for each in known})


@dataclass
class Opened:
    """A volume that a front-end serves."""

    epoch: int
    size_bytes: int
    ticket: control_pb2.OpenTicket


class MemoryFrontEnd(Beating, MemorySeals, control_pb2_grpc.FrontEndServicer):
    """A front-end whose volumes are numbers: it opens at once, or ends as it is told.

    hydrates: what it does, in one beat, with each volume that has a source.
    """

    def __init__(self, number: int, instance: int = 1, layers: Volumes | None = None) -> None:
        Beating.__init__(self)
        MemorySeals.__init__(self)
        self.layers = Volumes() if layers is None else layers
        self.hydrates = False
        self.reading: set[str] = set()
        self.shows_snapshots = True
        self.id = f"fe-{number:017x}"
        self.instance = f"instance-{instance}"
        self.volumes: dict[str, Opened] = {}
        self.newest: dict[str, int] = {}
        self.outcome: CairnError | None = None
        self.members: dict[str, dict[str, Any]] = {}
        """By replica: what it says of it in place of "connected and whole"."""
        self.says: dict[str, control_pb2.VolumeReport] = {}
        self.fenced = False
        self.current: dict[str, control_pb2.CurrentAttachment] = {}
        self.opening = asyncio.Event()
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.may_close = asyncio.Event()
        self.may_close.set()
        control_pb2_grpc.add_FrontEndServicer_to_server(self, self.endpoint.server)

    async def restart(self) -> "MemoryFrontEnd":
        """The same front-end in a new process: it has nothing open."""
        await self.stop()
        again = MemoryFrontEnd(int(self.id[3:], 16), int(self.instance.split("-")[1]) + 1, self.layers)
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
        await self.may_close.wait()
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
            reading=self.reading,
            shows_snapshots=self.shows_snapshots,
        )
        try:
            with cairn_errors("control"):
                response = await stub.FrontEndHeartbeat(request, timeout=LIMIT_S)
        except Fenced:
            self.fenced = True
            raise
        current = self.current = {each.volume: each for each in response.attachments}
        for each in response.attachments:
            if each.segments and each.volume in self.volumes:
                segments = self.volumes[each.volume].ticket.segments
                del segments[:]
                segments.extend(each.segments)
        for name in [name for name in self.volumes if name not in current]:
            del self.volumes[name]

    def _report(self, name: str, opened: Opened) -> control_pb2.VolumeReport:
        serving = control_pb2.VolumeReport(
            volume=name, epoch=opened.epoch, state=control_pb2.SERVING_STATE_SERVING, size_bytes=opened.size_bytes
        )
        serving.clients = 0 if self.may_close.is_set() else 2
        for segment in opened.ticket.segments:
            configuration = segment.configuration
            serving.settled[segment.number] = configuration.number
            newcomer = [configuration.replacement.newcomer] if configuration.HasField("replacement") else []
            everyone = (*configuration.members, *configuration.old_members, *newcomer)
            for replica in dict.fromkeys(member.replica for member in everyone):
                serving.members.add(
                    replica=replica, **{"connected": True, "whole": True, **self.members.get(replica, {})}
                )
        if opened.ticket.HasField("source"):
            layers = self.layers[name]
            told = self.current.get(name)
            layers.hydrated |= self.hydrates and not (told or opened.ticket).hydration.paused
            serving.hydrated = layers.hydrated
            serving.hydration.CopyFrom(control_pb2.Hydration(blocks_total=10, blocks_done=10 * layers.hydrated))
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
    """Nodes, front-ends and daemons, which outlive any control."""

    directory: Path
    layers: Volumes = field(default_factory=Volumes)
    daemons: list[MemoryDaemon] = field(default_factory=list)
    nodes: list[MemoryNode] = field(default_factory=list)
    front_ends: list[MemoryFrontEnd] = field(default_factory=list)

    @asynccontextmanager
    async def control(self, points: CrashPoints | None = None, **changes: Any) -> AsyncIterator[Control]:
        """A control that all nodes and front-ends know, and that has heard all of them."""
        async with control_at(self.directory, points, **changes) as control:
            for each in (*self.nodes, *self.front_ends, *self.daemons):
                each.control = control.address
            await until(lambda: self._is_heard(control), "all are up")
            yield control

    async def _is_heard(self, control: Control) -> bool:
        status = await control.status()
        up = {node.id for node in status.nodes if node.up} | {each.id for each in status.front_ends if each.up}
        if self.daemons:
            store: snapshot_pb2.GetStoreResponse = await control.call("GetStore", snapshot_pb2.GetStoreRequest())
            up |= {each.id for each in store.daemons if each.up}
        return up == {each.id for each in (*self.nodes, *self.front_ends, *self.daemons)}

    def held(self) -> dict[str, str]:
        """Replica to node, of all replicas that exist."""
        return {replica: node.id for node in self.nodes for replica in node.replicas}


@asynccontextmanager
async def cluster_at(directory: Path, nodes: int = 3, front_ends: int = 1, daemons: int = 0) -> AsyncIterator[Cluster]:
    cluster = Cluster(directory)
    cluster.nodes = [MemoryNode.make(number) for number in range(1, nodes + 1)]
    cluster.front_ends = [MemoryFrontEnd(number, layers=cluster.layers) for number in range(1, front_ends + 1)]
    cluster.daemons = [MemoryDaemon(number) for number in range(1, daemons + 1)]
    for each in (*cluster.nodes, *cluster.front_ends, *cluster.daemons):
        await each.start()
    try:
        yield cluster
    finally:
        for each in (*cluster.nodes, *cluster.front_ends, *cluster.daemons):
            await each.stop()


def expected_replicas(volumes: Iterable[control_pb2.Volume]) -> dict[str, str]:
    """Replica to node, of all replicas that the catalog has placed."""
    return {
        member.replica: member.node
        for volume in volumes
        for segment in volume.segments
        for member in segment.configuration.members
    }
