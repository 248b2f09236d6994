"""A follower fills by a delta (rule 6), each case by what its absence would lose or invent."""

from blockstore.domain import ORIGIN, Position
from blockstore.log import Filling, FillingEntry, LogImage, RecordEntry, WholeEntry
from blockstore.replication.messages import (
    AppendAnswer,
    CatchUp,
    Checkpoint,
    Commit,
    FetchDelta,
    FetchLog,
    FollowerEffect,
    Persist,
    ResetLog,
)
from blockstore.units import Epoch, Sequence
from tests.replication_behind import PEERS, behind, catch_up, fetch_delta, filling, last_ack, refused_by_all
from tests.replication_parts import C, Replica, answers, at, none_of, only, read_all_of, run_of


def copied(replica: Replica, stated: Position) -> list[FollowerEffect]:
    """A delta that goes through at one position."""
    attempt = fetch_delta(replica).attempt
    assert replica.follower.accept_copy(attempt, stated) is not None
    return replica.keep(replica.follower.delta_done(attempt))


# ---- by a delta


def test_filling_is_durable_before_the_first_block_is_copied() -> None:
    replica = behind()
    effects = refused_by_all(replica, catch_up(replica, at(2, 40), at(2, 50), at(2, 51)))
    expected = Filling(at(1, 6), at(2, 50), Sequence(4))
    assert only(Persist, effects).entries == (FillingEntry(expected),)
    assert not none_of(ResetLog, effects)
    assert none_of(FetchDelta, effects)
    delta = only(FetchDelta, replica.sync())
    assert (delta.since, delta.at_least) == (4, at(2, 50))


def test_nothing_is_given_up_for_a_base_that_is_not_known_to_be_committed() -> None:
    """Until then this replica's tail may be one of only two copies of something acknowledged."""
    replica = behind()
    assert refused_by_all(replica, catch_up(replica, at(2, 40), at(2, 39), at(1, 6))) == []
    assert replica.follower.whole


def test_a_base_that_is_held_is_committed_and_not_filled_from() -> None:
    replica = behind(commit=2)
    effects = refused_by_all(replica, catch_up(replica, at(2, 40), at(1, 5), at(1, 5)))
    assert effects == []
    assert replica.follower.commit == at(1, 5)


def test_a_gap_can_be_filled_before_the_epochs_first_record_is_committed() -> None:
    """With one member away, that record needs this replica: waiting for it would be for ever."""
    replica = behind()
    effects = refused_by_all(replica, catch_up(replica, at(1, 45), at(1, 39), at(1, 39)))
    assert only(Persist, effects).entries == (FillingEntry(Filling(at(1, 6), at(1, 39), Sequence(4))),)


def test_a_tail_that_stands_where_something_else_was_committed_is_no_reason_to_wait() -> None:
    replica = Replica()
    replica.sealed(1)
    replica.appended(1, *run_of(1, 1, 5))
    replica.sealed(2)
    replica.appended(2, *run_of(2, 6, 9, previous=at(1, 5)))
    replica.sealed(3)
    asked = replica.append(3, commit=at(1, 8), end=at(3, 20), catch_up=CatchUp(at(1, 8), at(1, 8), PEERS))
    assert only(FetchLog, asked).after == at(1, 5)
    effects = refused_by_all(replica, asked)
    assert only(Persist, effects).entries == (FillingEntry(Filling(at(2, 9), at(1, 8), Sequence(0))),)


def test_a_filling_replica_answers_its_floor_and_its_acks_say_that_they_count_for_nothing() -> None:
    replica = filling()
    answer = replica.sealed(3)
    assert (answer.whole, answer.floor, answer.end) == (False, at(1, 6), at(2, 50))
    assert not last_ack(replica.append(3)).whole


def test_old_records_are_never_applied_after_filling_began() -> None:
    replica = filling()
    effects = replica.append(2, *run_of(2, 51, 52), commit=at(2, 52)) + replica.sync()
    assert read_all_of(only(Commit, effects).records) == [at(2, 51), at(2, 52)]


def test_a_filling_replica_is_no_source_of_records() -> None:
    replica = filling()
    replica.appended(2, *run_of(2, 51, 52))
    assert replica.follower.records(at(2, 50), at(2, 51)) is None


def test_a_copy_below_the_base_or_of_another_attempt_is_void() -> None:
    replica = filling()
    attempt = fetch_delta(replica).attempt
    assert replica.follower.accept_copy(attempt, at(2, 49)) is None
    assert replica.follower.accept_copy(attempt + 1, at(2, 50)) is None


def test_a_later_copy_is_never_older_than_one_that_is_here() -> None:
    """A tombstone below the first copy's position may be gone already: an older copy would bring back the block."""
    replica = filling()
    attempt = fetch_delta(replica).attempt
    assert replica.follower.accept_copy(attempt, at(2, 57)) is not None
    second = only(FetchDelta, replica.follower.delta_failed(attempt))
    assert (second.peer, second.at_least) == (C, at(2, 57))
    assert replica.follower.accept_copy(second.attempt, at(2, 56)) is None


def test_the_image_that_a_copy_carries_applies_nothing() -> None:
    replica = filling()
    replica.appended(2, *run_of(2, 51, 53))
    replica.append(2, commit=at(2, 53))
    image = replica.follower.accept_copy(fetch_delta(replica).attempt, at(2, 55))
    assert image is not None
    assert (image.applied, image.copied) == (at(2, 50), at(2, 55))
    assert read_all_of(image.records) == [at(2, 51), at(2, 52), at(2, 53)]


def test_whole_only_when_the_tables_are_past_every_copy() -> None:
    """Before, blocks of two times stand side by side."""
    replica = filling()
    replica.appended(2, *run_of(2, 51, 53))
    assert none_of(Persist, copied(replica, at(2, 55)))
    replica.appended(2, *run_of(2, 54, 56))
    effects = replica.append(2, commit=at(2, 56))
    assert not none_of(Checkpoint, effects)
    assert not replica.follower.whole
    effects = replica.checkpoint()
    assert only(Persist, effects).entries == (WholeEntry(),)
    assert not replica.follower.whole
    assert last_ack(replica.sync()).whole
    assert replica.follower.whole
    replica.crash()
    assert replica.follower.whole


def test_whole_only_when_the_log_is_durable_at_its_floor() -> None:
    replica = Replica(LogImage(filling=Filling(at(2, 3), ORIGIN, Sequence(0))))
    replica.sealed(2)
    replica.append(2, *run_of(2, 1, 3))
    assert not replica.follower.whole
    assert [answer.whole for answer in answers(replica.sync()) if isinstance(answer, AppendAnswer)] == [False, True]
    assert replica.follower.whole


def test_a_new_filling_keeps_the_floor_and_what_has_to_be_copied_and_voids_the_copy() -> None:
    replica = filling()
    attempt = fetch_delta(replica).attempt
    effects = refused_by_all(replica, catch_up(replica, at(2, 58), at(2, 59), at(2, 60)))
    expected = Filling(at(1, 6), at(2, 59), Sequence(4))
    assert only(Persist, effects).entries == (FillingEntry(expected),)
    assert replica.follower.accept_copy(attempt, at(2, 60)) is None
    assert replica.follower.delta_done(attempt) == []
    assert only(FetchDelta, replica.sync()).at_least == at(2, 59)


def test_after_a_restart_a_delta_begins_from_scratch_with_the_same_since() -> None:
    replica = filling()
    replica.crash()
    assert not replica.follower.whole
    replica.sealed(2)
    effects = catch_up(replica, at(2, 50), at(2, 50), at(2, 51))
    delta = only(FetchDelta, effects)
    assert (delta.since, delta.at_least) == (4, at(2, 50))


def test_a_crash_before_filling_was_durable_leaves_the_whole_replica_it_was() -> None:
    replica = behind()
    refused_by_all(replica, catch_up(replica, at(2, 40), at(2, 50), at(2, 51)))
    replica.crash()
    assert replica.follower.whole
    assert replica.follower.end == at(1, 6)


def test_a_checkpoint_from_before_the_log_began_anew_changes_nothing() -> None:
    replica = behind()
    image = replica.follower.image()
    refused_by_all(replica, catch_up(replica, at(2, 40), at(2, 50), at(2, 51)))
    assert replica.follower.checkpointed(image) == []
    assert replica.follower.applied == at(2, 50)


# ---- content that is lost


def test_lost_content_is_copied_anew_over_the_log_as_it_is() -> None:
    """What was acked and is not committed here yet stays: others may count on it."""
    replica = behind(commit=4, end=6)
    entry, *kept = only(Persist, replica.keep(replica.follower.content_lost())).entries
    assert entry == FillingEntry(Filling(at(1, 6), at(1, 4), Sequence(0)))
    assert [each.record.position for each in kept if isinstance(each, RecordEntry)] == [at(1, 5), at(1, 6)]
    assert replica.follower.content_lost() == []
    replica.sync()
    replica.crash()
    answer = replica.sealed(3)
    assert (answer.whole, answer.complete, answer.end, answer.floor) == (False, False, at(1, 6), at(1, 6))
    replica.append(3, end=at(3, 7), commit=at(1, 6), catch_up=CatchUp(at(1, 4), at(1, 4), PEERS))
    fetch = only(FetchDelta, replica.append(3, *run_of(3, 7, 7, previous=at(1, 6)), commit=at(1, 6)) + replica.effects)
    assert (fetch.since, fetch.at_least) == (0, at(1, 4))


def test_lost_content_of_an_idle_replica_needs_no_further_record() -> None:
    """Which generation is current is known: the log has no gap."""
    replica = behind(commit=6, end=6)
    replica.keep(replica.follower.content_lost())
    replica.sync()
    fetch = only(
        FetchDelta, replica.append(2, end=at(1, 6), commit=at(1, 6), catch_up=CatchUp(at(1, 6), at(1, 5), PEERS))
    )
    assert fetch.at_least == at(1, 6), "older than the tables: what they lost may be newer"
    assert replica.follower.accept_copy(fetch.attempt, at(1, 6)) is not None
    replica.keep(replica.follower.delta_done(fetch.attempt))
    replica.sync()
    assert replica.follower.whole


def test_content_that_is_lost_while_a_difference_is_copied_has_everything_copied() -> None:
    replica = filling()
    assert replica.follower.content_lost() == [], "nothing tells yet which generation is current"
    replica.append(2, *run_of(2, 51, 52), commit=at(2, 51))
    replica.sync()
    (entry, record) = only(Persist, replica.keep(replica.follower.content_lost())).entries
    assert entry == FillingEntry(Filling(at(1, 6), at(2, 51), Sequence(0)))
    assert isinstance(record, RecordEntry)
    assert record.record.position == at(2, 52)
    assert replica.follower.copies_all
    fetch = only(FetchDelta, replica.sync() + replica.append(2, catch_up=CatchUp(at(2, 52), at(2, 51), PEERS)))
    assert (fetch.since, fetch.at_least) == (0, at(2, 51))


def test_no_copy_of_everything_is_older_than_the_tables_are_when_it_begins() -> None:
    """They may be damaged, and given up for it."""
    replica = behind(commit=4, end=6)
    replica.keep(replica.follower.content_lost())
    replica.sync()
    first = only(FetchDelta, replica.append(2, commit=at(1, 6), catch_up=CatchUp(at(1, 6), at(1, 5), PEERS)))
    replica.follower.checkpointed(replica.follower.image())
    (second,) = [e for e in replica.follower.delta_failed(first.attempt) if isinstance(e, FetchDelta)]
    assert second.at_least == at(1, 6)


def test_no_copy_brings_back_what_a_checkpoint_under_way_trims() -> None:
    """It was begun before the filling was durable, so it keeps no tombstone."""
    replica = behind(commit=4, end=6)
    replica.keep(replica.follower.content_lost())
    replica.append(2, commit=at(1, 6), end=at(1, 6))
    under_way = replica.follower.image()
    assert (under_way.applied, under_way.filling) == (at(1, 6), None)
    replica.sync()
    fetch = only(FetchDelta, replica.append(2, commit=at(1, 6), catch_up=CatchUp(at(1, 6), at(1, 5), PEERS)))
    assert fetch.at_least == at(1, 6)
    assert replica.follower.accept_copy(fetch.attempt, at(1, 5)) is None


def test_a_replica_without_content_has_lost_none() -> None:
    assert Replica().follower.content_lost() == []


def test_a_copy_whose_base_was_given_up_ends_with_a_record_of_the_epoch_that_did() -> None:
    """A loss was accepted: the log goes on at 4, and no record may ever come that is above 7."""
    replica = Replica(LogImage(applied=at(1, 3), epoch=Epoch(1), filling=Filling(at(1, 8), at(1, 7), Sequence(2))))
    replica.sealed(6)
    opening = run_of(6, 4, 4, previous=at(1, 3))
    replica.append(6, *opening, end=at(6, 4))
    replica.sync()
    catch_up = CatchUp(at(1, 3), at(1, 3), PEERS)
    fetch = only(FetchDelta, replica.append(6, commit=at(6, 4), end=at(6, 4), catch_up=catch_up))
    assert replica.follower.accept_copy(fetch.attempt, at(6, 4)) is not None
    replica.keep(replica.follower.delta_done(fetch.attempt))
    replica.checkpoint()
    replica.sync()
    assert replica.follower.whole
