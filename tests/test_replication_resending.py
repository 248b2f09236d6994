"""The leader's part of rule 6: what a member that is behind is sent, and what it is told to fetch."""

from blockstore.replication.leader import LeaderSettings
from blockstore.replication.messages import CatchUp
from blockstore.units import BLOCK_SIZE
from tests.replication_group import SETTINGS, Group, records_sent
from tests.replication_parts import A, B, C, at, write


def write_without_c(group: Group, count: int) -> None:
    """So many records that A and B have, and of which C says nothing."""
    for ticket in range(count):
        group.keep(group.leader.submit(ticket, write(ticket), group.now))
        group.ack(A)
        group.ack(B)


def test_a_member_that_comes_back_is_resent_what_it_lacks() -> None:
    group = Group().serve()
    group.leader.disconnected(C, group.now)
    write_without_c(group, 3)
    group.seal(C, at(5, 2), commit=at(5, 1))
    assert records_sent(group, C) == [3, 4]
    assert group.seals[C][-1].known == at(5, 1)


def test_a_member_whose_tail_may_differ_first_catches_up_with_the_log_that_was_chosen() -> None:
    group = Group()
    for member in (A, B):
        group.seal(member, at(4, 6), commit=at(4, 5))
    group.seal(C, at(3, 9), commit=at(3, 4))
    message = group.sent[C][-1]
    assert message.records == ()
    assert message.catch_up == CatchUp(at(4, 6), at(4, 5), (A, B))


def test_what_the_leader_no_longer_holds_is_fetched_from_peers() -> None:
    settings = LeaderSettings(retained_bytes=4 * BLOCK_SIZE)
    group = Group(settings).serve()
    group.leader.disconnected(C, group.now)
    write_without_c(group, 9)
    group.forget()
    group.seal(C, at(5, 1), commit=at(5, 1))
    (message,) = group.sent[C]
    assert message.catch_up is not None
    target = message.catch_up.target
    assert message.records == ()
    assert at(5, 1) < target < at(5, 10)
    assert message.catch_up.base == at(5, 9)
    assert set(message.catch_up.peers) == {A, B}
    group.ack(C, matched=target, behind=True)
    assert records_sent(group, C)[0] == target.sequence + 1


def test_no_records_are_sent_to_a_member_that_is_behind() -> None:
    settings = LeaderSettings(retained_bytes=2 * BLOCK_SIZE)
    group = Group(settings).serve()
    group.leader.disconnected(C, group.now)
    write_without_c(group, 9)
    group.seal(C, at(5, 1), commit=at(5, 1))
    group.forget()
    group.keep(group.leader.submit("w", write(1), group.now))
    assert records_sent(group, C) == []
    assert records_sent(group, A) == [11]


def test_a_filling_member_is_told_its_sources_with_every_heartbeat() -> None:
    group = Group().serve()
    group.ack(C, whole=False)
    group.pass_time(SETTINGS.heartbeat_s)
    catch_up = group.sent[C][-1].catch_up
    assert catch_up is not None
    assert set(catch_up.peers) == {A, B}
    assert group.sent[A][-1].catch_up is None


def test_a_gap_that_an_answer_to_an_older_request_tells_of_is_out_of_date() -> None:
    group = Group().serve()
    group.keep(group.leader.submit("w", write(1), group.now))
    old = group.requests[C]
    group.ack(C, 1, behind=True)
    resent = records_sent(group, C)
    assert resent == [2, 2]
    group.requests[C] = old
    group.ack(C, 1, behind=True)
    assert records_sent(group, C) == resent


def test_a_slow_member_is_sent_no_more_than_its_window() -> None:
    group = Group(LeaderSettings(window_bytes=3 * BLOCK_SIZE, max_record_bytes=BLOCK_SIZE)).serve()
    write_without_c(group, 20)
    assert len(records_sent(group, C)) == 3
    group.ack(C, 4)
    assert len(records_sent(group, C)) == 6


def test_retained_records_are_let_go_once_every_member_has_them() -> None:
    group = Group().serve()
    for ticket in range(5):
        group.keep(group.leader.submit(ticket, write(ticket), group.now))
        group.all_ack()
    group.seal(C, at(5, 4), floor=at(5, 6))
    catch_up = group.sent[C][-1].catch_up
    assert catch_up is not None
    assert catch_up.target == at(5, 5)


def test_a_late_answer_may_know_of_more_that_is_committed() -> None:
    """Its journal ends at its commit: a member that fills needs a base no lower than that."""
    group = Group()
    for member in (A, B):
        group.seal(member, at(4, 9), commit=at(4, 3))
    assert group.leader.commit == at(4, 3)
    group.seal(C, at(4, 9), commit=at(4, 8))
    assert group.leader.commit == at(4, 8)
