"""A follower that is behind catches up from a peer's log (rule 6), each case by what its absence would lose."""

from blockstore.log import Filling, FillingEntry, TruncateEntry
from blockstore.replication.messages import CatchUp, FetchLog, Persist
from blockstore.units import Sequence
from tests.replication_behind import PEERS, behind, catch_up, last_ack
from tests.replication_parts import B, C, Replica, at, only, run_of


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
