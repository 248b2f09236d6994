"""What control knows of its nodes: who they are, that they are up, and what their replicas acked."""

from pathlib import Path

import pytest

from blockstore.errors import Conflict, InvalidRequest, NotFound
from blockstore.rpc import control_pb2
from blockstore.rpc.replica_pb2 import Position
from blockstore.units import GIB
from tests.control_cluster import Cluster, Control, cluster_at, until
from tests.control_scenario import run, until_down
from tests.patient_time import run_patiently

# ---- registering


def test_nodes_are_listed_and_removed_when_empty_and_down(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        listed = (await control.call("ListNodes", control_pb2.ListNodesRequest())).nodes
        assert [(node.zone, node.up, node.replicas) for node in listed] == [
            ("zone-1", True, 1),
            ("zone-2", True, 1),
            ("zone-3", True, 1),
        ]
        request = control_pb2.RemoveNodeRequest(node=cluster.nodes[0].id)
        with pytest.raises(Conflict, match="stop it first"):
            await control.call("RemoveNode", request)
        await cluster.nodes[0].stop()
        await until_down(control, request.node)
        assert not (await control.call("GetNode", control_pb2.GetNodeRequest(node=request.node))).up
        with pytest.raises(Conflict, match="holds replicas"):
            await control.call("RemoveNode", request)
        await control.delete("v")
        await control.call("RemoveNode", request)
        with pytest.raises(NotFound):
            await control.call("RemoveNode", request)

    run(tmp_path, scenario, lease_s=2.0)


@pytest.mark.parametrize(
    "fields", [{"node": "node-1"}, {"node": "vol-00000000000000001"}, {"address": "here"}, {"zone": ""}]
)
def test_a_node_that_says_nonsense_is_refused(tmp_path: Path, fields: dict[str, str]) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        request = control_pb2.RegisterNodeRequest(node="node-00000000000000001", address="127.0.0.1:1", zone="a")
        for name, value in fields.items():
            setattr(request, name, value)
        with pytest.raises(InvalidRequest):
            await control.call("RegisterNode", request)

    run(tmp_path, scenario, nodes=0, front_ends=0)


def test_whoever_is_unknown_is_told_to_register(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        node = control_pb2.NodeHeartbeatRequest(node="node-00000000000000001", address="127.0.0.1:1")
        with pytest.raises(NotFound):
            await control.call("NodeHeartbeat", node)
        front_end = control_pb2.FrontEndHeartbeatRequest(front_end="fe-00000000000000001", address="127.0.0.1:1")
        with pytest.raises(NotFound):
            await control.call("FrontEndHeartbeat", front_end)

    run(tmp_path, scenario, nodes=0, front_ends=0)


# ---- positions (design, section 3, rule 10)


def test_what_a_replica_acked_is_remembered_and_told_to_the_node_and_the_front_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster_at(tmp_path) as cluster:
            front_end, node = cluster.front_ends[0], cluster.nodes[0]
            async with cluster.control() as control:
                volume = await control.create(name="v")
                await control.attach("v")
                (replica,) = node.replicas
                report = control_pb2.VolumeReport(
                    volume=volume.id, epoch=1, state=control_pb2.SERVING_STATE_SERVING, size_bytes=GIB
                )
                report.members.add(replica=replica, connected=True, whole=True).matched.CopyFrom(
                    Position(epoch=1, sequence=700)
                )
                front_end.says[volume.id] = report

                async def is_known() -> bool:
                    members = (await control.get("v")).segments[0].configuration.members
                    known = {member.replica: member.known.sequence for member in members}
                    return known[replica] == 700 and await is_saved(control)

                async def is_saved(control: Control) -> bool:
                    return any(b'"sequence":700' in each.value for each in (await control.store.list("known/")).items)

                await until(is_known, "the position is kept")
                # Where a filling replica stands, or one of an epoch to come, is no ack.
                for whole, epoch in ((False, 1), (True, 9)):
                    report.members[0].whole = whole
                    report.members[0].matched.CopyFrom(Position(epoch=epoch, sequence=900))
                    beat = control_pb2.FrontEndHeartbeatRequest(
                        front_end=front_end.id,
                        instance=front_end.instance,
                        address=front_end.endpoint.address,
                        volumes=[report],
                    )
                    await control.call("FrontEndHeartbeat", beat)
                members = (await control.get("v")).segments[0].configuration.members
                assert max(member.known.sequence for member in members) == 700
            front_end.says.clear()
            async with cluster.control() as control:  # A control that was killed knows it still.
                assert node.known[replica] == (1, 700)  # Told at registration.
                node.known.clear()

                async def is_told() -> bool:
                    return node.known.get(replica) == (1, 700)

                await until(is_told, "a whole replica that ends lower is told in answer to its heartbeat")
                node.replicas[replica].end.CopyFrom(Position(epoch=1, sequence=700))
                renewal = control_pb2.RenewAttachmentRequest(
                    volume=volume.id, front_end=front_end.id, instance=front_end.instance
                )
                ticket: control_pb2.OpenTicket = await control.call("RenewAttachment", renewal)
                known = {each.replica: each.known.sequence for each in ticket.segments[0].configuration.members}
                assert known[replica] == 700

    run_patiently(scenario())
