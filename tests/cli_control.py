"""A Control service with canned state behind a real gRPC server, for tests of the `cairn` command.

with canned_control() as control:
    control.volumes["vol-…"] = …
    run(["volume", "list", "--control", control.address])
"""

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from blockstore.errors import CairnError, NotFound
from blockstore.grpc_errors import status_of
from blockstore.grpc_parts import in_parts
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import replica_pb2
from blockstore.rpc.control_pb2_grpc import ControlServicer, add_ControlServicer_to_server

VOLUME = "vol-00000000000000001"
FRONT_END = "fe-00000000000000001"
URI = f"nbd://127.0.0.1:10809/{VOLUME}"
CREATED_MS = 1_700_000_000_123


def node_id(number: int) -> str:
    return f"node-{number:017x}"


def replica_id(number: int) -> str:
    return f"rep-{number:017x}"


def make_volume(state: pb.VolumeState.ValueType = pb.VOLUME_STATE_AVAILABLE, **values: Any) -> pb.Volume:
    """A volume of 1 GiB with a replica in each of the zones a, b and c."""
    members = [
        pb.Member(replica=replica_id(n), node=node_id(n), address=f"127.0.0.1:{7400 + n}", zone="abc"[n - 1])
        for n in (1, 2, 3)
    ]
    segment = pb.Segment(number=0, size_bytes=1 << 30, configuration=pb.Configuration(number=1, members=members))
    given = {"id": VOLUME, "name": "db", "size_bytes": 1 << 30, "created_at_ms": CREATED_MS, "epoch": 4, **values}
    return pb.Volume(state=state, segments=[segment], **given)


def make_attachment(state: pb.AttachmentState.ValueType = pb.ATTACHMENT_STATE_ATTACHED) -> pb.Attachment:
    return pb.Attachment(front_end=FRONT_END, epoch=4, state=state, since_ms=CREATED_MS, uris=[URI])


def make_node(number: int, up: bool = True) -> pb.Node:
    return pb.Node(
        id=node_id(number), address=f"127.0.0.1:{7400 + number}", zone="abc"[number - 1], capacity_bytes=100 << 30,
        used_bytes=25 << 30, up=up, last_heartbeat_ms=CREATED_MS, replicas=1,
    )  # fmt: skip


def make_health(volume: pb.Volume, serving: str = "serving", states: tuple[str, ...] = ("up",) * 3) -> pb.VolumeHealth:
    """The volume's health, its replicas in those states; one that is not up lacks 17 records."""
    replicas = [
        pb.ReplicaHealth(
            replica=replica_id(n), node=node_id(n), zone="abc"[n - 1], state=state, file_bytes=5 << 20,
            end=replica_pb2.Position(epoch=4, sequence=100), lag_records=0 if state == "up" else 17,
            why="" if state == "up" else "its node is down",
        )
        for n, state in enumerate(states, 1)
    ]  # fmt: skip
    return pb.VolumeHealth(volume=volume, replicas=replicas, serving=serving)


class CannedControl(ControlServicer):
    """Answers from `volumes` and `nodes`; remembers each request. `error`: what every call ends with.

    serving: what Status and GetVolumeHealth say of attached volumes, a word each time; the last one stays.
    states: of each volume's replicas. waits: what keeps the first of them from moving. started: by ScrubVolume.
    scrubs: what the replicas say, as `serving`. clients: that keep a volume from being detached, a number for each
    look at it.
    """

    def __init__(self) -> None:
        self.address = ""
        self.volumes = [make_volume()]
        self.nodes = [make_node(n) for n in (1, 2, 3)]
        self.problems: list[pb.Problem] = []
        self.healthy = True
        self.error: CairnError | None = None
        self.requests: list[Any] = []
        self.started = [pb.StartedScrub(replica=replica_id(n), number=7) for n in (1, 2, 3)]
        self.scrubs: list[list[replica_pb2.ScrubStatus]] = [[]]
        self.serving = ["serving"]
        self.repair = pb.RepairSettings(
            replace_after_s=600, rebuild_rate_bytes=64 << 20, rebuilds=8, rebuilds_per_node=2
        )
        self.moves: list[pb.Move] = []
        self.states: tuple[str, ...] = ("up",) * 3
        self.waits = ""
        self.clients: list[int] = []
        self.reason = ""

    def last(self, kind: type[Any]) -> Any:
        """The last request of that type."""
        return next(each for each in reversed(self.requests) if isinstance(each, kind))

    def CreateVolume(self, request: pb.CreateVolumeRequest, context: grpc.ServicerContext) -> pb.Volume:
        self._note(request, context)
        self.volumes.append(
            make_volume(
                pb.VOLUME_STATE_CREATING,
                reason=self.reason,
                name=request.name,
                size_bytes=request.size_bytes,
                id="vol-00000000000000002",
            )
        )
        return self.volumes[-1]

    def GetVolume(self, request: pb.GetVolumeRequest, context: grpc.ServicerContext) -> pb.Volume:
        self._note(request, context)
        found = self._find(request.volume, context)
        answer = pb.Volume()
        answer.CopyFrom(found)
        if found.state == pb.VOLUME_STATE_CREATING:
            found.state, found.reason = pb.VOLUME_STATE_AVAILABLE, ""  # the next time
        return answer

    def ListVolumes(
        self, request: pb.ListVolumesRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ListVolumesResponse]:
        self._note(request, context)
        yield from in_parts(pb.ListVolumesResponse(), volumes=self.volumes)

    def DeleteVolume(self, request: pb.DeleteVolumeRequest, context: grpc.ServicerContext) -> pb.DeleteVolumeResponse:
        self._note(request, context)
        found = self._find(request.volume, context)
        self.volumes.remove(found)
        return pb.DeleteVolumeResponse(deleted=all(node.up for node in self.nodes), id=found.id)

    def ResizeVolume(self, request: pb.ResizeVolumeRequest, context: grpc.ServicerContext) -> pb.Volume:
        self._note(request, context)
        found = self._find(request.volume, context)
        found.size_bytes = request.size_bytes
        return found

    def AttachVolume(self, request: pb.AttachVolumeRequest, context: grpc.ServicerContext) -> pb.Volume:
        self._note(request, context)
        found = self._find(request.volume, context)
        found.state = pb.VOLUME_STATE_IN_USE
        found.attachment.CopyFrom(make_attachment())
        found.attachment.read_only = request.read_only
        return found

    def DetachVolume(self, request: pb.DetachVolumeRequest, context: grpc.ServicerContext) -> pb.Volume:
        self._note(request, context)
        found = self._find(request.volume, context)
        if self.clients and not request.force:
            found.attachment.state = pb.ATTACHMENT_STATE_DETACHING
            return found
        found.state = pb.VOLUME_STATE_AVAILABLE
        found.ClearField("attachment")
        return found

    def ScrubVolume(self, request: pb.ScrubVolumeRequest, context: grpc.ServicerContext) -> pb.ScrubVolumeResponse:
        self._note(request, context)
        found = self._find(request.volume, context)
        return pb.ScrubVolumeResponse(volume=found.id, replicas=self.started)

    def GetNode(self, request: pb.GetNodeRequest, context: grpc.ServicerContext) -> pb.Node:
        """A node that is drained has one replica less each time."""
        self._note(request, context)
        for node in self.nodes:
            if node.id == request.node:
                answer = pb.Node()
                answer.CopyFrom(node)
                node.replicas -= bool(node.draining and node.replicas)
                return answer
        raise self._end(NotFound(f"no node {request.node!r}"), context)

    def ListNodes(self, request: pb.ListNodesRequest, context: grpc.ServicerContext) -> Iterator[pb.ListNodesResponse]:
        self._note(request, context)
        yield from in_parts(pb.ListNodesResponse(), nodes=self.nodes)

    def RemoveNode(self, request: pb.RemoveNodeRequest, context: grpc.ServicerContext) -> pb.RemoveNodeResponse:
        self._note(request, context)
        self.nodes = [node for node in self.nodes if node.id != request.node]
        return pb.RemoveNodeResponse()

    def DrainNode(self, request: pb.DrainNodeRequest, context: grpc.ServicerContext) -> pb.Node:
        self._note(request, context)
        for node in self.nodes:
            if node.id == request.node:
                node.draining = not request.undo
                return node
        raise self._end(NotFound(f"no node {request.node!r}"), context)

    def GetRepair(self, request: pb.GetRepairRequest, context: grpc.ServicerContext) -> pb.RepairSettings:
        self._note(request, context)
        return self.repair

    def SetRepair(self, request: pb.SetRepairRequest, context: grpc.ServicerContext) -> pb.RepairSettings:
        self._note(request, context)
        for field, value in request.ListFields():
            setattr(self.repair, field.name, value)
        return self.repair

    def Rebalance(self, request: pb.RebalanceRequest, context: grpc.ServicerContext) -> pb.RebalanceResponse:
        self._note(request, context)
        if request.volume:
            self._find(request.volume, context)
        return pb.RebalanceResponse(moves=self.moves)

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> Iterator[pb.StatusResponse]:
        self._note(request, context)
        word = self._word()
        yield from in_parts(
            pb.StatusResponse(healthy=self.healthy),
            problems=self.problems,
            volumes=[self._health(each, word) for each in self.volumes],
            nodes=self.nodes,
            front_ends=[pb.FrontEndInfo(id=FRONT_END, address="127.0.0.1:7500", uris=[URI], up=True, volumes=1)],
        )

    def GetVolumeHealth(self, request: pb.GetVolumeRequest, context: grpc.ServicerContext) -> pb.VolumeHealth:
        self._note(request, context)
        found = self._find(request.volume, context)
        return self._health(found, self._word() if found.HasField("attachment") else "")

    def _word(self) -> str:
        return self.serving.pop(0) if len(self.serving) > 1 else self.serving[0]

    def _health(self, volume: pb.Volume, word: str) -> pb.VolumeHealth:
        health = make_health(volume, word if volume.HasField("attachment") else "", self.states)
        health.replicas[0].waits = self.waits
        if self.clients and volume.attachment.state == pb.ATTACHMENT_STATE_DETACHING:
            health.clients = self.clients.pop(0) if len(self.clients) > 1 else self.clients[0]
            if not health.clients:
                health.volume.state = pb.VOLUME_STATE_AVAILABLE
                health.volume.ClearField("attachment")
        said = self.scrubs.pop(0) if len(self.scrubs) > 1 else self.scrubs[0]
        for replica, scrub in zip(health.replicas, said, strict=bool(said)):
            replica.scrub.CopyFrom(scrub)
        return health

    def _note(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.error is not None:
            self._end(self.error, context)

    def _find(self, name: str, context: grpc.ServicerContext) -> pb.Volume:
        for volume in self.volumes:
            if name in (volume.id, volume.name):
                return volume
        raise self._end(NotFound(f"no volume {name!r}: `cairn volume list` shows all"), context)

    def _end(self, error: CairnError, context: grpc.ServicerContext) -> AssertionError:
        context.abort(status_of(error), str(error))
        return AssertionError("abort raises")


@contextmanager
def canned_control(register: Callable[[grpc.Server], None] = lambda _: None) -> Iterator[CannedControl]:
    """The service at a free port, until the block ends. register: adds further services at the same address."""
    control = CannedControl()  # type: ignore[abstract]  # the rest is for nodes and front-ends
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    add_ControlServicer_to_server(control, server)
    register(server)
    control.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield control
    finally:
        server.stop(None).wait()
