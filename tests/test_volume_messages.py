"""What a front-end tells control of its members, for people."""

from blockstore.volume.control_messages import degraded_why
from tests.replication_group import SETTINGS, Group
from tests.replication_parts import A, B, C, at


def test_a_member_with_all_records_is_as_good_as_the_others() -> None:
    assert [degraded_why(member) for member in Group().serve().leader.status().members] == ["", "", ""]


def test_a_member_that_fills_and_one_without_room_say_so() -> None:
    group = Group().serve()
    group.ack(B, full=True)
    group.ack(C, whole=False)
    assert [degraded_why(member) for member in group.leader.status().members] == [
        "",
        "its disk is full",
        "it is being filled from its peers",
    ]


def test_a_member_that_takes_no_part_any_more_says_what_to_do() -> None:
    """Nobody fills it: it has committed what was given up, and stays as it is until it is replaced."""
    group = Group(accept_loss=True)
    group.seal(A, at(4, 5))
    group.seal(B, at(4, 4), floor=at(4, 8))
    group.pass_time(SETTINGS.loss_wait_s)
    group.seal(C, at(4, 8), commit=at(4, 8))
    assert "another replica takes its place" in degraded_why(group.leader.status().members[2])
