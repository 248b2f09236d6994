"""What a follower that lost something may have acked (rule 10), each case by what its absence would lose."""

from blockstore.domain import ORIGIN
from blockstore.log import UNKNOWN_FLOOR, Filling, FillingEntry, LogImage, RecordEntry, WholeEntry
from blockstore.record import Record
from blockstore.replication.messages import FencedBy, Persist
from blockstore.units import Epoch, Sequence
from tests.replication_behind import behind, catch_up, fetch_delta, filling, refused_by_all
from tests.replication_parts import A, Replica, answers, at, only, read_all_of, run_of

# ---- floors


def test_an_unknown_floor_lies_below_the_end_of_a_leader_that_took_it_in() -> None:
    """A new replica, or one that lost its journal, could never become whole otherwise."""
    replica = Replica(LogImage(filling=Filling(UNKNOWN_FLOOR, ORIGIN, Sequence(0))))
    assert replica.sealed(2).floor == UNKNOWN_FLOOR
    replica.append(2, *run_of(2, 1, 2), end=at(2, 3))
    replica.sync()
    assert not replica.follower.whole
    replica.crash()
    assert replica.sealed(2).floor == at(2, 3)
    replica.appended(2, *run_of(2, 3, 3))
    assert replica.follower.whole


def test_damage_makes_a_replica_fill_and_keeps_what_it_has() -> None:
    replica = behind()
    replica.crash(damage=at(1, 8))
    assert replica.follower.filling == Filling(at(1, 8), at(1, 6), Sequence(6))
    replica.sync()
    replica.crash()
    assert replica.sealed(3).floor == at(1, 8)


def test_a_gap_that_nobody_told_of_is_damage_too() -> None:
    records: tuple[Record, ...] = run_of(1, 1, 5)
    replica = Replica(entries=[RecordEntry(record) for record in records if record.sequence != 3])
    assert replica.follower.filling == Filling(UNKNOWN_FLOOR, at(1, 2), Sequence(2))


# ---- rule 10


def test_an_old_copy_that_was_put_back_may_have_acked_anything() -> None:
    """What is known of it lags behind, and it has lost its promises, too."""
    replica = behind()
    answer = replica.sealed(3, known=at(1, 9))
    assert (answer.whole, answer.floor, answer.end) == (False, UNKNOWN_FLOOR, at(1, 6))
    replica.appended(3, *run_of(1, 7, 9), *run_of(3, 10, 10, previous=at(1, 9)))
    assert replica.follower.whole
    assert replica.follower.acked == at(3, 10)


def test_what_everybody_knows_changes_nothing() -> None:
    replica = behind()
    assert replica.follower.know_acked(at(1, 6)) == []
    assert replica.sealed(3, known=at(1, 6)).whole
    assert replica.name == A


def test_damage_during_a_copy_leaves_a_record_behind_the_base() -> None:
    """An idle leader sends no other, and without one nobody knows which generation is current."""
    replica = filling()
    replica.appended(2, *run_of(2, 51, 51))
    replica.crash(damage=UNKNOWN_FLOOR)
    assert replica.follower.filling == Filling(UNKNOWN_FLOOR, at(2, 50), Sequence(4))
    replica.sync()
    replica.crash()
    assert replica.follower.end == at(2, 51)


def test_who_acked_in_an_epoch_had_sealed_it_even_if_that_was_lost() -> None:
    """Else an older leader could make it whole, and have its acks count against the newer one."""
    replica = behind()
    replica.crash(damage=at(7, 3))
    assert replica.follower.epoch == 7
    replica.sync()
    replica.crash()
    assert answers(replica.seal(6)) == [FencedBy(Epoch(7), 1)]
    assert replica.sealed(8).floor == at(7, 3)


def test_a_copy_that_the_image_knows_of_is_not_ended_by_what_is_left_of_the_journal() -> None:
    """A transaction of the copy keeps the image newer than its mark; the entry that began the copy rotted away.

    What ended the filling before that one is replayed, and blocks that were never copied would count as absent.
    """
    replica = filling()
    image = replica.follower.accept_copy(fetch_delta(replica).attempt, at(2, 55))
    assert image is not None
    replica.image, replica.journal = image, [FillingEntry(Filling(at(1, 1), at(1, 2), Sequence(2))), WholeEntry()]
    replica.crash(damage=at(2, 50))
    assert replica.follower.filling == Filling(at(2, 50), at(2, 50), Sequence(4))
    replica.sync()
    replica.crash()
    assert replica.follower.filling == Filling(at(2, 50), at(2, 50), Sequence(4))


def test_a_filling_that_begins_while_the_last_ones_end_is_on_its_way_answers_for_all_of_the_log() -> None:
    """The entry that ends it reaches the disk first: from then on the disk is whole up to the log's end."""
    replica = Replica(LogImage(filling=Filling(at(2, 2), ORIGIN, Sequence(0))))
    replica.sealed(2)
    replica.append(2, *run_of(2, 1, 5))
    persist = replica.waiting.pop()
    replica.journal += persist.entries
    assert only(Persist, replica.keep(replica.follower.persisted(persist.number))).entries == (WholeEntry(),)
    effects = refused_by_all(replica, catch_up(replica, at(2, 40), at(2, 50), at(2, 51)))
    assert only(Persist, effects).entries == (FillingEntry(Filling(at(2, 5), at(2, 50), Sequence(0))),)


def test_an_image_shows_no_filling_that_is_not_durable() -> None:
    """The end of the filling before it is: replayed over such an image, it would end this one, with nothing copied."""
    replica = Replica(LogImage(filling=Filling(at(2, 2), ORIGIN, Sequence(0))))
    replica.sealed(2)
    replica.append(2, *run_of(2, 1, 5))
    records = replica.waiting.pop()
    replica.journal += records.entries
    end = only(Persist, replica.keep(replica.follower.persisted(records.number)))
    refused_by_all(replica, catch_up(replica, at(2, 40), at(2, 50), at(2, 51)))
    replica.image = replica.follower.image()
    assert (replica.image.applied, replica.image.filling) == (ORIGIN, Filling(at(2, 2), ORIGIN, Sequence(0)))
    assert read_all_of(replica.image.records) == [at(2, sequence) for sequence in range(1, 6)]
    replica.journal = list(end.entries)
    replica.crash()
    assert replica.follower.whole
    assert replica.follower.end == at(2, 5)
