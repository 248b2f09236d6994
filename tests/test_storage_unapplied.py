"""What is committed and not applied: nothing is missing at any moment of a checkpoint, whether it ends well or not."""

from blockstore.storage.unapplied import Unapplied
from tests.storage_model import Log, block, fill, hydrated, trim, write


def contents(unapplied: Unapplied) -> dict[int, bytes | None]:
    """By block; None for zeroes."""
    found = unapplied.overlay(0, 10).items()
    return {number: None if entry.block is None else bytes(entry.block) for number, (_, entry) in found}


def sequences(unapplied: Unapplied) -> list[list[int]]:
    return [[record.sequence for record in memtable.records] for memtable in unapplied.memtables]


def test_a_checkpoint_that_fails_puts_its_records_back_in_front_of_later_ones() -> None:
    unapplied, log = Unapplied(b""), Log()
    unapplied.add([log.record(write(1, block(1))), log.record(write(2, block(2)))])
    unapplied.add([log.record(write(1, block(3)))])
    size_bytes = unapplied.size_bytes
    unapplied.freeze(2)
    assert sequences(unapplied) == [[1, 2], [3]]
    assert (contents(unapplied), unapplied.size_bytes) == ({1: block(3), 2: block(2)}, size_bytes)
    unapplied.add([log.record(trim(2, 1))])
    assert contents(unapplied) == {1: block(3), 2: None}
    unapplied.thaw()
    assert sequences(unapplied) == [[], [1, 2, 3, 4]]
    assert contents(unapplied) == {1: block(3), 2: None}


def test_what_was_applied_goes_and_what_came_meanwhile_stays() -> None:
    unapplied, log = Unapplied(b""), Log()
    unapplied.add([log.record(write(1, block(1)))])
    unapplied.freeze(1)
    unapplied.add([log.record(write(2, block(2)))])
    unapplied.applied(b"")
    assert (sequences(unapplied), contents(unapplied)) == ([[], [2]], {2: block(2)})
    unapplied.forget()
    assert (contents(unapplied), unapplied.size_bytes) == ({}, 0)


def test_where_nothing_is_to_be_applied_nothing_is_made_anew() -> None:
    unapplied, log = Unapplied(b""), Log()
    unapplied.add([log.record(write(1, block(1)))])
    _, active = unapplied.memtables
    unapplied.freeze(0)
    assert unapplied.memtables[1] is active
    unapplied.thaw()
    assert unapplied.memtables[1] is active


def test_the_source_has_ended_as_soon_as_that_is_committed_and_is_back_where_it_is_forgotten() -> None:
    unapplied, log = Unapplied(b"snap"), Log()
    unapplied.add([log.record(fill(1, block(1)))])
    assert unapplied.has_source
    unapplied.add([log.record(hydrated())])
    assert not unapplied.has_source
    unapplied.freeze(1)
    unapplied.applied(b"snap")
    assert not unapplied.has_source, "the record that ends it is not applied yet"
    unapplied.forget()
    assert unapplied.has_source, "no table knows that it has ended"
    unapplied.applied(b"")
    assert not unapplied.has_source
