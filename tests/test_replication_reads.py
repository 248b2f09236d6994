"""Rule 4 on the leader's side: who answers a read, and when its data may be handed on."""

from collections import Counter

from blockstore.errors import Corrupt, Fenced, OutOfRange, QuorumUnavailable
from blockstore.replication.messages import Failed, LeaderEffect, Over, ReadDone, ReadDropped, ReadFrom
from blockstore.replication.reads import RUN
from blockstore.units import BlockNumber
from tests.replication_group import SETTINGS, Group, of, reads
from tests.replication_parts import A, B, C, at, none_of, only, trim, write


def read(group: Group, block: int = 1, count: int = 1) -> list[LeaderEffect]:
    return group.keep(group.leader.read(("read", block), BlockNumber(block), count, group.now))


def asked(group: Group) -> ReadFrom:
    return reads(group.effects)[-1]


def heartbeats_answered(group: Group) -> list[LeaderEffect]:
    """A round of heartbeats leaves and is answered at once."""
    effects = group.pass_time(SETTINGS.heartbeat_s)
    return [*effects, *group.all_ack()]


def test_members_take_turns_and_the_read_carries_the_commit() -> None:
    group = Group().serve()
    for block in range(6 * RUN):
        read(group, block)
    assert Counter(r.replica for r in reads(group.effects)) == {A: 2 * RUN, B: 2 * RUN, C: 2 * RUN}
    assert {r.commit for r in reads(group.effects)} == {at(5, 1)}


def test_a_read_is_answered_under_the_lease() -> None:
    group = Group().serve()
    read(group)
    effects = group.leader.read_arrived(asked(group).attempt, group.now)
    assert effects == [ReadDone(("read", 1), asked(group).attempt)]


def test_a_front_end_that_was_cut_off_never_shows_old_data_as_new() -> None:
    """The lease counts from when the confirmed request was sent, at the time when the data is here."""
    group = Group().serve()
    read(group)
    attempt = asked(group).attempt
    group.now += SETTINGS.lease_s
    assert group.keep(group.leader.read_arrived(attempt, group.now)) == []
    assert none_of(ReadDone, group.pass_time(0.01))
    group.ack(A)
    assert only(ReadDone, group.ack(B)).attempt == attempt


def test_a_confirmation_counts_from_when_its_request_was_sent() -> None:
    group = Group().serve()
    group.pass_time(SETTINGS.heartbeat_s)
    read(group)
    group.now += SETTINGS.lease_s
    group.all_ack()
    assert group.leader.read_arrived(asked(group).attempt, group.now) == []


def test_one_member_is_no_quorum_for_the_lease() -> None:
    group = Group().serve()
    read(group)
    group.now += SETTINGS.lease_s * 2
    group.pass_time(0.0)
    group.ack(A)
    assert none_of(ReadDone, group.leader.read_arrived(asked(group).attempt, group.now))


def test_a_filling_member_confirms_no_lease() -> None:
    """It may have lost the promise that it gave to a newer epoch."""
    group = Group().serve()
    group.now += SETTINGS.lease_s * 2
    group.pass_time(0.0)
    group.ack(C, whole=False)
    group.ack(A)
    group.ack(B, whole=False)
    read(group)
    assert none_of(ReadDone, group.leader.read_arrived(asked(group).attempt, group.now))


def test_a_read_waits_for_the_newest_write_that_it_overlaps() -> None:
    group = Group().serve()
    group.keep(group.leader.submit("one", write(1), group.now))
    group.keep(group.leader.submit("two", trim(0, 9), group.now))
    assert read(group) == []
    assert [r.start for r in reads(read(group, 40))] == [40]
    group.ack(A, 2)
    assert reads(group.ack(B, 2)) == []
    group.ack(A, 3)
    assert [r.start for r in reads(group.ack(B, 3))] == [1]
    assert asked(group).commit == at(5, 3)


def test_a_write_that_came_later_is_not_waited_for() -> None:
    group = Group().serve()
    read(group)
    group.keep(group.leader.submit("later", write(1), group.now))
    assert not none_of(ReadDone, group.leader.read_arrived(asked(group).attempt, group.now))


def test_only_a_member_that_has_all_that_is_committed_is_asked() -> None:
    group = Group().serve()
    group.keep(group.leader.submit("w", write(9), group.now))
    group.ack(A)
    group.ack(B)
    for block in range(2 * RUN):
        read(group, block)
    assert {r.replica for r in reads(group.effects)} == {A, B}


def test_a_filling_or_silent_member_is_not_asked() -> None:
    group = Group().serve()
    group.ack(B, whole=False)
    group.now += SETTINGS.lease_s
    group.pass_time(0.0)
    group.ack(A)
    group.ack(B, whole=False)
    for block in range(4):
        read(group, block)
    assert {r.replica for r in reads(group.effects)} == {A}


def test_another_member_is_asked_where_one_fails() -> None:
    group = Group().serve()
    read(group)
    first = asked(group)
    group.keep(group.leader.read_failed(first.attempt, QuorumUnavailable("busy"), group.now))
    second = asked(group)
    assert second.replica != first.replica
    assert group.leader.read_arrived(first.attempt, group.now) == [ReadDropped(first.attempt)]
    assert not none_of(ReadDone, group.leader.read_arrived(second.attempt, group.now))


def test_corrupt_is_told_only_after_every_replica_was_tried() -> None:
    group = Group().serve()
    read(group)
    tried = []
    effects: list[LeaderEffect] = []
    while none_of(Failed, effects):
        tried.append(asked(group).replica)
        effects = group.keep(group.leader.read_failed(asked(group).attempt, Corrupt("block 1"), group.now))
    assert sorted(tried) == [A, B, C]
    assert isinstance(only(Failed, effects).error, Corrupt)


def test_a_replica_that_could_not_answer_is_tried_again_before_corrupt_is_told() -> None:
    group = Group().serve()
    read(group)
    group.keep(group.leader.read_failed(asked(group).attempt, Corrupt("block 1"), group.now))
    group.keep(group.leader.read_failed(asked(group).attempt, QuorumUnavailable("busy"), group.now))
    effects = group.keep(group.leader.read_failed(asked(group).attempt, Corrupt("block 1"), group.now))
    assert none_of(Failed, effects)
    group.pass_time(0.1)
    last = asked(group)
    assert not none_of(ReadDone, group.leader.read_arrived(last.attempt, group.now))


def test_what_fails_everywhere_is_tried_again_until_the_retry_limit() -> None:
    group = Group().serve()
    read(group)
    for _ in range(3):
        group.keep(group.leader.read_failed(asked(group).attempt, QuorumUnavailable("busy"), group.now))
    assert len(reads(group.effects)) == 3
    group.pass_time(0.1)
    assert len(reads(group.effects)) == 4
    effects = group.pass_time(SETTINGS.retry_limit_s)
    assert isinstance(of(Failed, effects)[0].error, QuorumUnavailable)


def test_a_request_that_makes_no_sense_is_not_tried_again() -> None:
    group = Group().serve()
    read(group)
    effects = group.leader.read_failed(asked(group).attempt, OutOfRange("beyond the end"), group.now)
    assert isinstance(only(Failed, effects).error, OutOfRange)


def test_a_read_that_is_fenced_ends_the_leader() -> None:
    group = Group().serve()
    read(group)
    effects = group.leader.read_failed(asked(group).attempt, Fenced("epoch 6"), group.now)
    assert isinstance(only(Over, effects).error, Fenced)


def test_what_a_lost_member_was_asked_goes_to_another() -> None:
    group = Group().serve()
    read(group)
    first = asked(group)
    effects = group.keep(group.leader.disconnected(first.replica, group.now))
    assert only(ReadDropped, effects).attempt == first.attempt
    assert asked(group).replica != first.replica


def test_what_a_silent_member_was_asked_goes_to_another_in_time() -> None:
    group = Group().serve()
    read(group)
    silent = asked(group).replica
    for _ in range(6):
        group.pass_time(SETTINGS.heartbeat_s)
        for member in {A, B, C} - {silent}:
            group.ack(member)
    assert asked(group).replica != silent


def test_reads_before_the_epoch_serves_wait() -> None:
    group = Group()
    for member in (A, B, C):
        group.seal(member)
    assert read(group) == []
    group.ack(A)
    group.ack(B)
    assert asked(group).start == 1


def test_no_member_is_asked_before_the_epoch_serves_whoever_answers_its_seal_meanwhile() -> None:
    group = Group()
    read(group)
    for member in (A, B, C):
        assert reads(group.seal(member)) == []
    group.ack(A)
    group.ack(B)
    assert asked(group).start == 1


def test_a_read_that_is_over_time_is_dropped_where_it_is_under_way() -> None:
    group = Group().serve()
    read(group)
    attempt = asked(group).attempt
    group.now += SETTINGS.retry_limit_s - SETTINGS.heartbeat_s
    heartbeats_answered(group)
    assert attempt in {dropped.attempt for dropped in of(ReadDropped, group.effects)}
    assert group.leader.read_arrived(attempt, group.now) == [ReadDropped(attempt)]
