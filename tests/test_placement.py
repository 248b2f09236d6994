"""Where replicas go: three nodes, three zones, the freest first; against a search of all choices."""

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.config import Placement
from blockstore.control.placement import REPLICAS, Candidate, place
from blockstore.control.placing import spread
from blockstore.domain import NodeId
from blockstore.errors import Conflict, NoSpace, QuorumUnavailable


def node(
    number: int, zone: str, *, used: int = 0, promised: int = 0, full: bool = False, capacity: int = 100
) -> Candidate:
    return Candidate(NodeId(f"node-{number:017x}"), zone, capacity, used, promised, full)


nodes = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 100), st.integers(0, 200), st.booleans()), max_size=8
).map(lambda each: [node(i, zone, used=u, promised=p, full=f) for i, (zone, u, p, f) in enumerate(each)])


@given(nodes, st.randoms())
def test_three_zones_wherever_there_are_three_and_the_order_does_not_matter(found: list[Candidate], random) -> None:  # type: ignore[no-untyped-def]
    free = [each for each in found if not each.full]
    if len(free) < REPLICAS:
        with pytest.raises((NoSpace, QuorumUnavailable)):
            place(found, Placement.WARN)
        return
    placed = place(found, Placement.WARN)
    by_id = {each.id: each for each in found}
    chosen = [by_id[each] for each in placed.nodes]
    assert len({each.id for each in chosen}) == REPLICAS
    assert not any(each.full for each in chosen)
    most = max(len({each.zone for each in three}) for three in combinations(free, REPLICAS))
    assert len({each.zone for each in chosen}) == most
    assert bool(placed.warnings) == (most < REPLICAS)
    shuffled = found.copy()
    random.shuffle(shuffled)
    assert place(shuffled, Placement.WARN) == placed


@given(nodes)
def test_within_a_zone_the_least_loaded_is_taken(found: list[Candidate]) -> None:
    if len([each for each in found if not each.full]) < REPLICAS:
        return
    chosen = {each for each in found if each.id in place(found, Placement.WARN).nodes}
    for passed_over in (each for each in found if not each.full and each not in chosen):
        same_zone = [each for each in chosen if each.zone == passed_over.zone]
        assert all(each.load <= passed_over.load for each in same_zone)


@pytest.mark.parametrize("crowded", range(4))
def test_a_volume_is_on_all_nodes_though_the_disk_of_one_is_a_little_fuller(crowded: int) -> None:
    """Else the noise of a disk that others write to would decide, and three of four nodes have all of it."""
    found = [node(i, zone, used=7 * (i == crowded), capacity=1000) for i, zone in enumerate("abcd")]
    placed = spread(found, [1, 1, 1, 1], Placement.WARN)
    assert Counter(each for segment in placed for each in segment.nodes) == {each.id: 3 for each in found}


def test_a_node_that_is_clearly_fuller_is_left_alone_until_others_have_caught_up() -> None:
    found = [node(i, zone, used=30 * (i == 0), capacity=100) for i, zone in enumerate("abcd")]
    placed = spread(found, [10] * 4, Placement.WARN)
    assert [found[0].id in each.nodes for each in placed] == [False, False, False, True]


def test_strict_refuses_shared_zones_and_says_what_to_do() -> None:
    found = [node(1, "a"), node(2, "a"), node(3, "b")]
    with pytest.raises(Conflict, match=r"2 zones \(a, b\).*--zone.*--placement warn"):
        place(found, Placement.STRICT)
    assert "2 zones (a, b)" in place(found, Placement.WARN).warnings[0]


def test_too_few_nodes_and_too_few_with_room_are_told_apart() -> None:
    with pytest.raises(QuorumUnavailable, match="there are 2"):
        place([node(1, "a"), node(2, "b")], Placement.WARN)
    with pytest.raises(NoSpace, match="1 of 3 are full"):
        place([node(1, "a"), node(2, "b"), node(3, "c", full=True)], Placement.WARN)
