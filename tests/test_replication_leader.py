"""The leader's rules 2, 3 and 5, each by what its absence would lose."""

from blockstore.domain import ORIGIN
from blockstore.errors import InvalidRequest, QuorumUnavailable
from blockstore.record import Operation, OperationKind
from blockstore.replication.leader import LeaderSettings
from blockstore.replication.messages import Completed, Failed, FencedBy, ReadDropped, Relieved, Sealed
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, BlockNumber, Epoch
from tests.replication_group import SETTINGS, Group, of, reads, records_sent
from tests.replication_parts import A, B, C, at, none_of, only, trim, write

SEAL = Operation(OperationKind.SEAL, argument=b"snap-1")

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
    for operation in (write(1, count=2), trim(0, 1 << 32)):
        failed = only(Failed, group.leader.submit("w", operation, group.now))
        assert isinstance(failed.error, InvalidRequest)
    group.keep(group.leader.submit("next", write(1), group.now))
    assert only(Completed, group.all_ack()).tickets == ("next",), "nothing of those is left"


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
