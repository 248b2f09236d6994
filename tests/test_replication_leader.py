"""The leader's rules 1, 2, 3, 5 and its part of 6, each by what its absence would lose."""

from blockstore.domain import ORIGIN
from blockstore.errors import Fenced, InvalidRequest, NoSpace, QuorumUnavailable
from blockstore.log import UNKNOWN_FLOOR
from blockstore.record import Operation, OperationKind
from blockstore.replication.leader import LeaderSettings
from blockstore.replication.messages import (
    CatchUp,
    Completed,
    Failed,
    FencedBy,
    Over,
    ReadDropped,
    Relieved,
    Sealed,
    SealEpoch,
    Send,
    Serving,
)
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, BlockNumber, Epoch
from tests.replication_group import EPOCH, SETTINGS, Group, of, reads
from tests.replication_parts import A, B, C, at, none_of, only, trim, write

SEAL = Operation(OperationKind.SEAL, argument=b"snap-1")


def records_sent(group: Group, member: str) -> list[int]:
    sent = group.sent[member]  # type: ignore[index]
    return [record.sequence for message in sent for record in message.records]


# ---- rule 1


def test_every_connection_begins_with_a_seal() -> None:
    group = Group()
    group.connect(A)
    assert group.effects == [Send(A, SealEpoch(EPOCH, 1))]


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
    assert "delete it" in group.leader.status().members[2].left_out


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


# ---- rule 2


def test_a_guest_is_answered_when_a_quorum_has_it_on_disk() -> None:
    group = Group().serve()
    group.keep(group.leader.submit("w", write(1), group.now))
    assert none_of(Completed, group.ack(A))
    assert only(Completed, group.ack(C)).tickets == ("w",)
    assert none_of(Completed, group.ack(B))


def test_acks_of_a_filling_member_count_for_nothing() -> None:
    group = Group().serve()
    group.keep(group.leader.submit("w", write(1), group.now))
    group.ack(A)
    assert none_of(Completed, group.ack(B, whole=False))
    assert only(Completed, group.ack(B, whole=True)).tickets == ("w",)


def test_what_waits_goes_out_as_one_record_and_is_completed_at_once() -> None:
    group = Group(LeaderSettings(max_records_in_flight=1)).serve()
    group.keep(group.leader.submit(0, write(0), group.now))
    for ticket in range(1, 30):
        assert group.keep(group.leader.submit(ticket, write(ticket), group.now)) == []
    effects = [*group.ack(A), *group.ack(B)]
    assert [completed.tickets for completed in of(Completed, effects)] == [(0,)]
    assert len(group.sent[A][-1].records[0].operations) == 29
    effects = [*group.ack(A), *group.ack(B)]
    assert [completed.tickets for completed in of(Completed, effects)] == [tuple(range(1, 30))]


def test_operations_of_one_record_never_overlap_and_stay_in_order() -> None:
    group = Group(LeaderSettings(max_records_in_flight=1)).serve()
    group.keep(group.leader.submit("first", write(9), group.now))
    for operation in (write(1), write(2, count=3), trim(4), write(4), write(7)):
        group.keep(group.leader.submit(operation, operation, group.now))
    group.all_ack()
    group.all_ack()
    group.all_ack()
    sizes = [len(record.operations) for message in group.sent[A] for record in message.records]
    assert sizes == [1, 2, 1, 2]


def test_a_wide_trim_overlaps_narrow_writes_as_well() -> None:
    group = Group(LeaderSettings(max_records_in_flight=1)).serve()
    group.keep(group.leader.submit("first", write(9), group.now))
    for operation in (write(1), trim(0, EXTENT_BLOCKS * 4), write(EXTENT_BLOCKS)):
        group.keep(group.leader.submit(operation, operation, group.now))
    for _ in range(4):
        group.all_ack()
    sizes = [len(record.operations) for message in group.sent[A] for record in message.records]
    assert sizes == [1, 1, 1, 1]


def test_a_record_holds_a_payload_of_at_most_its_limit() -> None:
    settings = LeaderSettings(max_records_in_flight=1, max_record_bytes=4 * BLOCK_SIZE)
    group = Group(settings).serve()
    group.keep(group.leader.submit("first", write(90), group.now))
    for start in (0, 10, 20):
        group.keep(group.leader.submit(start, write(start, count=2), group.now))
    group.all_ack()
    assert [len(record.operations) for record in group.sent[A][-1].records] == [2]


def test_an_operation_that_fits_no_record_is_refused() -> None:
    group = Group(LeaderSettings(max_record_bytes=BLOCK_SIZE)).serve()
    failed = only(Failed, group.leader.submit("w", write(1, count=2), group.now))
    assert isinstance(failed.error, InvalidRequest)


def test_at_most_so_many_records_are_in_flight() -> None:
    group = Group(LeaderSettings(batch_bytes=0)).serve()
    for ticket in range(5):
        group.keep(group.leader.submit(ticket, write(ticket * 64, count=64), group.now))
    assert records_sent(group, A) == [2, 3]


def test_the_second_record_in_flight_waits_until_it_is_worth_a_message() -> None:
    group = Group(LeaderSettings(batch_bytes=3 * BLOCK_SIZE)).serve()
    sent = []
    for ticket in range(5):
        group.keep(group.leader.submit(ticket, write(ticket), group.now))
        sent.append(records_sent(group, A))
    assert sent == [[2], [2], [2], [2, 3], [2, 3]]
    assert len(group.sent[A][-1].records[0].operations) == 3


def test_a_seal_ends_its_record_and_later_writes_are_of_the_next_generation() -> None:
    group = Group(LeaderSettings(max_records_in_flight=1)).serve()
    group.keep(group.leader.submit("first", write(0), group.now))
    for ticket, operation in (("before", write(1)), ("seal", SEAL), ("after", write(2))):
        group.keep(group.leader.submit(ticket, operation, group.now))
    group.all_ack()
    sealing = group.sent[A][-1].records[0]
    assert [operation.kind.name for operation in sealing.operations] == ["WRITE", "SEAL"]
    effects = [*group.ack(A), *group.ack(B)]
    assert only(Sealed, effects) == Sealed("seal", sealing.generation, sealing.position)
    assert group.sent[A][-1].records[0].generation == sealing.generation + 1


def test_congestion_is_told_and_relieved() -> None:
    group = Group(LeaderSettings(queue_bytes=8 * BLOCK_SIZE, max_record_bytes=4 * BLOCK_SIZE)).serve()
    for ticket in range(12):
        group.keep(group.leader.submit(ticket, write(ticket), group.now))
    assert group.leader.congested
    for _ in range(4):
        group.all_ack()
    assert not group.leader.congested
    assert len(of(Relieved, group.effects)) == 1


def test_without_room_on_a_quorum_new_writes_fail_and_those_in_flight_finish() -> None:
    group = Group().serve()
    group.keep(group.leader.submit("in flight", write(1), group.now))
    group.ack(B, full=True)
    group.keep(group.leader.submit("one has no room", write(2), group.now))
    effects = group.ack(C, full=True)
    assert "in flight" in [ticket for completed in of(Completed, group.effects) for ticket in completed.tickets]
    assert none_of(Failed, effects)
    failed = only(Failed, group.leader.submit("refused", write(3), group.now))
    assert isinstance(failed.error, NoSpace)
    assert none_of(Failed, group.leader.submit("trim", trim(3), group.now))
    group.ack(C, full=False)
    assert none_of(Failed, group.leader.submit("again", write(3), group.now))


def test_a_member_that_is_away_is_no_lack_of_room() -> None:
    group = Group().serve()
    group.leader.disconnected(B, group.now)
    group.leader.disconnected(C, group.now)
    assert none_of(Failed, group.leader.submit("w", write(1), group.now))


# ---- rule 3


def test_commit_goes_with_the_next_append_and_alone_when_idle() -> None:
    group = Group().serve()
    group.keep(group.leader.submit("w", write(1), group.now))
    group.all_ack()
    assert group.sent[A][-1].commit == at(5, 1)
    group.pass_time(SETTINGS.heartbeat_s)
    assert group.sent[A][-1].records == ()
    assert group.sent[A][-1].commit == at(5, 2)
    assert group.sent[A][-1].end == at(5, 2)


# ---- rule 5


def test_a_write_that_fails_stays_in_flight_and_may_take_effect() -> None:
    group = Group().serve()
    group.keep(group.leader.submit("w", write(1), group.now))
    failed = only(Failed, group.pass_time(SETTINGS.retry_limit_s))
    assert failed.tickets == ("w",)
    assert isinstance(failed.error, QuorumUnavailable)
    effects = [*group.ack(A), *group.ack(B)]
    assert none_of(Completed, effects)
    assert group.leader.commit == at(5, 2)


def test_a_read_waits_for_a_failed_write_in_flight_until_it_commits() -> None:
    group = Group().serve()
    group.keep(group.leader.submit("w", write(1), group.now))
    group.pass_time(SETTINGS.retry_limit_s)
    assert reads(group.leader.read("r", BlockNumber(1), 1, group.now)) == []
    group.ack(A)
    assert [read.start for read in reads(group.ack(B))] == [1]


def test_a_write_that_never_became_a_record_is_dropped_and_reads_go_on() -> None:
    group = Group(LeaderSettings(max_records_in_flight=1, retry_limit_s=10.0)).serve()
    group.keep(group.leader.submit("in flight", write(1), group.now))
    group.keep(group.leader.submit("queued", write(2), group.now))
    group.keep(group.leader.submit("both", write(1, count=2), group.now))
    group.keep(group.leader.read("of queued", BlockNumber(2), 1, group.now + 9))
    group.keep(group.leader.read("of in flight", BlockNumber(1), 1, group.now + 9))
    for member in (A, B, C):
        group.ack(member, 1)
    effects = group.pass_time(10.0)
    assert [failed.tickets for failed in of(Failed, effects)] == [("in flight", "queued", "both")]
    for member in (A, B, C):
        group.ack(member, 1)
    effects += group.pass_time(0.1)
    assert {read.start for read in reads(effects)} == {2}
    assert {read.start for read in reads([*group.ack(A, 2), *group.ack(B, 2)])} == {1}
    assert records_sent(group, A) == [2]


def test_dropped_requests_of_an_ended_leader_are_told() -> None:
    group = Group().serve()
    (attempt,) = (read.attempt for read in reads(group.keep(group.leader.read("r", BlockNumber(1), 1, group.now))))
    effects = group.leader.answered(A, FencedBy(Epoch(6), 1), group.now)
    assert only(ReadDropped, effects).attempt == attempt
    assert only(Failed, effects).tickets == ("r",)


# ---- rule 6, the leader's part


def test_a_member_that_comes_back_is_resent_what_it_lacks() -> None:
    group = Group().serve()
    group.leader.disconnected(C, group.now)
    for ticket in range(3):
        group.keep(group.leader.submit(ticket, write(ticket), group.now))
        group.ack(A)
        group.ack(B)
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
    for ticket in range(9):
        group.keep(group.leader.submit(ticket, write(ticket), group.now))
        group.ack(A)
        group.ack(B)
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
    for ticket in range(9):
        group.keep(group.leader.submit(ticket, write(ticket), group.now))
        group.ack(A)
        group.ack(B)
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
    for ticket in range(20):
        group.keep(group.leader.submit(ticket, write(ticket), group.now))
        group.ack(A)
        group.ack(B)
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


# ---- for people


def test_status_says_who_lags_and_what_is_waited_for() -> None:
    group = Group()
    assert group.leader.status().why == "no member has answered yet"
    group.seal(A)
    assert "1 of 3 members answered" in group.leader.status().why
    group.seal(B)
    group.ack(A)
    group.ack(B)
    assert "lease" in group.leader.status().why
    group.seal(C)
    status = group.leader.status()
    assert (status.serving, status.why, status.commit) == (True, "", at(5, 1))
    behind = next(member for member in status.members if member.replica == C)
    assert (behind.lag_records, behind.connected, behind.sealed, behind.whole) == (1, True, True, True)


def test_what_a_member_says_before_it_is_sealed_is_ignored() -> None:
    group = Group()
    group.connect(A)
    assert group.ack(A, matched=at(5, 9)) == []
    assert group.leader.commit == ORIGIN
