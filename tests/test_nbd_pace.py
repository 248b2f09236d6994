"""When a front-end speaks to control again."""

import pytest

from blockstore.domain import Configuration, Member, NodeId, Replacement, ReplicaId, SegmentNumber, VolumeId
from nbd_server.pace import Change, Pace

MEMBERS = tuple(Member(ReplicaId(f"rep-{number}"), NodeId(f"node-{number}")) for number in range(3))
NEWCOMER = Member(ReplicaId("rep-3"), NodeId("node-3"))
FILLING = Configuration(1, MEMBERS, replacement=Replacement(NEWCOMER, MEMBERS[0].replica, "drain"))


def change(configuration: Configuration, volume: str = "vol-1") -> Change:
    return VolumeId(volume), SegmentNumber(0), configuration


def test_it_is_the_interval_while_nothing_changes() -> None:
    pace = Pace(1.0)
    assert [pace.next_s(set(), 0.01, now) for now in (5.0, 6.0, 7.0)] == [1.0] * 3


def test_it_is_fast_after_each_step_and_slow_while_none_comes() -> None:
    pace = Pace(1.0)
    filling, joint = {change(FILLING)}, {change(FILLING.joint())}
    assert [pace.next_s(filling, 0.001, now) for now in (100.0, 100.9, 104.0, 110.0, 9_000.0)] == pytest.approx(
        [0.1, 0.1, 0.4, 1, 1]
    )
    assert pace.next_s(joint, 0.001, 9_001.0) == 0.1
    assert pace.next_s(joint | {change(FILLING, "vol-2")}, 0.001, 9_100.0) == 0.1
    assert pace.next_s(set(), 0.001, 9_101.0) == 1.0
    assert pace.next_s(filling, 0.001, 9_500.0) == 0.1, "another change of the same kind"


def test_heartbeats_that_take_long_are_seldom() -> None:
    pace = Pace(1.0)
    took = [pace.next_s({change(FILLING)}, took_s, 50.0) for took_s in (0.02, 0.05, 3.0)]
    assert took == pytest.approx([0.2, 0.5, 1.0])
