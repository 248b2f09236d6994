"""The leader's rule 1: with which log an epoch begins, and from when on guests are served."""

from dataclasses import replace

from blockstore.domain import ORIGIN
from blockstore.errors import Fenced, QuorumUnavailable
from blockstore.log import UNKNOWN_FLOOR
from blockstore.record import OperationKind
from blockstore.replication.messages import Failed, FencedBy, Over, SealEpoch, Send, Serving
from blockstore.units import Epoch
from tests.replication_group import EPOCH, SETTINGS, Group, of, records_sent
from tests.replication_parts import A, B, C, at, none_of, only, write


def test_every_connection_begins_with_a_seal() -> None:
    group = Group()
    group.connect(A)
    assert group.effects == [Send(A, SealEpoch(EPOCH, 1, connection=1))]


def test_the_epoch_begins_behind_the_highest_log_of_a_quorum() -> None:
    group = Group()
    group.seal(A, at(3, 7), generation=2)
    assert not group.sent[A]
    group.seal(B, at(4, 6), generation=3)
    (message,) = group.sent[B]
    (record,) = message.records
    assert (record.position, record.previous, record.generation) == (at(5, 7), at(4, 6), 3)
    assert record.operations[0].kind is OperationKind.EPOCH_START


def test_an_answer_of_a_connection_that_broke_counts_no_more() -> None:
    """The member may have restarted and lost what it promised."""
    group = Group()
    group.seal(A, at(3, 7))
    group.keep(group.leader.disconnected(A, group.now))
    group.seal(B, at(3, 7))
    assert not group.sent[B]
    group.seal(A, at(3, 7))
    assert records_sent(group, B) == [8]


def test_no_guest_is_served_before_the_epochs_first_record_is_on_a_quorum() -> None:
    """Older records of a minority count as committed only from then on (Raft, section 5.4.2)."""
    group = Group()
    for member in (A, B, C):
        group.seal(member, at(4, 6))
    group.leader.submit("w", write(1), group.now)
    assert none_of(Serving, group.ack(A))
    assert records_sent(group, A) == [7]
    effects = group.ack(B)
    assert not none_of(Serving, effects)
    assert records_sent(group, A) == [7, 8]


def test_commit_never_counts_records_of_an_older_epoch_alone() -> None:
    group = Group()
    for member in (A, B, C):
        group.seal(member, at(4, 6))
    group.ack(A, matched=at(4, 6))
    group.ack(B, matched=at(4, 6))
    assert group.leader.commit == ORIGIN


def test_an_older_lease_is_waited_for_unless_every_member_answered() -> None:
    group = Group()
    group.seal(A)
    group.seal(B)
    group.ack(A)
    assert none_of(Serving, group.ack(B))
    assert none_of(Serving, group.pass_time(SETTINGS.lease_s))
    assert not none_of(Serving, group.pass_time(SETTINGS.drift_s))


def test_an_older_lease_may_be_longer_than_this_ones() -> None:
    """The front-end before was set otherwise: its reads are good for longer than this one's would be."""
    group = Group(replace(SETTINGS, lease_s=SETTINGS.lease_s / 2, older_lease_s=SETTINGS.lease_s))
    group.seal(A)
    group.seal(B)
    group.ack(A)
    assert none_of(Serving, group.ack(B))
    assert none_of(Serving, group.pass_time(SETTINGS.lease_s))
    assert not none_of(Serving, group.pass_time(SETTINGS.drift_s))


def test_the_last_members_answer_ends_the_wait() -> None:
    group = Group()
    group.seal(A)
    group.seal(B)
    group.ack(A)
    group.ack(B)
    assert not none_of(Serving, group.seal(C))


def test_a_newer_epoch_anywhere_ends_this_one() -> None:
    group = Group().serve()
    group.leader.submit("w", write(1), group.now)
    effects = group.leader.answered(C, FencedBy(Epoch(6), 1), group.now)
    assert of(Failed, effects)[0].tickets == ("w",)
    assert isinstance(only(Over, effects).error, Fenced)
    assert group.leader.submit("x", write(1), group.now)[0] == Failed(("x",), group.leader.status().over)  # type: ignore[arg-type]
    assert group.leader.tick(group.now + 1) == []


def test_what_may_be_missing_ends_the_attachment_unless_it_is_accepted() -> None:
    for accept_loss in (False, True):
        group = Group(accept_loss=accept_loss)
        group.seal(A, at(4, 5))
        group.seal(B, at(4, 4), floor=at(4, 7))
        effects = group.seal(C, at(4, 4), floor=at(4, 7))
        assert none_of(Over, effects) == accept_loss
        assert ("may hold acknowledged writes" in group.leader.status().why) != accept_loss


def test_an_attachment_whose_log_cannot_be_had_any_more_makes_room_for_another() -> None:
    """A alone has the log and is gone: the quorum that is left needs another epoch to choose its own."""
    group = Group()
    group.seal(A, at(4, 9))
    group.seal(B, at(4, 5))
    group.keep(group.leader.disconnected(A, group.now))
    group.seal(C, at(4, 5))
    assert none_of(Over, group.pass_time(SETTINGS.retry_limit_s / 2))
    assert isinstance(only(Over, group.pass_time(SETTINGS.retry_limit_s)).error, QuorumUnavailable)


def test_an_attachment_that_waits_for_a_copy_goes_on_waiting() -> None:
    group = Group()
    group.seal(A, at(4, 9))
    group.seal(B, at(4, 5), floor=at(4, 9))
    assert none_of(Over, group.pass_time(SETTINGS.retry_limit_s * 2))


def test_a_loss_is_accepted_only_after_waiting_for_whoever_may_still_answer() -> None:
    group = Group(accept_loss=True)
    group.seal(A, at(4, 5))
    group.seal(B, at(4, 4), floor=at(4, 8))
    group.pass_time(SETTINGS.loss_wait_s / 2)
    assert not group.sent[A]
    group.pass_time(SETTINGS.loss_wait_s / 2)
    assert records_sent(group, A) == [6]


def test_a_member_that_committed_what_was_given_up_takes_no_part_any_more() -> None:
    """Its records 6 to 8 have the sequences of this epoch's, and would count as acks of them."""
    group = Group(accept_loss=True)
    group.seal(A, at(4, 5))
    group.seal(B, at(4, 4), floor=at(4, 8))
    group.pass_time(SETTINGS.loss_wait_s)
    group.ack(A)
    group.seal(C, at(4, 8), commit=at(4, 8))
    group.requests[C] = 1
    group.ack(C, matched=at(4, 8))
    assert group.leader.commit < at(5, 6)
    assert not group.sent[C]
    assert "another replica takes its place" in group.leader.status().members[2].left_out


def test_a_member_that_lost_its_promise_is_taken_in_once_nobody_knows_of_a_newer_epoch() -> None:
    """It may have sealed a newer epoch, whose leader counts on it; made whole here, it would ack for both."""
    group = Group()
    for member in (A, B):
        group.seal(member, at(4, 5))
    group.forget()
    group.seal(C, at(4, 5), floor=UNKNOWN_FLOOR)
    group.ack(A)
    group.ack(B)
    assert not group.sent[C]
    assert "cannot say what it lost" in group.leader.status().members[2].left_out
    group.pass_time(SETTINGS.heartbeat_s)
    group.ack(A)
    assert not group.sent[C]
    group.ack(B)
    assert group.sent[C]


def test_a_choice_that_counts_it_among_those_who_may_hide_anything_takes_it_in_at_once() -> None:
    group = Group()
    group.seal(C, at(4, 5), floor=UNKNOWN_FLOOR)
    group.seal(A, at(4, 5))
    assert not group.sent[A]
    group.seal(B, at(4, 5))
    assert group.sent[C]
