"""Members that their nodes cannot make good: who is replaced by itself, and for whom a detached volume is opened."""

import asyncio
import math
from pathlib import Path

import pytest

from blockstore.config import Placement
from blockstore.control.placement import warning
from blockstore.control.records import Segment, Volume
from blockstore.control.unfit import DAMAGED, LEFT_OUT, needs_front_end, to_be_replaced
from blockstore.domain import Configuration, Member, NodeId, ReplicaId, SegmentNumber, VolumeId, VolumeState
from blockstore.errors import Conflict, InvalidRequest
from blockstore.rpc import control_pb2
from blockstore.rpc.control_pb2 import MemberReport
from blockstore.rpc.replica_pb2 import ReplicaStatus
from blockstore.units import GIB
from tests.control_cluster import Cluster, Control, MemoryNode, cluster_at, until
from tests.control_scenario import run, until_down

A, B, C = (ReplicaId(name) for name in ("rep-a", "rep-b", "rep-c"))
CONFIGURATION = Configuration(1, tuple(Member(each, NodeId(f"node-{each}")) for each in (A, B, C)))
VOLUME = Volume(VolumeId("vol-1"), "", GIB, VolumeState.AVAILABLE, 0, (Segment(SegmentNumber(0), GIB, CONFIGURATION),))


def said(**changes: dict[str, bool]) -> list[MemberReport]:
    """What a front-end says of all three: connected and whole, but for the changes."""
    found = []
    for each in (A, B, C):
        report = MemberReport(replica=each, connected=True, whole=True)
        for name, value in changes.get(each[-1], {}).items():
            setattr(report, name, value)
        found.append(report)
    return found


LOST = {"damaged": True}


def test_one_that_is_damaged_is_filled_anew_where_it_is() -> None:
    assert to_be_replaced(VOLUME, said(a=LOST)) == {}
    assert to_be_replaced(VOLUME, said(a=LOST, c={"connected": False})) == {}, "it waits for C, or for C's replacement"


def test_of_two_that_are_damaged_another_replica_takes_the_place() -> None:
    assert to_be_replaced(VOLUME, said(a=LOST, b=LOST)) == {A: DAMAGED, B: DAMAGED}


@pytest.mark.parametrize("third", [LOST, {"connected": False}, {"whole": False}])
def test_but_only_while_one_can_be_filled_from(third: dict[str, bool]) -> None:
    assert to_be_replaced(VOLUME, said(a=LOST, b=LOST, c=third)) == {}


def test_who_was_left_out_after_an_accepted_loss_is_replaced() -> None:
    assert to_be_replaced(VOLUME, said(c={"left_out": True, "whole": False})) == {C: LEFT_OUT}
    gone = MemberReport(replica="rep-gone", left_out=True)
    assert to_be_replaced(VOLUME, [*said(), gone]) == {}, "who is no member any more is nobody's trouble"


def status(**changes: object) -> ReplicaStatus:
    return ReplicaStatus(**{"whole": True, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "opens"),
    [
        ({A: status(), B: status(), C: status()}, False),
        ({A: status(whole=False), B: status(), C: status()}, True),
        ({A: status(damage="a row"), B: status(), C: status()}, True),
        ({A: status(damage="a row"), B: status(damage="another"), C: status()}, True),
        ({A: status(damage="a row"), B: status()}, False),  # C may have what nobody else has
        ({A: status(whole=False), B: status(whole=False), C: status()}, False),  # acknowledged writes may be missing
        ({B: status(), C: status()}, False),
        ({}, False),
    ],
)
def test_a_detached_volume_is_opened_where_that_mends_something(
    found: dict[ReplicaId, ReplicaStatus], opens: bool
) -> None:
    assert needs_front_end(VOLUME, found) is opens


# ---- control


async def configuration(control: Control) -> control_pb2.Configuration:
    volume = await control.get("v")
    return volume.segments[0].configuration


async def until_replaced(control: Control, replica: str) -> control_pb2.Configuration:
    async def replaced() -> control_pb2.Configuration | None:
        now = await configuration(control)
        changing = now.old_members or now.HasField("replacement")
        return None if changing or replica in {each.replica for each in now.members} else now

    found: control_pb2.Configuration = await until(replaced, f"{replica} is replaced")
    return found


def test_a_replica_that_was_left_out_is_replaced_and_discarded_when_its_node_returns(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(GIB, name="v")
        await control.attach("v")
        left = (await configuration(control)).members[2]
        index = next(index for index, each in enumerate(cluster.nodes) if each.id == left.node)
        node = cluster.nodes[index]
        await node.stop()
        await until_down(control, node.id)
        cluster.front_ends[0].members[left.replica] = {"whole": False, "left_out": True}
        now = await until_replaced(control, left.replica)
        assert len({each.node for each in now.members}) == 3
        assert left.replica in node.replicas, "nothing is deleted behind a node's back"
        node = cluster.nodes[index] = await node.restart()
        await until(lambda: _gone(node, left.replica), "the old copy is discarded")

    run(tmp_path, scenario, nodes=4, replace_after_s=0.0)


async def _gone(node: MemoryNode, replica: str) -> bool:
    return replica not in node.replicas


def test_of_two_damaged_replicas_one_is_replaced_also_where_there_is_no_other_node(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(GIB, name="v")
        await control.attach("v")
        front_end, before = cluster.front_ends[0], await configuration(control)
        one, two, _ = (each.replica for each in before.members)
        front_end.members = {one: LOST, two: LOST}
        now = await until_replaced(control, one)
        assert {each.node for each in now.members} == {each.node for each in before.members}
        assert two in {each.replica for each in now.members}, "that one is filled anew by its leader"
        assert now.number == 3

    run(tmp_path, scenario, replace_after_s=0.0)


@pytest.mark.parametrize("wrong", [{"whole": False}, {"damage": "a row fails its check"}])
def test_a_detached_volume_is_opened_until_its_replica_is_good_again(tmp_path: Path, wrong: dict[str, object]) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(GIB, name="v")
        [front_end], node = cluster.front_ends, cluster.nodes[0]
        [(replica, held)] = node.replicas.items()
        node.replicas[replica] = ReplicaStatus(target=held.target, **{"whole": True, **wrong})  # type: ignore[arg-type]

        async def opened() -> bool:
            return bool(front_end.volumes)

        await until(opened, "it is open for maintenance")
        volume = await control.get("v")
        assert (volume.state, volume.epoch) == (control_pb2.VOLUME_STATE_AVAILABLE, 1)
        node.replicas[replica] = ReplicaStatus(target=held.target, whole=True)

        async def closed() -> bool:
            return not front_end.volumes

        await until(closed, "it is closed again")
        assert (await control.get("v")).epoch == 1, "once was enough"

    run(tmp_path, scenario)


def test_what_is_warned_of_is_what_is_now(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster_at(tmp_path, nodes=0) as cluster:
            cluster.nodes = [MemoryNode.make(number, zone) for number, zone in ((1, "a"), (2, "a"), (3, "b"))]
            for node in cluster.nodes:
                await node.start()
            async with cluster.control(placement=Placement.WARN) as control:
                await control.create(GIB, name="v")
                await control.attach("v")
                assert (await control.get("v")).warnings == [warning(["a", "a", "b"])]
                further = MemoryNode.make(4, "c")
                cluster.nodes.append(further)
                further.control = control.address
                await further.start()

                async def spread() -> bool:
                    moves = await control.call("Rebalance", control_pb2.RebalanceRequest())
                    zones = {each.zone for each in (await configuration(control)).members}
                    return not moves.moves and zones == {"a", "b", "c"}

                await until(spread, "its replicas are in three zones")
                assert not (await control.get("v")).warnings
                assert not [each for each in (await control.status()).problems if each.subject.startswith("vol-")]

    asyncio.run(scenario())


def test_of_two_drains_that_leave_too_few_nodes_the_second_is_refused(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(GIB, name="v")
        one, two = [each.node for each in (await configuration(control)).members][:2]

        async def drain(node: str, *, undo: bool = False) -> control_pb2.Node:
            request = control_pb2.DrainNodeRequest(node=node, undo=undo)
            found: control_pb2.Node = await control.call("DrainNode", request)
            return found

        [empty] = [each.id for each in cluster.nodes if not each.replicas]
        for undo in (False, True):
            assert (await drain(empty, undo=undo)).draining is not undo, "there is nothing to move"
        both = await asyncio.gather(drain(one), drain(two), return_exceptions=True)
        [refused] = [each for each in both if isinstance(each, BaseException)]
        assert isinstance(refused, Conflict)
        assert "leaves 2 nodes" in str(refused)
        assert "--undo" in str(refused)
        drained = [each.id for each in (await control.status()).nodes if each.draining]
        assert len(drained) == 1
        await drain(drained[0])  # said twice it is the same drain

    run(tmp_path, scenario, nodes=4, front_ends=0)


@pytest.mark.parametrize(
    "fields", [{"replace_after_s": -1.0}, {"replace_after_s": math.nan}, {"replace_after_s": math.inf}, {"rebuilds": 0}]
)
def test_settings_that_would_stop_all_repair_are_refused(tmp_path: Path, fields: dict[str, float]) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        before = await control.call("GetRepair", control_pb2.GetRepairRequest())
        with pytest.raises(InvalidRequest, match=str(next(iter(fields.values())))):
            await control.call("SetRepair", control_pb2.SetRepairRequest(**fields))  # type: ignore[arg-type]
        assert await control.call("GetRepair", control_pb2.GetRepairRequest()) == before

    run(tmp_path, scenario, nodes=0, front_ends=0)
