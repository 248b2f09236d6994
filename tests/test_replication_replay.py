"""Replay is idempotent: whatever of the journal an image reflects already, the log comes out the same."""

from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.log import Filling, FillingEntry, LogEntry, LogImage, RecordEntry, SealEntry, TruncateEntry, WholeEntry
from blockstore.replication.replay import replay
from blockstore.units import Epoch, Sequence
from tests.replication_parts import Replica, at, read_all_of, run_of


def entries_of(epoch: int, first: int, last: int, after: int = 0) -> list[LogEntry]:
    return [RecordEntry(record) for record in run_of(epoch, first, last, at(after or epoch, first - 1))]


def test_a_record_below_the_image_is_skipped() -> None:
    state = replay(LogImage(applied=at(1, 4)), entries_of(1, 2, 6))
    assert (state.run.start, state.run.end, state.gap) == (at(1, 4), at(1, 6), False)


def test_a_tail_that_was_cut_later_is_no_gap() -> None:
    """The image reflects the cut and what came behind it; the journal still begins with the old tail."""
    journal = [*entries_of(1, 6, 8), TruncateEntry(Sequence(5)), *entries_of(2, 6, 7, after=1)]
    state = replay(LogImage(applied=at(2, 7), epoch=Epoch(2)), journal)
    assert state.run.end == at(2, 7)


def test_a_gap_is_told_with_the_highest_position_seen() -> None:
    state = replay(LogImage(applied=at(1, 2)), entries_of(1, 5, 6))
    assert (state.gap, state.highest, state.run.end) == (True, at(1, 6), at(1, 2))


def test_promises_survive_in_any_order() -> None:
    state = replay(LogImage(epoch=Epoch(5), configuration=2), [SealEntry(Epoch(3), 4)])
    assert (state.epoch, state.configuration) == (5, 4)


def test_a_filling_that_copies_starts_the_log_anew_and_one_that_does_not_keeps_it() -> None:
    copying = FillingEntry(Filling(at(1, 9), at(2, 20), Sequence(3)))
    state = replay(LogImage(applied=at(1, 3)), [*entries_of(1, 4, 6), copying])
    assert (state.run.start, state.run.end) == (at(2, 20), at(2, 20))
    trusting = FillingEntry(Filling(at(1, 9), at(1, 5), Sequence(5)))
    state = replay(LogImage(applied=at(1, 3)), [*entries_of(1, 4, 6), trusting])
    assert (state.run.start, state.run.end) == (at(1, 3), at(1, 5))


def test_a_filling_that_rests_on_lost_records_is_a_gap() -> None:
    trusting = FillingEntry(Filling(at(1, 9), at(1, 5), Sequence(5)))
    assert replay(LogImage(applied=at(1, 3)), [trusting, WholeEntry()]).gap


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["append", "overwrite", "commit", "checkpoint"]), st.integers(1, 4))))
def test_replaying_all_of_the_journal_over_any_later_image_gives_the_same_log(steps: list[tuple[str, int]]) -> None:
    """The journal is released late: a start may replay entries that its image reflects already."""
    replica, epoch = Replica(), 1
    replica.sealed(epoch)
    journal: list[LogEntry] = list(replica.journal)
    for what, count in steps:
        follower, before = replica.follower, len(replica.journal)
        if what == "append":
            replica.appended(
                epoch, *run_of(epoch, follower.end.sequence + 1, follower.end.sequence + count, follower.end)
            )
        elif what == "overwrite":
            epoch += 1
            replica.sealed(epoch)
            start = max(follower.commit.sequence, follower.end.sequence - count)
            previous = follower._run.position_at(start)
            replica.appended(epoch, *run_of(epoch, start + 1, start + count, previous))
        elif what == "commit":
            held = follower._run.position_at(min(follower.commit.sequence + count, follower.end.sequence))
            assert held is not None
            replica.append(epoch, commit=held)
        else:
            replica.image = follower.image()
        journal += replica.journal[before:]
        state = replay(replica.image, journal)
        assert not state.gap
        assert state.epoch == epoch
        assert state.run.end == follower.end
        held_above = follower._run.between(follower.commit.sequence, follower.end.sequence)
        assert read_all_of(state.run.between(follower.commit.sequence, state.run.end.sequence)) == read_all_of(
            held_above
        )
