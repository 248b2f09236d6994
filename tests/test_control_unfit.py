"""Members that their nodes cannot make good: who is replaced by itself, and for whom a detached volume is opened."""

import asyncio
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest

from blockstore.config import Placement
from blockstore.control import maintenance, maintenance_work
from blockstore.control.lag import shorter
from blockstore.control.placement import warning
from blockstore.control.records import Segment, Volume
from blockstore.control.unfit import DAMAGED, LEFT_OUT, are_alike, can_be_mended, can_catch_up, to_be_replaced
from blockstore.domain import Configuration, Member, NodeId, ReplicaId, SegmentNumber, VolumeId, VolumeState
from blockstore.errors import Conflict, InvalidRequest
from blockstore.rpc import control_pb2
from blockstore.rpc.control_pb2 import MemberReport
from blockstore.rpc.replica_pb2 import Position, ReplicaStatus
from blockstore.units import GIB
from tests.control_cluster import Cluster, Control, MemoryFrontEnd, MemoryNode, cluster_at, until
from tests.control_scenario import run, until_down
from tests.patient_time import run_patiently

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


def test_nothing_is_to_be_done_about_members_that_are_alike() -> None:
    """It is what a pass asks first; so it must never say so of one that somebody has to do something about."""
    kinds = [None, status(end=Position(epoch=1, sequence=5)), status(end=Position(epoch=1, sequence=6)),
             status(whole=False), status(damage="a row")]  # fmt: skip
    alike = 0
    for of_each in itertools.product(kinds, repeat=3):
        found = {replica: said for replica, said in zip((A, B, C), of_each, strict=True) if said}
        here = {NodeId(f"node-{replica}"): {replica: said} for replica, said in found.items()}
        if are_alike(VOLUME, here):
            alike += 1
            assert not can_be_mended(VOLUME, found)
            assert not shorter(VOLUME, found)
    assert alike == 1 + 2 * (3 + 3 + 1), "nobody is here, or whoever is: one of two ends"


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
    assert can_be_mended(VOLUME, found) is opens


@pytest.mark.parametrize(
    ("found", "behind", "opens"),
    [
        ({A: status(), B: status(), C: status()}, {A}, True),
        ({A: status(), B: status()}, {A}, True),  # and the loss of B would leave nobody who has all of it
        ({A: status(), B: status(), C: status()}, set(), False),
        ({A: status(whole=False), B: status()}, {A}, False),
        ({A: status()}, {A}, False),
        ({B: status(), C: status()}, {A}, False),  # its node is away: nobody could bring it anything
    ],
)
def test_a_detached_volume_is_opened_for_a_member_that_is_behind(
    found: dict[ReplicaId, ReplicaStatus], behind: set[ReplicaId], opens: bool
) -> None:
    assert can_catch_up(VOLUME, found, behind) is opens


@pytest.mark.parametrize(
    ("second", "opens"),
    [
        ([status(), status(), status()], True),
        ([status(), status(), status(whole=False)], True),
        ([status(), status()], True),
        ([status(), status(whole=False), status(whole=False)], False),  # acknowledged writes may be missing there
        ([status()], False),
    ],
)
def test_a_detached_volume_of_two_segments_is_opened_where_both_have_a_quorum(
    second: list[ReplicaStatus], opens: bool
) -> None:
    others = [ReplicaId(f"rep-{letter}") for letter in "def"]
    members = tuple(Member(each, NodeId(f"node-{each}")) for each in others)
    segments = (*VOLUME.segments, Segment(SegmentNumber(1), GIB, Configuration(1, members)))
    volume = replace(VOLUME, size_bytes=2 * GIB, segments=segments)
    found = {A: status(), B: status(), C: status(), **dict(zip(others, second, strict=False))}
    assert can_catch_up(volume, found, {A}) is opens
    found[A] = status(whole=False)
    assert can_be_mended(volume, found) is opens


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


async def leave_behind(cluster: Cluster, control: Control) -> tuple[MemoryNode, str]:
    """A detached volume, and a node whose replica of it lacks 40 records."""
    await control.create(GIB, name="v")
    for node, sequence in zip(cluster.nodes, (100, 100, 60), strict=True):
        [held] = node.replicas.values()
        held.end.CopyFrom(Position(epoch=1, sequence=sequence))
    [replica] = node.replicas
    return node, replica


async def why(control: Control) -> str:
    """What is said of the replicas that are not as they should be."""
    health = await control.call("GetVolumeHealth", control_pb2.GetVolumeRequest(volume="v"))
    return "".join(each.why for each in health.replicas)


def test_a_detached_volume_is_opened_until_nobody_is_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance_work, "BEHIND_FOR_S", 0.5)

    async def scenario(cluster: Cluster, control: Control) -> None:
        node, replica = await leave_behind(cluster, control)
        [front_end] = cluster.front_ends
        front_end.members[replica] = {"lag_records": 1}  # what is appended when it is opened; said from then on

        async def opened() -> bool:
            return bool(front_end.volumes)

        async def closed() -> bool:
            return not front_end.volumes

        await until(opened, "it is open for maintenance")
        assert f"front-end {front_end.id} brings it up to date" in await why(control)
        node.replicas[replica].end.sequence = 100
        await until(lambda: _is_up(control), "the nodes' words are equal")
        for each in (front_end, *cluster.nodes):
            await each.report(control.stub)
        assert front_end.volumes, "the front-end knows better"
        front_end.members.clear()
        await until(closed, "it is closed again")
        now = await control.get("v")
        assert (now.state, now.epoch) == (control_pb2.VOLUME_STATE_AVAILABLE, 1), "once was enough"

    run(tmp_path, scenario)


async def _is_up(control: Control) -> bool:
    health = await control.call("GetVolumeHealth", control_pb2.GetVolumeRequest(volume="v"))
    return all(each.state == "up" for each in health.replicas)


def test_one_that_nobody_can_bring_anything_gives_its_place_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance_work, "BEHIND_FOR_S", 0.2)
    monkeypatch.setattr(maintenance, "STALLED_S", 1.0)

    async def scenario(cluster: Cluster, control: Control) -> None:
        _, replica = await leave_behind(cluster, control)
        [front_end] = cluster.front_ends
        front_end.members[replica] = {"degraded_why": "its disk is full"}

        async def given_up() -> bool:
            return "brought nothing for 1 s: its disk is full" in await why(control)

        await until(given_up, "it is closed again, and says why")
        await until(lambda: _has_none(front_end), "it is closed")
        assert (await control.get("v")).epoch == 1
        [other] = await control.snapshot("v")  # which is none of its business
        await until(lambda: _is_sealed(control, other.id), "it is sealed")

    run(tmp_path, scenario)


async def _has_none(front_end: MemoryFrontEnd) -> bool:
    return not front_end.volumes


async def _is_sealed(control: Control, snapshot: str) -> bool:
    return bool((await control.get_snapshot(snapshot)).sealed_at_ms)


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

                async def unwarned() -> bool:  # the newcomers' first words come a beat later
                    return not [each for each in (await control.status()).problems if each.subject.startswith("vol-")]

                await until(unwarned, "nobody is warned of the volume any more")

    run_patiently(scenario())


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
    "fields",
    [
        {"replace_after_s": -1.0},
        {"replace_after_s": math.nan},
        {"replace_after_s": math.inf},
        {"replace_after_s": 31_622_401.0},
        {"rebuilds": 0},
        {"rebuilds": 1_000_001},
    ],
)
def test_settings_that_would_stop_all_repair_are_refused(tmp_path: Path, fields: dict[str, float]) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        before = await control.call("GetRepair", control_pb2.GetRepairRequest())
        with pytest.raises(InvalidRequest, match=str(next(iter(fields.values())))):
            await control.call("SetRepair", control_pb2.SetRepairRequest(**fields))  # type: ignore[arg-type]
        assert await control.call("GetRepair", control_pb2.GetRepairRequest()) == before

    run(tmp_path, scenario, nodes=0, front_ends=0)
