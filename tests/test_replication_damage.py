"""Who has lost content is filled anew on its leader's word alone: never is the last good copy of anything given up.

The invariant (docs/replication.md, rule 6): that word is given only while a quorum of the other members is whole, sound
and here, and has everything that is committed; and the member counts as filling from then on.
"""

import pytest

from blockstore.domain import Member, NodeId, Replacement, ReplicaId
from blockstore.log import FillingEntry
from blockstore.replication.messages import Append, Completed, Persist, SealEpoch
from blockstore.units import Epoch, Sequence
from tests.replication_group import EPOCH, Group, of
from tests.replication_parts import CONFIGURATION, A, B, C, Replica, answers, at, none_of, only, run_of, write

D = ReplicaId("rep-" + "d" * 17)


def told(group: Group, *members: ReplicaId) -> list[ReplicaId]:
    """Which of them were told to fill anew since `forget`, once a heartbeat has passed."""
    group.pass_time(group.leader.settings.heartbeat_s)
    return [member for member in members or (A, B, C) if any(message.fill_anew for message in group.sent[member])]


def submit(group: Group, ticket: str) -> None:
    group.keep(group.leader.submit(ticket, write(1), group.now))


def test_a_damaged_member_is_told_once_the_others_have_everything() -> None:
    group = Group().serve()
    group.ack(A, damaged=True)
    assert told(group) == [A]
    (message,) = [message for message in group.sent[A] if message.fill_anew]
    assert message.catch_up is not None
    assert set(message.catch_up.peers) == {B, C}
    group.forget()
    assert told(group) == [], "it was told, and is waited for"


def test_the_answer_to_a_seal_may_say_it_first() -> None:
    group = Group()
    group.seal(A, damaged=True)
    for member in (B, C):
        group.seal(member)
    for member in (B, C):
        group.ack(member, 1)
    assert group.leader.serving
    assert told(group) == [A]


def test_of_two_that_are_damaged_neither_is_told() -> None:
    """In different blocks, perhaps: what one of them lacks only two members have, and the other one is one of them."""
    group = Group().serve()
    group.ack(A, damaged=True)
    group.ack(B, damaged=True)
    assert told(group) == []


@pytest.mark.parametrize("how", ["away", "filling", "behind"])
def test_it_is_not_told_while_another_one_does_not_count(how: str) -> None:
    group = Group().serve()
    if how == "away":
        group.keep(group.leader.disconnected(C, group.now))
    elif how == "filling":
        group.ack(C, whole=False)
    else:
        submit(group, "a write that C does not have")
        group.ack(B)
    group.ack(A, damaged=True)
    assert told(group) == []
    if how == "away":
        group.seal(C, at(EPOCH, 1))
    group.ack(C)
    assert told(group) == [A]


def test_from_that_word_on_its_ack_counts_for_nothing() -> None:
    """Else a record that it gives up a moment later is on one other member alone."""
    group = Group().serve()
    group.ack(A, damaged=True)
    assert told(group) == [A]
    before = group.requests[A]
    submit(group, "late")
    group.requests[A] = before - 1  # an answer that crossed that word
    assert none_of(Completed, group.ack(A))
    assert none_of(Completed, group.ack(B))
    assert len(of(Completed, group.ack(C))) == 1


def test_what_it_acked_before_that_word_counts_no_more_either() -> None:
    group = Group().serve()
    submit(group, "a write that A alone has")
    group.ack(A, damaged=True)
    assert told(group) == [A]
    assert none_of(Completed, group.ack(B))
    assert len(of(Completed, group.ack(C))) == 1


def test_the_second_one_has_its_turn_when_the_first_is_whole_again() -> None:
    group = Group().serve()
    group.ack(A, damaged=True)
    assert told(group) == [A]
    group.forget()
    group.ack(A, whole=False)
    group.ack(B, damaged=True)
    assert told(group) == []
    group.ack(A)
    assert told(group) == [B]


def test_a_member_that_did_not_hear_it_counts_again_and_is_told_again() -> None:
    group = Group().serve()
    group.ack(A, damaged=True)
    assert told(group) == [A]
    group.forget()
    group.keep(group.leader.disconnected(A, group.now))
    group.seal(A, at(EPOCH, 1), damaged=True)
    group.ack(A, damaged=True)
    assert told(group) == [A]
    assert group.sent[A][-1].fill_anew == group.seals[A][-1].connection == 2


def test_while_members_change_the_others_are_a_quorum_of_both_sets() -> None:
    """D is to be in the place of C, which leaves: until then neither set of members may rest on one that is emptied."""
    group = Group().serve()
    enlisted = CONFIGURATION.enlist(Replacement(Member(D, NodeId("node-" + "d" * 17)), C))
    group.sent[D], group.seals[D], group.requests[D] = [], [], 0
    group.keep(group.leader.reconfigure(enlisted, group.now))
    group.seal(D, at(EPOCH, 1))
    group.keep(group.leader.reconfigure(enlisted.joint(), group.now))
    for member in (A, B, C, D):
        group.ack(member, damaged=member == B)
    group.keep(group.leader.disconnected(A, group.now))
    assert told(group) == [], "of the old ones only C, of the new ones only D"
    group.seal(A, at(EPOCH, 2))
    group.ack(A)
    assert told(group) == [B]


def test_who_fills_is_sent_to_the_sound_ones_first() -> None:
    """A copy from a damaged one breaks off where it is damaged, perhaps at its end."""
    group = Group().serve()
    group.ack(A, damaged=True)
    group.ack(C, whole=False)
    group.forget()
    group.pass_time(group.leader.settings.heartbeat_s)
    found = [message.catch_up for message in group.sent[C] if message.catch_up]
    assert [each.peers for each in found] == [(B, A)]


def test_nobody_is_told_before_guests_are_served() -> None:
    group = Group()
    for member in (A, B, C):
        group.seal(member, damaged=member == A)
    assert not group.leader.serving
    assert told(group) == []


# ---- the member


def seal(replica: Replica, epoch: int, connection: int = 1) -> None:
    replica.keep(replica.follower.seal("seal", SealEpoch(Epoch(epoch), 1, connection=connection)))
    replica.sync()


def damaged() -> Replica:
    replica = Replica()
    seal(replica, 2)
    replica.append(2, *run_of(2, 1, 6), commit=at(2, 4))
    replica.sync()
    replica.follower.damaged = True
    return replica


def order(replica: Replica, connection: int = 1, epoch: int = 2) -> list[FillingEntry]:
    """What it writes down on that word, said on this connection."""
    replica.request += 1
    message = Append(Epoch(epoch), 1, replica.request, at(2, 4), at(2, 6), fill_anew=connection)
    effects = replica.keep(replica.follower.append("stream", message))
    replica.sync()
    entries = [entry for effect in of(Persist, effects) for entry in effect.entries]
    return [entry for entry in entries if isinstance(entry, FillingEntry)]


def test_it_says_that_it_is_damaged_and_stays_as_it_is_until_it_is_told() -> None:
    replica = damaged()
    answer = answers(replica.append(2))[-1]
    assert (answer.damaged, answer.whole) == (True, True)  # type: ignore[union-attr]
    (entry,) = order(replica)
    assert (entry.filling.since, entry.filling.floor) == (Sequence(0), at(2, 6))
    assert not replica.follower.whole
    answer = answers(replica.append(2))[-1]
    assert (answer.damaged, answer.whole) == (False, False)  # type: ignore[union-attr]


def test_the_answer_to_that_word_says_already_that_it_fills() -> None:
    replica = damaged()
    message = Append(Epoch(2), 1, 99, at(2, 4), at(2, 6), fill_anew=1)
    for answer in answers(replica.keep(replica.follower.append("stream", message)) + replica.sync()):
        assert not answer.whole  # type: ignore[union-attr]


def test_one_that_is_sound_gives_nothing_up() -> None:
    replica = damaged()
    replica.follower.damaged = False
    assert order(replica) == []
    assert replica.follower.whole


def test_what_comes_late_from_a_connection_before_the_newest_seal_orders_nothing() -> None:
    """Its leader counts it as whole by what it answered to that seal. A seal that comes twice takes nothing back."""
    replica = damaged()
    seal(replica, 2, 2)
    seal(replica, 2, 1)
    assert order(replica, 1) == []
    assert replica.follower.whole
    assert len(order(replica, 2)) == 1


def test_a_leader_that_is_over_orders_nothing() -> None:
    replica = damaged()
    seal(replica, 2, 5)
    seal(replica, 3)  # whose first connection it is
    assert order(replica, epoch=2) == []
    assert replica.follower.whole
    assert only(FillingEntry, order(replica, epoch=3))
