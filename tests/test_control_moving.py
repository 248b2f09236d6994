"""Which replicas move, and where: who is away, drains and rebalancing, with what must hold before anything begins."""

from dataclasses import replace

import pytest

from blockstore.control import membership
from blockstore.control.moving import AWAY, DRAIN, Cluster, Limits, NodeView, is_void, next_moves, rebalance
from blockstore.control.records import (
    Attachment,
    AttachmentState,
    Maintenance,
    MaintenanceState,
    PlannedMove,
    Segment,
    Volume,
)
from blockstore.domain import Configuration, FrontEndId, Member, NodeId, ReplicaId, SegmentNumber, VolumeId, VolumeState
from blockstore.errors import Conflict, Fenced
from blockstore.units import GIB, Epoch

LIMITS = Limits(replace_after_s=60, rebuild_rate_bytes=0, rebuilds=4, rebuilds_per_node=1)
ZERO = SegmentNumber(0)


def view(name: str, **changes: object) -> NodeView:
    """A node in a zone of its own name's first letter."""
    return replace(NodeView(NodeId(name), name[0], capacity_bytes=100 * GIB), **changes)  # type: ignore[arg-type]


def volume(number: int, *nodes: str, size: int = GIB) -> Volume:
    members = tuple(Member(ReplicaId(f"rep-{number}-{node}"), NodeId(node)) for node in nodes)
    segment = Segment(ZERO, size, Configuration(1, members))
    return Volume(VolumeId(f"vol-{number}"), "", size, VolumeState.AVAILABLE, 0, (segment,), epoch=Epoch(7))


def cluster(
    *views: NodeView,
    lacking: tuple[str, ...] = (),
    emptied: dict[ReplicaId, float] | None = None,
    unfit: dict[ReplicaId, str] | None = None,
) -> Cluster:
    """All are whole, save the replicas on the nodes `lacking`, and on those that are away."""
    down = {each.id for each in views if each.away_s} | set(lacking)
    return Cluster(views, lambda _, member: member.node not in down, emptied or {}, unfit or {})


def moves(volumes: list[Volume], seen: Cluster, limits: Limits = LIMITS) -> list[tuple[str, str, str]]:
    return [(each.replica, each.to_node, each.why) for each in next_moves(volumes, seen, limits)]


def test_who_is_away_for_long_is_replaced_in_another_zone() -> None:
    found = cluster(view("a1"), view("b1"), view("c1", away_s=61), view("a2"), view("d1", used_bytes=50 * GIB))
    assert moves([volume(1, "a1", "b1", "c1")], found) == [("rep-1-c1", "d1", AWAY)]


@pytest.mark.parametrize(("away_s", "limit_s"), [(59.0, 60.0), (1e9, 0.0)])
def test_a_short_absence_costs_nothing_and_none_does_where_that_was_said(away_s: float, limit_s: float) -> None:
    found = cluster(view("a1"), view("b1"), view("c1", away_s=away_s), view("d1"))
    assert moves([volume(1, "a1", "b1", "c1")], found, replace(LIMITS, replace_after_s=limit_s)) == []


def test_nothing_begins_while_fewer_than_a_quorum_of_the_others_is_whole() -> None:
    waits: dict[ReplicaId, str] = {}
    found = cluster(view("a1"), view("b1"), view("c1", away_s=61), view("d1"), lacking=("b1",))
    assert not list(next_moves([volume(1, "a1", "b1", "c1")], found, LIMITS, waits=waits))
    assert waits == {"rep-1-c1": "too few of the others are whole"}


def test_a_node_that_holds_one_is_full_drains_or_is_away_gets_none() -> None:
    waits: dict[ReplicaId, str] = {}
    found = cluster(
        view("a1"), view("b1"), view("c1", draining=True), view("d1", full=True), view("e1", draining=True),
        view("f1", away_s=1),
    )  # fmt: skip
    assert not list(next_moves([volume(1, "a1", "b1", "c1")], found, LIMITS, waits=waits))
    assert "no other node" in waits[ReplicaId("rep-1-c1")]


def test_a_drain_moves_all_and_the_lost_come_first() -> None:
    found = cluster(view("a1", draining=True), view("b1"), view("c1", away_s=100), view("d1"), view("e1"))
    volumes = [volume(1, "a1", "b1", "d1"), volume(2, "b1", "c1", "d1")]
    assert moves(volumes, found) == [("rep-2-c1", "e1", AWAY)]  # one at a time on a new node
    both = replace(LIMITS, rebuilds_per_node=2)
    assert moves(volumes, found, both) == [("rep-2-c1", "e1", AWAY), ("rep-1-a1", "e1", DRAIN)]
    assert len(moves(volumes, found, replace(both, rebuilds=1))) == 1


def test_what_changes_already_is_left_alone_and_counts() -> None:
    found = cluster(view("a1", draining=True), view("b1"), view("c1"), view("d1"), view("e1"))
    newcomer = Member(ReplicaId("rep-new"), NodeId("d1"))
    changing = membership.enlist(volume(1, "a1", "b1", "c1"), ZERO, newcomer, ReplicaId("rep-1-a1"), DRAIN)
    assert moves([changing], found) == []
    assert moves([changing, volume(2, "a1", "b1", "c1")], found) == [("rep-2-a1", "e1", DRAIN)]
    assert moves([changing, volume(2, "a1", "b1", "c1")], found, replace(LIMITS, rebuilds=1)) == []


def test_a_replica_whose_disk_was_emptied_is_made_anew_also_on_its_own_node() -> None:
    found = cluster(view("a1"), view("b1"), view("c1"), lacking=("c1",), emptied={ReplicaId("rep-1-c1"): 61.0})
    assert moves([volume(1, "a1", "b1", "c1")], found) == [("rep-1-c1", "c1", AWAY)]


def test_rebalancing_spreads_zones_first_and_then_load_and_is_done_then() -> None:
    nodes = (view("a1"), view("a2"), view("b1"), view("c1"))
    [zone] = rebalance([volume(1, "a1", "a2", "b1")], cluster(*nodes))
    assert (zone.to_node, zone.why) == ("c1", "2 replicas are in zone a")
    loaded = (view("a1", promised_bytes=60 * GIB), view("a2"), view("b1"), view("c1"))
    [load] = rebalance([volume(1, "a1", "b1", "c1", size=10 * GIB)], cluster(*loaded))
    assert (load.replica, load.to_node) == ("rep-1-a1", "a2")
    assert rebalance([volume(1, "a2", "b1", "c1", size=10 * GIB)], cluster(*nodes)) == []


def test_load_never_moves_a_replica_into_the_zone_of_another() -> None:
    loaded = (view("a1", promised_bytes=60 * GIB), view("b1"), view("b2"), view("c1"))
    assert rebalance([volume(1, "a1", "b1", "c1")], cluster(*loaded)) == []


def test_a_move_that_was_asked_for_is_void_once_its_replica_is_gone() -> None:
    asked = PlannedMove(VolumeId("vol-1"), ZERO, ReplicaId("rep-1-a1"), NodeId("d1"), "load")
    there = volume(1, "a1", "b1", "c1")
    assert not is_void(asked, {"vol-1": there})
    assert is_void(asked, {"vol-1": volume(1, "b1", "c1", "d1")})
    assert is_void(asked, {})
    found = cluster(view("a1"), view("b1"), view("c1"), view("d1"))
    assert [each.to_node for each in next_moves([there], found, LIMITS, [asked])] == ["d1"]


# ---- the steps


def enlisted(volume_: Volume) -> tuple[Volume, ReplicaId]:
    newcomer = Member(ReplicaId("rep-new"), NodeId("d1"))
    return membership.enlist(volume_, ZERO, newcomer, ReplicaId("rep-1-a1"), AWAY), newcomer.replica


def served(volume_: Volume, epoch: int) -> Volume:
    held = Attachment(FrontEndId("fe"), "i", Epoch(epoch), AttachmentState.ATTACHED, False, 0)
    return replace(volume_, state=VolumeState.IN_USE, attachment=held, epoch=Epoch(epoch))


def test_steps_go_on_the_word_of_the_front_end_of_this_epoch_only() -> None:
    changing, newcomer = enlisted(served(volume(1, "a1", "b1", "c1"), 7))
    with pytest.raises(Fenced):
        membership.join(changing, ZERO, Epoch(6), newcomer)
    joint = membership.join(changing, ZERO, Epoch(7), newcomer)
    with pytest.raises(Fenced):
        membership.settle(served(joint, 8), ZERO, Epoch(7), 2)
    with pytest.raises(Conflict):
        membership.settle(joint, ZERO, Epoch(7), 1)
    settled = membership.settle(joint, ZERO, Epoch(7), 2)
    assert [each.node for each in settled.segments[0].configuration.members] == ["d1", "b1", "c1"]
    assert [each.replica for each in membership.left_by(joint, settled)] == ["rep-1-a1"]
    assert membership.left_by(changing, joint) == []


def test_a_newcomer_that_is_not_wanted_leaves_a_tombstone_and_a_member_cannot_be_dismissed() -> None:
    before = served(volume(1, "a1", "b1", "c1"), 7)
    changing, newcomer = enlisted(before)
    dismissed = membership.dismiss(changing, ZERO, newcomer)
    assert dismissed == before
    assert [(each.replica, each.node) for each in membership.left_by(changing, dismissed)] == [("rep-new", "d1")]
    with pytest.raises(Conflict):
        membership.dismiss(membership.join(changing, ZERO, Epoch(7), newcomer), ZERO, newcomer)


def test_maintenance_goes_on_through_the_steps() -> None:
    held = Maintenance(FrontEndId("fe"), "i", Epoch(7), MaintenanceState.OPEN)
    changing, newcomer = enlisted(replace(volume(1, "a1", "b1", "c1"), maintenance=held))
    assert membership.join(changing, ZERO, Epoch(7), newcomer).maintenance == held


def test_a_volume_that_goes_away_or_is_in_error_changes_no_members() -> None:
    for state in (VolumeState.DELETING, VolumeState.ERROR, VolumeState.CREATING):
        with pytest.raises(Conflict):
            enlisted(replace(volume(1, "a1", "b1", "c1"), state=state))
