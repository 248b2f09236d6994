"""A loss was accepted while a member was away that has what was given up: it never takes part again, in any epoch.

Its commit is a position that the log holds no more. Counted as one that has everything up to there, it would ack
records that it does not have, and show what others do not.
"""

from blockstore.domain import ORIGIN, ReplicaId
from blockstore.replication.messages import Completed
from blockstore.units import Epoch
from tests.replication_group import EPOCH, SETTINGS, Group, of
from tests.replication_parts import A, B, C, at, none_of, write


def left_out(group: Group) -> list[ReplicaId]:
    return [each.replica for each in group.leader.status().members if each.foreign]


def after_a_loss() -> Group:
    """Epoch 4 went on from (3, 100) with A and B; C, which was away, has committed up to (3, 200)."""
    group = Group(loss_epochs=(Epoch(4),))
    group.seal(A, at(4, 150), commit=at(4, 150))
    group.seal(B, at(4, 150), commit=at(4, 150))
    group.seal(C, at(3, 200), commit=at(3, 200))
    return group


def test_who_was_away_when_a_loss_was_accepted_is_left_out_in_later_epochs_too() -> None:
    group = after_a_loss()
    assert left_out(group) == [C]
    assert not group.sent[C]


def test_its_log_is_no_ack() -> None:
    group = after_a_loss()
    for member in (A, B):
        group.ack(member)
    assert group.leader.serving
    group.forget()
    group.keep(group.leader.submit("write", write(1), group.now))
    assert none_of(Completed, group.ack(A))
    assert len(of(Completed, group.ack(B))) == 1


def test_it_is_left_out_where_it_comes_back_late() -> None:
    group = Group(loss_epochs=(Epoch(4),))
    for member in (A, B):
        group.seal(member, at(4, 150), commit=at(4, 150))
    for member in (A, B):
        group.ack(member)
    group.seal(C, at(3, 200), commit=at(3, 120))
    assert left_out(group) == [C]


def test_who_got_a_record_since_has_been_looked_at() -> None:
    group = Group(loss_epochs=(Epoch(4),))
    for member, end in ((A, at(4, 150)), (B, at(4, 150)), (C, at(4, 101))):
        group.seal(member, end)
    assert left_out(group) == []


def test_a_newcomer_has_nothing_that_was_given_up() -> None:
    group = Group(loss_epochs=(Epoch(4),))
    for member in (A, B):
        group.seal(member, at(4, 150))
    group.seal(C, ORIGIN, floor=at(4, 10), complete=False)
    assert left_out(group) == []


def test_where_no_record_of_that_epoch_is_left_nothing_was_given_up() -> None:
    """The attempt that was to accept it came to nothing."""
    group = Group(loss_epochs=(Epoch(4),))
    for member in (A, B, C):
        group.seal(member, at(3, 100))
    assert left_out(group) == []


def test_each_accepted_loss_counts_also_while_the_next_one_is_accepted() -> None:
    """Epoch 4 accepted one while C was away; this one accepts another, as B is gone, and C is back."""
    group = Group(accept_loss=True, loss_epochs=(Epoch(4), EPOCH))
    group.seal(A, at(4, 150), commit=at(4, 150))
    group.seal(C, at(3, 200), commit=at(3, 200))
    group.pass_time(SETTINGS.loss_wait_s)
    assert left_out(group) == [C]
    assert not group.sent[C]
    group.ack(A)
    assert group.leader.commit.epoch != EPOCH, "A alone is no quorum"


def test_what_was_given_up_is_committed_for_nobody() -> None:
    """A and B have started anew, and not heard that anything of epoch 4 is committed; C knows of (3, 200)."""
    group = Group(loss_epochs=(Epoch(4),))
    group.seal(A, at(4, 150), commit=at(2, 90))
    group.seal(C, at(3, 200), commit=at(3, 200))
    assert group.leader.commit == at(2, 90)
    group.seal(B, at(4, 150), commit=at(2, 90))
    for member in (A, B):
        group.ack(member)
    assert group.leader.serving
    assert group.leader.commit == at(EPOCH, 151)
