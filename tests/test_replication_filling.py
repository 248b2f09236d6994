"""Catching up, filling and old copies (rules 6 and 10), each by what its absence would lose or invent."""

from blockstore.domain import ORIGIN, Position
from blockstore.log import UNKNOWN_FLOOR, Filling, FillingEntry, LogImage, RecordEntry, TruncateEntry, WholeEntry
from blockstore.record import Record
from blockstore.replication.messages import (
    AppendAnswer,
    CatchUp,
    Checkpoint,
    Commit,
    FencedBy,
    FetchDelta,
    FetchLog,
    FollowerEffect,
    Persist,
    ResetLog,
)
from blockstore.units import Epoch, Sequence
from tests.replication_parts import A, B, C, Replica, answers, at, none_of, only, read_all_of, run_of

PEERS = (B, C)


def behind(commit: int = 4, end: int = 6) -> Replica:
    """A whole replica with records of epoch 1, some committed and in its tables, sealed by epoch 2."""
    replica = Replica()
    replica.sealed(1)
    replica.appended(1, *run_of(1, 1, end))
    replica.append(1, commit=at(1, commit))
    replica.checkpoint()
    replica.sealed(2)
    return replica


def catch_up(replica: Replica, target: Position, base: Position, commit: Position) -> list[FollowerEffect]:
    return replica.append(2, commit=commit, end=at(2, 60), catch_up=CatchUp(target, base, PEERS))


def refused_by_all(replica: Replica, effects: list[FollowerEffect]) -> list[FollowerEffect]:
    """No peer holds the gap any more."""
    for _ in PEERS:
        fetch = only(FetchLog, effects)
        effects = replica.keep(replica.follower.log_not_held(fetch.attempt))
    return effects


def filling() -> Replica:
    """A replica that has begun to fill by a delta, durably; its FetchDelta is out."""
    replica = behind()
    refused_by_all(replica, catch_up(replica, at(2, 40), at(2, 50), at(2, 51)))
    replica.sync()
    return replica


def fetch_delta(replica: Replica) -> FetchDelta:
    return [effect for effect in replica.effects if isinstance(effect, FetchDelta)][-1]


def copied(replica: Replica, stated: Position) -> list[FollowerEffect]:
    """A delta that goes through at one position."""
    attempt = fetch_delta(replica).attempt
    assert replica.follower.accept_copy(attempt, stated) is not None
    return replica.keep(replica.follower.delta_done(attempt))


def last_ack(effects: list[FollowerEffect]) -> AppendAnswer:
    answer = answers(effects)[-1]
    assert isinstance(answer, AppendAnswer)
    return answer


# ---- from a peer's log


def test_a_gap_is_fetched_from_the_highest_common_point() -> None:
    replica = behind()
    fetch = only(FetchLog, catch_up(replica, at(1, 9), at(1, 4), at(1, 4)))
    assert (fetch.peer, fetch.after, fetch.target) == (B, at(1, 6), at(1, 9))


def test_a_tail_of_another_epoch_may_be_wrong_so_the_fetch_starts_at_commit() -> None:
    replica = behind()
    fetch = only(FetchLog, catch_up(replica, at(2, 9), at(1, 4), at(1, 4)))
    assert fetch.after == at(1, 4)


def test_fetched_records_replace_a_tail_that_differs_and_match_once_durable() -> None:
    replica = behind()
    fetch = only(FetchLog, catch_up(replica, at(2, 9), at(1, 4), at(1, 4)))
    records = run_of(1, 5, 5) + run_of(2, 6, 9, previous=at(1, 5))
    effects = replica.keep(replica.follower.log_fetched(fetch.attempt, records))
    assert only(Persist, effects).entries[0] == TruncateEntry(Sequence(5))
    replica.keep(replica.follower.log_ended(fetch.attempt))
    assert last_ack(replica.sync()).matched == at(2, 9)
    assert replica.follower.whole


def test_the_next_peer_is_asked_where_one_fails() -> None:
    replica = behind()
    first = only(FetchLog, catch_up(replica, at(1, 9), at(1, 4), at(1, 4)))
    second = only(FetchLog, replica.follower.fetch_failed(first.attempt))
    assert (first.peer, second.peer) == (B, C)
    assert replica.follower.log_fetched(first.attempt, run_of(1, 7, 9)) == []
    assert replica.follower.fetch_failed(second.attempt) == []
    again = only(FetchLog, catch_up(replica, at(1, 9), at(1, 4), at(1, 4)))
    assert again.peer == B


def test_peers_that_merely_fail_are_no_reason_to_copy() -> None:
    replica = behind()
    effects = catch_up(replica, at(2, 40), at(2, 50), at(2, 51))
    for _ in PEERS:
        effects = replica.follower.fetch_failed(only(FetchLog, effects).attempt)
    assert effects == []
    assert replica.follower.whole


def test_a_peer_that_sends_something_else_is_passed_over() -> None:
    replica = behind()
    first = only(FetchLog, catch_up(replica, at(1, 9), at(1, 4), at(1, 4)))
    effects = replica.follower.log_fetched(first.attempt, run_of(1, 9, 9))
    assert only(FetchLog, effects).peer == C
    assert replica.follower.end == at(1, 6)


def test_a_fetch_of_an_older_epoch_brings_nothing() -> None:
    """What the old leader vouched for may be cut by the new one."""
    replica = behind()
    fetch = only(FetchLog, catch_up(replica, at(1, 9), at(1, 4), at(1, 4)))
    replica.sealed(3)
    assert replica.follower.log_fetched(fetch.attempt, run_of(1, 7, 9)) == []


def test_a_position_never_falls_without_a_floor() -> None:
    """Epoch 3 chose a log that ends at (1, 9); this replica alone has (2, 6) to (2, 8), which nobody acked.

    Between the two its position is lower than it was, and control was told of (2, 8): it fills, and is
    whole again behind the record that opens epoch 3.
    """
    replica = Replica()
    replica.sealed(1)
    replica.appended(1, *run_of(1, 1, 5))
    replica.sealed(2)
    replica.appended(2, *run_of(2, 6, 8, previous=at(1, 5)))
    replica.sealed(3)
    asked = replica.append(3, end=at(3, 10), catch_up=CatchUp(at(1, 9), at(1, 9), PEERS))
    fetch = only(FetchLog, asked)
    effects = replica.keep(replica.follower.log_fetched(fetch.attempt, run_of(1, 1, 9)))
    entry = only(Persist, effects).entries[0]
    assert entry == FillingEntry(Filling(at(2, 8), at(1, 5), Sequence(5)))
    replica.keep(replica.follower.log_ended(fetch.attempt))
    replica.sync()
    replica.crash()
    assert replica.follower.end == at(1, 9)
    assert replica.sealed(3, known=at(2, 8)).floor == at(2, 8)
    replica.appended(3, *run_of(3, 10, 10, previous=at(1, 9)))
    assert replica.follower.whole
    replica.crash()
    assert replica.follower.whole
    assert replica.follower.end == at(3, 10)


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
