"""Majorities, checked against counting on one's fingers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.domain import Configuration, Member, NodeId, ReplicaId
from blockstore.replication.quorum import Quorum
from tests.replication_parts import CONFIGURATION, A, B, C

IDS = [ReplicaId(f"rep-{index:017x}") for index in range(1, 8)]


def configuration(members: list[ReplicaId], old: list[ReplicaId] | None = None) -> Configuration:
    def made(ids: list[ReplicaId]) -> tuple[Member, ...]:
        return tuple(Member(replica, NodeId("node-" + replica[4:])) for replica in ids)

    return Configuration(1, made(members), made(old or []))


def test_two_of_three() -> None:
    quorum = Quorum(CONFIGURATION)
    assert not quorum.reached([A])
    assert quorum.reached([A, C])
    assert quorum.level({A: 9, B: 3, C: 5}) == 5


def test_while_members_change_both_sets_must_agree() -> None:
    """Else the old and the new members could each commit another record at one position."""
    quorum = Quorum(configuration([IDS[0], IDS[3], IDS[4]], IDS[:3]))
    assert not quorum.reached([IDS[3], IDS[4]])
    assert not quorum.reached([IDS[0], IDS[1]])
    assert quorum.reached([IDS[0], IDS[1], IDS[4]])
    assert quorum.level(dict(zip(IDS[:5], [9, 2, 1, 8, 7], strict=True))) == 2


def test_no_members_is_no_configuration() -> None:
    with pytest.raises(ValueError, match="no members"):
        Quorum(configuration([]))


@settings(deadline=None)
@given(
    st.sets(st.sampled_from(IDS), min_size=1),
    st.sets(st.sampled_from(IDS)),
    st.lists(st.integers(0, 9), min_size=len(IDS), max_size=len(IDS)),
)
def test_the_level_is_the_highest_that_counting_finds(
    members: set[ReplicaId], old: set[ReplicaId], numbers: list[int]
) -> None:
    values = dict(zip(IDS, numbers, strict=True))
    quorum = Quorum(configuration(sorted(members), sorted(old)))

    def counted(level: int) -> bool:
        sets = [ids for ids in (members, old) if ids]
        return all(sum(values[replica] >= level for replica in ids) > len(ids) / 2 for ids in sets)

    assert quorum.level(values) == max(level for level in range(10) if counted(level))
    assert quorum.reached([r for r in IDS if values[r] >= 5]) == counted(5)
