"""Rule 7: the steps of a configuration, its quorums, and the leader that goes on under it."""

from collections.abc import Callable

import pytest

from blockstore.domain import ORIGIN, Configuration, Member, NodeId, Replacement, ReplicaId
from blockstore.errors import Conflict, NoSpace
from blockstore.replication.messages import Completed, Failed, FencedBy, Over, ReadDropped, SealAnswer
from blockstore.replication.quorum import Quorum
from blockstore.replication.recovery import ChosenLog, Undecided, choose_log
from blockstore.units import FIRST_GENERATION, BlockNumber, Epoch
from tests.replication_group import EPOCH, Group, of, reads, records_sent
from tests.replication_parts import CONFIGURATION, A, B, C, at, only, write

D = ReplicaId("rep-" + "d" * 17)
NEWCOMER = Member(D, NodeId("node-" + "d" * 17))
ENLISTED = CONFIGURATION.enlist(Replacement(NEWCOMER, C))
JOINT = ENLISTED.joint()
SETTLED = JOINT.settle()


def replicas(members: tuple[Member, ...]) -> list[ReplicaId]:
    return [member.replica for member in members]


def test_a_change_takes_its_steps_one_after_the_other() -> None:
    assert replicas(ENLISTED.members) == [A, B, C]
    assert replicas(ENLISTED.everyone) == [A, B, C, D]
    assert ENLISTED.number == CONFIGURATION.number
    assert (JOINT.number, replicas(JOINT.members), replicas(JOINT.old_members)) == (2, [A, B, D], [A, B, C])
    assert replicas(JOINT.leaving) == [C]
    assert replicas(JOINT.everyone) == [A, B, D, C]
    assert Configuration(3, JOINT.members) == SETTLED
    assert ENLISTED.dismiss() == CONFIGURATION


@pytest.mark.parametrize(
    "step",
    [
        lambda: ENLISTED.enlist(Replacement(NEWCOMER, A)),
        lambda: JOINT.enlist(Replacement(NEWCOMER, A)),
        lambda: CONFIGURATION.enlist(Replacement(NEWCOMER, D)),
        lambda: CONFIGURATION.enlist(Replacement(Member(D, CONFIGURATION.members[0].node), C)),
        lambda: CONFIGURATION.enlist(Replacement(Member(D, CONFIGURATION.members[1].node), A)),
        CONFIGURATION.joint,
        CONFIGURATION.settle,
        ENLISTED.settle,
    ],
)
def test_no_step_is_left_out_and_none_begins_beside_another(step: Callable[[], Configuration]) -> None:
    with pytest.raises(Conflict):
        step()


def test_a_newcomer_has_no_vote() -> None:
    quorum = Quorum(ENLISTED)
    assert quorum.replicas == (A, B, C)
    assert not quorum.reached({A, D})
    assert quorum.level({A: 5, B: 3, C: 1, D: 9}) == 3


def test_between_the_steps_a_quorum_is_one_of_both() -> None:
    quorum = Quorum(JOINT)
    assert not quorum.reached({A, C})
    assert not quorum.reached({A, D})
    assert quorum.reached({A, B})
    assert quorum.reached({A, C, D})
    assert quorum.level({A: 9, B: 1, C: 9, D: 1}) == 1


def test_what_only_the_old_members_have_may_have_been_acknowledged() -> None:
    quorum = Quorum(JOINT)
    assert quorum.reached_before({A, C})
    assert not quorum.reached_before({B, D})


def test_an_attachment_between_the_steps_misses_nothing_that_the_old_members_acknowledged() -> None:
    """(1, 9) was acknowledged by B and C before both sets counted; C is away, and B has lost it."""
    answers = {
        A: SealAnswer(EPOCH, 2, at(1, 8), at(1, 7), ORIGIN, True),
        B: SealAnswer(EPOCH, 2, at(1, 5), at(1, 5), ORIGIN, False, at(1, 9)),
        D: SealAnswer(EPOCH, 2, at(1, 8), at(1, 7), ORIGIN, True),
    }
    assert isinstance(choose_log(Quorum(JOINT), answers), Undecided)
    answers[C] = SealAnswer(EPOCH, 2, at(1, 9), at(1, 7), ORIGIN, True)
    assert choose_log(Quorum(JOINT), answers) == ChosenLog(at(1, 9), at(1, 7), FIRST_GENERATION)


# ---- the leader


def changing() -> Group:
    """Serving; the newcomer is whole, and all have the same log."""
    group = Group().serve()
    group.sent[D], group.seals[D], group.requests[D] = [], [], 0
    group.keep(group.leader.reconfigure(ENLISTED, group.now))
    group.seal(D, at(EPOCH, 1))
    for member in (A, B, C, D):
        group.ack(member)
    group.forget()
    return group


def test_a_newcomer_is_sent_the_log_and_its_acks_count_for_nothing() -> None:
    group = changing()
    ticket = object()
    group.keep(group.leader.submit(ticket, write(1), group.now))
    assert records_sent(group, D) == [2]
    group.ack(A)
    assert of(Completed, group.ack(D)) == []
    assert of(Completed, group.ack(B)) == [Completed((ticket,))]


def test_between_the_steps_nothing_is_answered_without_a_quorum_of_both() -> None:
    group = changing()
    group.keep(group.leader.reconfigure(JOINT, group.now))
    assert [message.configuration for message in group.sent[A]] == [2]
    ticket = object()
    group.all_ack()  # the record of the configuration
    group.keep(group.leader.submit(ticket, write(1), group.now))
    assert of(Completed, [*group.ack(A), *group.ack(D)]) == []
    assert of(Completed, group.ack(C)) == [Completed((ticket,))]


def test_it_settles_once_a_record_behind_all_others_is_on_both() -> None:
    group = changing()
    assert group.leader.status().settled == 1
    group.keep(group.leader.submit(object(), write(1), group.now))  # in flight, and on A only
    group.ack(A)
    group.keep(group.leader.reconfigure(JOINT, group.now))
    group.ack(B, 2)
    assert group.leader.commit == at(EPOCH, 2)
    assert group.leader.status().settled == 0
    group.ack(A)
    group.ack(D)
    assert group.leader.status().settled == 0
    group.ack(C)
    assert group.leader.status().settled == 2


def test_who_leaves_is_read_from_no_more_and_what_it_was_asked_is_asked_of_another() -> None:
    group = changing()
    group.all_ack()
    asked = [
        read
        for number in range(200)
        for read in reads(group.keep(group.leader.read(number, BlockNumber(9), 1, group.now)))
    ]
    of_c = [read.attempt for read in asked if read.replica == C]
    assert of_c
    effects = group.keep(group.leader.reconfigure(JOINT, group.now))
    assert {dropped.attempt for dropped in of(ReadDropped, effects)} == set(of_c)
    assert len(reads(effects)) == len(of_c)
    later = [read for number in range(200) for read in reads(group.leader.read(-number, BlockNumber(9), 1, group.now))]
    assert {read.replica for read in (*reads(effects), *later)} <= {A, B, D}


def test_a_member_that_has_left_has_no_say_any_more() -> None:
    group = changing()
    group.keep(group.leader.reconfigure(JOINT, group.now))
    for member in (A, B, C, D):
        group.ack(member)
    group.keep(group.leader.reconfigure(SETTLED, group.now))
    group.all_ack()
    group.ack(D)
    assert [each.replica for each in group.leader.status().members] == [A, B, D]
    assert group.leader.answered(C, FencedBy(Epoch(9), 9), group.now) == []
    ticket = object()
    group.keep(group.leader.submit(ticket, write(1), group.now))
    assert of(Completed, [*group.ack(B), *group.ack(D)]) == [Completed((ticket,))]


def test_an_older_configuration_and_one_before_it_serves_change_nothing() -> None:
    group = changing()
    group.keep(group.leader.reconfigure(JOINT, group.now))
    assert group.leader.reconfigure(ENLISTED, group.now) == []
    assert group.leader.configuration == JOINT
    assert Group().leader.reconfigure(ENLISTED, 100.0) == []


def test_a_member_that_heard_of_this_leaders_own_newer_configuration_does_not_end_it() -> None:
    group = changing()
    assert of(Over, group.leader.answered(B, FencedBy(EPOCH, 2), group.now)) == []
    assert of(Over, group.leader.answered(A, FencedBy(Epoch(EPOCH + 1), 1), group.now))


def test_only_members_are_asked_for_room_and_in_between_both_sets() -> None:
    group = changing()
    group.ack(D, full=True)
    group.keep(group.leader.disconnected(C, group.now))
    assert group.leader.status().lacks_room == ""
    group.keep(group.leader.reconfigure(JOINT, group.now))
    assert group.leader.status().lacks_room == ""  # A and B are a quorum of both
    group.ack(A, full=True)
    assert group.leader.status().lacks_room == f"full: {CONFIGURATION.members[0].node}, {NEWCOMER.node}; away: " + (
        CONFIGURATION.members[2].node
    )
    assert isinstance(only(Failed, group.leader.submit("w", write(1), group.now)).error, NoSpace)
