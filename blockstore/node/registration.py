"""How control learns of this node, and what it learns from control.

Control hears where the node listens, how full it is and what replicas it has; it answers with
replicas to delete, and with positions that replicas here are known to have acked. Where another process has
registered as this node since, which a copy of its data directory makes possible, this one is Fenced and must stop.
"""

import contextlib
import secrets
import shutil
from collections.abc import Iterable

import structlog

from blockstore.config import NodeSettings
from blockstore.domain import ReplicaId
from blockstore.errors import NotFound
from blockstore.grpc_endpoint import open_control_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.heartbeat import beat
from blockstore.node.node import Node
from blockstore.replica_codec import to_address, to_position
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import control_pb2_grpc

_log = structlog.get_logger(__name__)


class Registration:
    """Keeps `node`, which others dial at `address`, known to control."""

    def __init__(self, node: Node, settings: NodeSettings, address: str) -> None:
        self._node = node
        self._settings = settings
        self._address = address
        self._instance = secrets.token_hex(8)
        self._cluster = ""
        """Its name, which is to be kept yet."""
        self._channel = open_control_channel(settings.control)
        self._control = control_pb2_grpc.ControlStub(self._channel)

    async def run(self) -> None:
        """Until cancelled. Raises Fenced."""
        try:
            await beat(self._settings.heartbeat_s, self._register, self._report)
        finally:
            await self._channel.close(None)

    async def _register(self) -> None:
        request = pb.RegisterNodeRequest(
            node=self._node.node,
            address=self._address,
            zone=self._settings.zone,
            capacity_bytes=shutil.disk_usage(self._settings.data).total,
            instance=self._instance,
            cluster=self._node.store.cluster,
        )
        with cairn_errors(f"control at {self._settings.control}"):
            response: pb.RegisterNodeResponse = await self._control.RegisterNode(
                request, timeout=self._settings.call_timeout_s
            )
        self._cluster = response.cluster
        self._keep_cluster()
        self._node.rebuild_rate.set(response.rebuild_rate_bytes)
        self._learn(response.known)

    def _keep_cluster(self) -> None:
        """Where that fails, on a full disk, it serves all the same, and tries again with each heartbeat."""
        if not self._cluster:
            return
        try:
            self._node.store.keep_cluster(self._cluster)
        except OSError as error:
            _log.warning("the cluster's name cannot be kept", cluster=self._cluster, error=str(error))
        else:
            self._cluster = ""

    async def _report(self) -> float:
        self._keep_cluster()
        disk = shutil.disk_usage(self._settings.data)
        request = pb.NodeHeartbeatRequest(
            node=self._node.node,
            address=self._address,
            capacity_bytes=disk.total,
            used_bytes=disk.total - disk.free,
            full=self._node.full,
            replicas=await self._node.statuses(),
            instance=self._instance,
            broken=[
                pb.BrokenReplica(replica=replica, place=str(place))
                for place, replica in self._node.store.broken().items()
            ],
        )
        with cairn_errors(f"control at {self._settings.control}"):
            response: pb.NodeHeartbeatResponse = await self._control.NodeHeartbeat(
                request, timeout=self._settings.call_timeout_s
            )
        self._learn(response.known)
        for each in response.peers:
            with contextlib.suppress(NotFound):  # deleted meanwhile
                self._node.find_replica(ReplicaId(each.replica)).set_members(each.peers)
        self._node.rebuild_rate.set(response.rebuild_rate_bytes)
        for target in response.delete:
            await self._node.delete(to_address(target))
        return self._settings.heartbeat_s

    def _learn(self, known: Iterable[pb.KnownPosition]) -> None:
        for each in known:
            try:
                hosted = self._node.find_replica(ReplicaId(each.replica))
            except NotFound:
                continue
            hosted.carry_out(hosted.follower.know_acked(to_position(each.position)))
