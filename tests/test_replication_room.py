"""Full members: which writes are held, which are refused, and what passes them (docs/replication.md, Space)."""

from blockstore.domain import ReplicaId
from blockstore.errors import NoSpace, QuorumUnavailable
from blockstore.record import Operation, OperationKind
from blockstore.replication.leader import LeaderSettings
from blockstore.replication.messages import Completed, Failed, LeaderEffect, ReadDone, Relieved, Sealed
from blockstore.units import BLOCK_SIZE, BlockNumber
from tests.replication_group import EPOCH, SETTINGS, Group, of, reads, records_sent
from tests.replication_parts import A, B, C, at, none_of, only, trim, write

FILL = Operation(OperationKind.FILL, BlockNumber(5), 1, b"f" * BLOCK_SIZE)
HYDRATED = Operation(OperationKind.HYDRATED)
SEAL = Operation(OperationKind.SEAL, argument=b"snap-1")


def gone(group: Group, *members: ReplicaId) -> list[LeaderEffect]:
    return [effect for member in members for effect in group.keep(group.leader.disconnected(member, group.now))]


def submit(group: Group, ticket: str, operation: Operation) -> list[LeaderEffect]:
    return group.keep(group.leader.submit(ticket, operation, group.now))


def one_full_one_away(settings: LeaderSettings = SETTINGS) -> Group:
    group = Group(settings).serve()
    group.ack(B, full=True)
    gone(group, C)
    group.forget()
    return group


def back(group: Group, member: ReplicaId, sequence: int = 1, *, full: bool = False) -> None:
    """It connects again, and has the log up to there."""
    group.seal(member, at(EPOCH, sequence), full=full)


def completed(group: Group) -> list[object]:
    return [ticket for done in of(Completed, group.effects) for ticket in done.tickets]


def test_one_full_member_holds_nothing_up() -> None:
    group = Group().serve()
    group.ack(B, full=True)
    submit(group, "w", write(1))
    group.ack(A)
    group.ack(C)
    assert completed(group) == ["w"]


def test_members_that_are_away_are_no_lack_of_room() -> None:
    group = Group().serve()
    gone(group, B, C)
    submit(group, "w", write(1))
    assert records_sent(group, A) == [2]
    assert group.leader.status().lacks_room == ""


def test_one_full_and_one_away_hold_writes_until_that_one_is_back() -> None:
    group = one_full_one_away()
    submit(group, "w", write(1))
    status = group.leader.status()
    assert (records_sent(group, A), status.held) == ([], 1)
    assert status.lacks_room == f"full: node-{B[4:]}; away: node-{C[4:]}"
    back(group, C)
    assert group.leader.status().held == 0
    group.ack(A)
    group.ack(C)
    assert completed(group) == ["w"]


def test_held_writes_go_on_at_once_where_the_full_member_has_room_again() -> None:
    group = one_full_one_away()
    submit(group, "w", write(1))
    group.ack(B, 1, full=False)
    assert records_sent(group, B) == [2]
    group.ack(A)
    group.ack(B)
    assert completed(group) == ["w"]


def test_a_second_full_member_refuses_what_was_held_and_what_comes() -> None:
    group = one_full_one_away()
    submit(group, "held", write(1))
    refused = only(Failed, group.ack(A, 1, full=True))
    assert refused.tickets == ("held",)
    assert isinstance(refused.error, NoSpace)
    failed = only(Failed, submit(group, "refused", write(3)))
    assert isinstance(failed.error, NoSpace)
    assert records_sent(group, A) == []
    group.ack(A, 1, full=False)
    group.ack(B, 1, full=False)
    assert none_of(Failed, submit(group, "again", write(3)))
    assert records_sent(group, A) == [2]


def test_records_in_flight_finish_also_where_nobody_has_room() -> None:
    group = Group().serve()
    submit(group, "in flight", write(1))
    for member in (A, B, C):
        group.ack(member, 1, full=True)
    group.ack(B, full=True)
    group.ack(C, full=True)
    assert completed(group) == ["in flight"]


def test_who_is_away_for_long_is_not_waited_for() -> None:
    group = one_full_one_away()
    group.pass_time(SETTINGS.retry_limit_s / 2)
    submit(group, "held", write(1))
    effects = group.pass_time(SETTINGS.retry_limit_s / 2)
    failed = only(Failed, effects)
    assert failed.tickets == ("held",)
    assert isinstance(failed.error, NoSpace)
    assert f"full: node-{B[4:]}; away: node-{C[4:]}" in str(failed.error)
    assert isinstance(only(Failed, submit(group, "later", write(2))).error, NoSpace)
    back(group, C)
    assert none_of(Failed, submit(group, "after", write(3)))


def test_without_a_quorum_that_is_here_a_held_write_ends_as_one_without_a_quorum() -> None:
    group = one_full_one_away()
    gone(group, A)
    submit(group, "held", write(1))
    failed = only(Failed, group.pass_time(SETTINGS.retry_limit_s))
    assert isinstance(failed.error, QuorumUnavailable)
    assert f"full: node-{B[4:]}; away: node-{A[4:]}, node-{C[4:]}" in str(failed.error)
    back(group, A)
    group.ack(B, 1, full=False)
    assert records_sent(group, A) == []  # its guest was told that it failed: it is never written


def test_a_member_that_fills_is_no_room() -> None:
    group = Group().serve()
    group.ack(C, 1, whole=False)
    group.ack(B, 1, full=True)
    submit(group, "held", write(1))
    assert records_sent(group, A) == []
    group.ack(C, 1, whole=True)
    assert records_sent(group, A) == [2]


def test_a_member_that_is_told_to_fill_anew_is_no_room_from_that_word_on() -> None:
    group = Group().serve()
    group.ack(A, damaged=True)
    group.ack(B, full=True)
    assert group.leader.status().lacks_room == ""
    group.pass_time(SETTINGS.heartbeat_s)
    assert any(message.fill_anew for message in group.sent[A])
    submit(group, "held", write(1))
    assert group.leader.status().held == 1


# ---- what passes, and what does not


def test_what_frees_room_passes_and_reads_wait_for_nothing_that_is_held() -> None:
    group = one_full_one_away()
    submit(group, "held", write(1))
    submit(group, "trim", trim(2))
    submit(group, "seal", SEAL)
    submit(group, "unpin", Operation(OperationKind.UNPIN, BlockNumber(1), argument=b"snap-0"))
    for _ in range(3):
        group.ack(A)
        group.ack(B, full=True)
    assert completed(group) == ["trim", "unpin"]
    assert only(Sealed, group.effects).ticket == "seal"
    (read,) = reads(group.keep(group.leader.read("r", BlockNumber(1), 1, group.now)))
    only(ReadDone, group.leader.read_arrived(read.attempt, group.now))


def test_a_change_of_the_same_blocks_waits_behind_the_write_that_is_held() -> None:
    group = one_full_one_away()
    submit(group, "held", write(1))
    submit(group, "behind", trim(0, 3))
    submit(group, "behind that", trim(2))
    assert records_sent(group, A) == []
    back(group, C)
    operations = []
    for _ in range(3):
        group.all_ack()
    for message in group.sent[A]:
        operations += [operation.kind.name for record in message.records for operation in record.operations]
    assert operations == ["WRITE", "TRIM", "TRIM"]
    assert completed(group) == ["held", "behind", "behind that"]


def test_the_end_of_a_source_waits_behind_its_fills() -> None:
    group = one_full_one_away()
    submit(group, "fill", FILL)
    submit(group, "hydrated", HYDRATED)
    submit(group, "trim", trim(5))  # lies above the fill in either order
    assert [kind.name for message in group.sent[A] for kind in kinds(message.records)] == ["TRIM"]
    back(group, C)
    for _ in range(3):
        group.all_ack()
    assert [kind.name for message in group.sent[A] for kind in kinds(message.records)] == ["TRIM", "FILL", "HYDRATED"]


def kinds(records: object) -> list[OperationKind]:
    return [operation.kind for record in records for operation in record.operations]  # type: ignore[attr-defined]


def test_what_waited_for_a_record_is_held_as_well_and_its_reads_go_on() -> None:
    group = Group(LeaderSettings(max_records_in_flight=1, retry_limit_s=10.0)).serve()
    submit(group, "in flight", write(1))
    submit(group, "queued", write(2))
    submit(group, "queued trim", trim(3))
    assert reads(group.keep(group.leader.read("of queued", BlockNumber(2), 1, group.now))) == []
    assert reads(group.keep(group.leader.read("of both", BlockNumber(1), 2, group.now))) == []
    gone(group, C)
    assert [read.start for read in reads(group.ack(B, 1, full=True))] == [2]
    assert group.leader.status().held == 1
    group.ack(A)
    effects = group.ack(B, full=True)
    assert [read.start for read in reads(effects)] == [1]
    group.ack(A)
    group.ack(B, full=True)
    assert completed(group) == ["in flight", "queued trim"]
    back(group, C, 2)
    group.all_ack()
    assert completed(group) == ["in flight", "queued trim", "queued"]


def test_what_is_held_counts_for_congestion_and_its_end_relieves() -> None:
    group = one_full_one_away(LeaderSettings(queue_bytes=4 * BLOCK_SIZE))
    for number in range(5):
        submit(group, str(number), write(number))
    assert group.leader.congested
    effects = group.ack(A, 1, full=True)
    assert only(Failed, effects).tickets == ("0", "1", "2", "3", "4")
    assert len(of(Relieved, effects)) == 1
