"""A follower's rules 1 to 4, each by the scenario that its absence would lose."""

import pytest

from blockstore.domain import ORIGIN, Position
from blockstore.errors import Conflict, Corrupt, Fenced, QuorumUnavailable
from blockstore.log import RecordEntry, SealEntry, TruncateEntry
from blockstore.replication.messages import Append, AppendAnswer, Commit, FencedBy, Persist, SealAnswer
from blockstore.units import Epoch
from tests.replication_parts import Replica, answers, at, chain, none_of, only, read_all_of, run_of


def replica_with(*epochs_and_runs: tuple[int, int, int], commit: Position = ORIGIN) -> Replica:
    """A replica that took these runs of records (epoch, first, last), each under a seal of its epoch."""
    replica = Replica()
    previous = ORIGIN
    for epoch, first, last in epochs_and_runs:
        replica.sealed(epoch)
        records = run_of(epoch, first, last, previous)
        replica.appended(epoch, *records)
        previous = records[-1].position
    if commit != ORIGIN:
        replica.append(epochs_and_runs[-1][0], commit=commit)
    return replica


# ---- rule 1


def test_a_seal_is_answered_once_it_is_durable_with_everything_accepted_before_it() -> None:
    replica = Replica()
    replica.sealed(1)
    replica.append(1, *run_of(1, 1, 3))
    assert not answers(replica.seal(2))
    answer = answers(replica.sync())[-1]
    assert isinstance(answer, SealAnswer)
    assert answer.end == at(1, 3)
    assert isinstance(replica.journal[-1], SealEntry)


def test_no_ack_of_an_older_epoch_leaves_after_a_seal() -> None:
    replica = Replica()
    replica.sealed(1)
    replica.append(1, *run_of(1, 1, 1))
    replica.seal(2)
    assert [type(answer) for answer in answers(replica.sync())] == [SealAnswer]
    assert answers(replica.append(1, *run_of(1, 2, 2))) == [FencedBy(Epoch(2), 1)]
    assert replica.follower.end == at(1, 1)


def test_a_heartbeat_of_an_older_epoch_confirms_no_lease() -> None:
    replica = Replica()
    replica.sealed(1)
    replica.seal(2)
    assert answers(replica.append(1)) == [FencedBy(Epoch(2), 1)]


def test_a_seal_survives_a_crash_only_if_it_was_answered() -> None:
    replica = Replica()
    replica.sealed(2)
    replica.seal(3)
    replica.crash()
    assert replica.follower.epoch == 2
    replica.sealed(3)
    replica.crash()
    assert replica.follower.epoch == 3
    assert answers(replica.seal(2)) == [FencedBy(Epoch(3), 1)]


def test_two_seals_in_the_queue_the_older_one_is_told_that_it_is_fenced() -> None:
    replica = Replica()
    replica.seal(1)
    replica.seal(2)
    first, second = answers(replica.sync())
    assert first == FencedBy(Epoch(2), 1)
    assert isinstance(second, SealAnswer)


def test_the_same_epoch_may_seal_again_and_writes_nothing() -> None:
    replica = replica_with((1, 1, 2))
    effects = replica.seal(1)
    assert none_of(Persist, effects)
    assert isinstance(answers(effects)[0], SealAnswer)


def test_a_newer_configuration_fences_like_an_epoch() -> None:
    replica = Replica()
    replica.sealed(1)
    effects = replica.follower.append("stream", Append(Epoch(1), 0, 1, ORIGIN, ORIGIN))
    assert answers(effects) == [FencedBy(Epoch(1), 1)]


# ---- rule 2


def test_an_ack_waits_for_the_disk() -> None:
    replica = Replica()
    replica.sealed(1)
    assert not answers(replica.append(1, *run_of(1, 1, 2)))
    answer = answers(replica.sync())[0]
    assert isinstance(answer, AppendAnswer)
    assert answer.matched == at(1, 2)


def test_a_heartbeat_between_says_nothing_about_what_is_not_durable() -> None:
    replica = Replica()
    replica.sealed(1)
    replica.append(1, *run_of(1, 1, 2))
    answer = answers(replica.append(1, end=at(1, 2)))[0]
    assert isinstance(answer, AppendAnswer)
    assert (answer.matched, answer.end) == (ORIGIN, ORIGIN)


def test_what_was_not_durable_is_gone_after_a_crash() -> None:
    replica = replica_with((1, 1, 2))
    replica.append(1, *run_of(1, 3, 4))
    replica.crash()
    assert replica.follower.end == at(1, 2)


def test_a_record_that_is_held_is_acked_again_and_cuts_nothing() -> None:
    replica = replica_with((1, 1, 4))
    effects = replica.append(1, *run_of(1, 2, 2), end=at(1, 4))
    assert none_of(Persist, effects)
    assert replica.follower.end == at(1, 4)
    answer = answers(effects)[0]
    assert isinstance(answer, AppendAnswer)
    assert answer.matched == at(1, 4)
    assert not answer.behind


def test_a_record_without_its_predecessor_is_not_taken() -> None:
    replica = replica_with((1, 1, 2))
    effects = replica.append(1, *run_of(1, 4, 5))
    answer = answers(effects)[0]
    assert isinstance(answer, AppendAnswer)
    assert answer.behind
    assert replica.follower.end == at(1, 2)


def test_a_predecessor_of_another_epoch_is_another_record() -> None:
    replica = replica_with((1, 1, 3))
    replica.sealed(3)
    assert replica.appended(3, *run_of(3, 4, 4, previous=at(2, 3))).behind


def test_a_tail_is_cut_where_the_epoch_differs_in_the_group_that_replaces_it() -> None:
    replica = replica_with((1, 1, 5))
    replica.sealed(2)
    effects = replica.append(2, *run_of(2, 4, 4, previous=at(1, 3)))
    cut, new = only(Persist, effects).entries
    assert cut == TruncateEntry(at(1, 3).sequence)
    assert isinstance(new, RecordEntry)
    replica.sync()
    replica.crash()
    assert replica.follower.end == at(2, 4)


def test_a_cut_that_did_not_reach_the_disk_leaves_the_old_tail() -> None:
    replica = replica_with((1, 1, 5))
    replica.sealed(2)
    replica.append(2, *run_of(2, 4, 4, previous=at(1, 3)))
    replica.crash()
    assert replica.follower.end == at(1, 5)


def test_nothing_committed_is_ever_cut() -> None:
    replica = replica_with((1, 1, 5), commit=at(1, 4))
    replica.sealed(2)
    with pytest.raises(Corrupt, match="below its commit"):
        replica.append(2, *run_of(2, 4, 4, previous=at(1, 3)))


def test_a_stream_whose_seal_was_before_a_restart_is_refused() -> None:
    """Its leader goes by an answer that may be out of date; the refusal makes it seal again."""
    replica = replica_with((1, 1, 2))
    replica.crash()
    with pytest.raises(Conflict, match="seal it again"):
        replica.append(1, *run_of(1, 3, 3))
    assert replica.follower.end == at(1, 2)


# ---- rule 3


def test_commit_is_honoured_only_where_the_log_matches() -> None:
    """The tail of epoch 1 has the sequences that epoch 2 has committed, but other records."""
    replica = replica_with((1, 1, 5))
    replica.sealed(2)
    effects = replica.append(2, commit=at(2, 5), end=at(2, 6))
    assert none_of(Commit, effects)
    assert replica.follower.commit == ORIGIN


def test_commit_waits_until_it_is_durable_here() -> None:
    replica = Replica()
    replica.sealed(1)
    assert none_of(Commit, replica.append(1, *run_of(1, 1, 3), commit=at(1, 3)))
    assert read_all_of(only(Commit, replica.sync()).records) == [at(1, 1), at(1, 2), at(1, 3)]


def test_an_answer_tells_the_commit_that_its_message_brought() -> None:
    """Else whoever waits for members to know of a commit waits for the heartbeat after."""
    replica = replica_with((1, 1, 3))
    heartbeat = answers(replica.append(1, commit=at(1, 2)))[0]
    replica.append(1, *run_of(1, 4, 4, at(1, 3)), commit=at(1, 4))
    durable = answers(replica.sync())[0]
    assert isinstance(heartbeat, AppendAnswer)
    assert isinstance(durable, AppendAnswer)
    assert (heartbeat.commit, durable.commit) == (at(1, 2), at(1, 4))


def test_a_leaders_end_that_is_held_shows_that_all_before_it_matches() -> None:
    replica = replica_with((1, 1, 5))
    replica.sealed(2)
    effects = replica.append(2, commit=at(1, 4), end=at(1, 5))
    assert read_all_of(only(Commit, effects).records)[-1] == at(1, 4)


def test_an_uncommitted_tail_stays_out_of_the_image() -> None:
    replica = replica_with((1, 1, 5), commit=at(1, 3))
    image = replica.follower.image()
    assert image.applied == at(1, 3)
    assert read_all_of(image.records) == [at(1, 4), at(1, 5)]


def test_an_image_holds_only_what_is_durable() -> None:
    replica = replica_with((1, 1, 3), commit=at(1, 1))
    replica.append(1, *run_of(1, 4, 4))
    assert read_all_of(replica.follower.image().records) == [at(1, 2), at(1, 3)]


def test_a_checkpoint_frees_memory_and_the_log_goes_on_from_it() -> None:
    replica = replica_with((1, 1, 5), commit=at(1, 3))
    before = replica.follower.unapplied_bytes
    replica.checkpoint()
    assert replica.follower.applied == at(1, 3)
    assert replica.follower.unapplied_bytes < before
    replica.crash()
    assert replica.follower.end == at(1, 5)
    assert replica.sealed(2).end == at(1, 5)


# ---- rule 4


def test_a_read_is_answered_from_what_is_committed_and_brings_the_commit_along() -> None:
    replica = replica_with((1, 1, 3))
    effects = replica.follower.read(Epoch(1), 1, at(1, 2))
    assert read_all_of(only(Commit, effects).records) == [at(1, 1), at(1, 2)]


def test_a_replica_that_lacks_something_committed_answers_no_read() -> None:
    replica = replica_with((1, 1, 3))
    with pytest.raises(QuorumUnavailable, match="can commit up to"):
        replica.follower.read(Epoch(1), 1, at(1, 4))


def test_a_read_of_an_older_epoch_is_fenced() -> None:
    replica = replica_with((1, 1, 3))
    replica.seal(2)
    with pytest.raises(Fenced):
        replica.follower.read(Epoch(1), 1, at(1, 1))


def test_a_read_of_an_epoch_that_was_not_sealed_here_is_not_answered() -> None:
    replica = replica_with((1, 1, 3))
    with pytest.raises(QuorumUnavailable, match="not sealed here"):
        replica.follower.read(Epoch(2), 1, at(1, 1))


# ---- for peers


def test_a_peer_gets_records_only_of_a_log_that_holds_both_ends() -> None:
    replica = replica_with((1, 1, 3), (2, 4, 6))
    held = replica.follower.records(at(1, 2), at(2, 5))
    assert held is not None
    assert read_all_of(held) == [at(1, 3), at(2, 4), at(2, 5)]
    assert replica.follower.records(at(1, 2), at(1, 5)) is None
    assert replica.follower.records(at(1, 2), at(2, 7)) is None


def test_the_highest_durable_end_is_told_to_control() -> None:
    replica = replica_with((1, 1, 3))
    replica.append(1, *chain(at(1, 3), at(1, 4)))
    assert replica.follower.acked == at(1, 3)
    replica.sync()
    assert replica.follower.acked == at(1, 4)


def test_an_image_keeps_a_tail_whose_cut_is_not_durable() -> None:
    """A checkpoint gives up the journal that holds the tail; the record that replaces it may never get there."""
    replica = replica_with((1, 1, 5), commit=at(1, 3))
    replica.sealed(2)
    replica.append(2, *run_of(2, 4, 4, previous=at(1, 3)))
    assert read_all_of(replica.follower.image().records) == [at(1, 4), at(1, 5)]
    replica.sync()
    assert read_all_of(replica.follower.image().records) == [at(2, 4)]
