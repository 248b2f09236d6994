"""Fills in the leader: they lie below everything, so no read waits for one, and none follows "hydrated"."""

from blockstore.errors import Conflict
from blockstore.record import Operation, OperationKind
from blockstore.replication.messages import Completed, Failed, LeaderEffect, ReadFrom
from blockstore.units import BLOCK_SIZE, BlockNumber
from tests.replication_group import Group, of, reads
from tests.replication_parts import A, B, none_of, only, write


def fill(start: int, count: int = 1) -> Operation:
    return Operation(OperationKind.FILL, BlockNumber(start), count, bytes(count * BLOCK_SIZE))


def submit(group: Group, ticket: str, operation: Operation) -> list[LeaderEffect]:
    return group.keep(group.leader.submit(ticket, operation, group.now))


def read(group: Group, start: int, count: int = 1) -> list[ReadFrom]:
    return reads(group.keep(group.leader.read(("read", start), BlockNumber(start), count, group.now)))


def commit_all(group: Group) -> list[LeaderEffect]:
    return [*group.ack(A), *group.ack(B)]


def test_a_read_does_not_wait_for_a_fill() -> None:
    group = Group().serve()
    submit(group, "fill", fill(10, 64))
    assert len(read(group, 12)) == 1
    assert len(read(group, 0, 200)) == 1


def test_a_read_waits_for_the_write_below_and_above_a_fill() -> None:
    group = Group().serve()
    submit(group, "below", write(12))
    submit(group, "fill", fill(10, 64))
    submit(group, "above", write(40))
    assert len(read(group, 11)) == 1
    assert not read(group, 12)
    assert not read(group, 40)
    assert not read(group, 10, 64)
    effects = commit_all(group)
    assert [each.start for each in reads(effects)] == [12]
    effects = [*commit_all(group), *commit_all(group)]
    assert sorted(each.start for each in reads(effects)) == [10, 40]


def test_a_fill_and_a_write_of_the_same_block_are_never_in_one_record() -> None:
    group = Group().serve()
    submit(group, "first", write(0))  # while it is in flight, the others wait
    for number, operation in enumerate((write(12), fill(10, 4), write(13), fill(13), fill(30))):
        submit(group, f"{number}", operation)
    for _ in range(5):
        commit_all(group)
    records = [record for message in group.sent[A] for record in message.records]
    kinds = [[operation.kind.name for operation in record.operations] for record in records]
    assert kinds == [["WRITE"], ["WRITE"], ["FILL"], ["WRITE"], ["FILL", "FILL"]]


def test_a_fill_that_expires_leaves_later_writes_in_order() -> None:
    group = Group().serve()
    submit(group, "first", write(0))
    submit(group, "below", write(12))
    submit(group, "fill", fill(12))
    group.pass_time(group.leader.settings.retry_limit_s)
    submit(group, "again", fill(12))
    submit(group, "above", write(12))
    assert not read(group, 12)
    for _ in range(3):
        effects = commit_all(group)
    assert [each.start for each in reads(effects)] == [12]


def test_no_fill_follows_hydrated_whatever_became_of_it() -> None:
    group = Group().serve()
    submit(group, "before", fill(1))
    submit(group, "hydrated", Operation(OperationKind.HYDRATED))
    assert isinstance(only(Failed, submit(group, "late", fill(2))).error, Conflict)
    tickets = [ticket for _ in range(2) for each in of(Completed, commit_all(group)) for ticket in each.tickets]
    assert tickets == ["before", "hydrated"]
    assert none_of(Completed, submit(group, "too late", fill(3)))
    records = [record for message in group.sent[A] for record in message.records]
    assert [o.kind.name for record in records for o in record.operations] == ["FILL", "HYDRATED"]
