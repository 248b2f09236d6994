"""Rule 10: a disk that was replaced by an older copy of itself is found by what others remember."""

from blockstore.domain import ORIGIN, Position, ReplicaAddress, SegmentNumber, VolumeId
from blockstore.log import UNKNOWN_FLOOR, LogImage
from blockstore.replica_codec import (
    decode_replicate,
    decode_seal_answer,
    encode_replicate,
    encode_seal_answer,
    encode_target,
)
from blockstore.replication.messages import AckedPositions, Append, Reconnect, SealAnswer, SealEpoch, Send
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import Epoch
from tests.replication_group import EPOCH, Group, of
from tests.replication_parts import A, B, C, Replica, at, none_of, only, run_of, write

ADDRESS = ReplicaAddress(VolumeId("vol-00000000000000001"), SegmentNumber(0), A)


def told(group: Group) -> list[AckedPositions]:
    return [message.acked for message in group.sent[C] if message.acked]


# ---- what is told


def test_members_are_told_now_and_then_what_the_others_have_acked() -> None:
    group = Group().serve()
    group.pass_time(group.leader.settings.heartbeat_s)
    assert told(group) == [((A, at(EPOCH, 1)), (B, at(EPOCH, 1)))]
    group.keep(group.leader.submit("w", write(1), group.now))
    group.ack(A)
    group.ack(B)
    assert len(told(group)) == 1, "each message of a busy leader repeats it"
    group.now += group.leader.settings.heartbeat_s
    group.keep(group.leader.submit("x", write(1), group.now))
    assert told(group)[1] == ((A, at(EPOCH, 2)), (B, at(EPOCH, 2)))


def test_what_a_filling_member_has_is_no_ack() -> None:
    group = Group().serve()
    group.ack(A, 1, whole=False)
    group.keep(group.leader.submit("w", write(1), group.now))
    group.ack(A, 2, whole=False)
    group.pass_time(group.leader.settings.heartbeat_s)
    assert told(group)[-1][0] == (A, at(EPOCH, 1))


def remembering(*acked: tuple[Position, Position]) -> Replica:
    replica = Replica()
    replica.sealed(1)
    for of_b, of_c in acked:
        message = Append(Epoch(1), 1, 1, ORIGIN, at(1, 9), acked=((B, of_b), (C, of_c)))
        replica.keep(replica.follower.append("stream", message))
    return replica


def test_a_replica_remembers_the_highest_and_says_it_with_its_seal() -> None:
    replica = remembering((at(1, 5), at(1, 3)), (ORIGIN, at(1, 4)))
    known = ((B, at(1, 5)), (C, at(1, 4)))
    assert replica.sealed(2).known == known
    replica.append(2, end=at(1, 9))
    assert replica.sealed(3).known == known, "a message that says nothing changes nothing"
    replica.checkpoint()
    replica.crash()
    assert replica.sealed(4).known == known, "a checkpoint keeps it"


def test_an_image_from_before_anything_was_known_will_do() -> None:
    assert Replica(LogImage()).sealed(1).known == ()


def test_who_is_no_member_any_more_is_forgotten() -> None:
    replica = remembering((at(1, 5), at(1, 3)))
    message = Append(Epoch(1), 1, 2, ORIGIN, at(1, 9), acked=((C, at(1, 2)),))
    replica.keep(replica.follower.append("stream", message))
    assert replica.sealed(2).known == ((C, at(1, 3)),)


def test_positions_cross_the_network() -> None:
    acked = ((B, at(1, 5)), (C, ORIGIN))
    append = Append(Epoch(2), 1, 7, at(1, 4), at(2, 9), run_of(2, 1, 2), acked=acked)
    _, decoded = decode_replicate(b"".join(encode_replicate(encode_target(ADDRESS, 2, 1), append, lambda _: pb.Peer())))
    assert decoded == append
    answer = SealAnswer(Epoch(2), 1, at(1, 5), at(1, 4), at(1, 3), True, known=acked, complete=True)
    assert decode_seal_answer(encode_seal_answer(answer), SealEpoch(Epoch(2), 1)) == answer


# ---- what a leader makes of it


def test_an_old_copy_takes_no_part_in_the_choice_and_is_sealed_again_with_what_is_known() -> None:
    """B acked 9 and was put back; A, which missed 8 and 9, was told. C, which has them, is away."""
    group = Group()
    group.seal(B, at(1, 6))
    effects = group.seal(A, at(1, 7), known=((B, at(1, 9)), (C, at(1, 9))))
    assert only(Reconnect, effects).replica == B
    assert not group.leader.status().end.sequence, "a log was chosen that lacks what was acknowledged"
    group.connect(B)
    assert group.seals[B][-1] == SealEpoch(EPOCH, 1, at(1, 9), connection=2)
    group.seal(B, at(1, 6), floor=UNKNOWN_FLOOR)
    assert not group.leader.status().end.sequence
    group.seal(C, at(1, 9))
    assert group.leader.status().end == at(EPOCH, 10)


def test_what_is_known_before_the_old_copy_answers_comes_with_its_seal() -> None:
    group = Group()
    group.seal(A, at(1, 7), known=((B, at(1, 9)),))
    group.connect(B)
    assert group.seals[B][-1].known == at(1, 9)


def test_an_old_copy_that_answers_as_whole_all_the_same_is_sealed_again() -> None:
    """Its answer to the seal was under way when the leader learned more."""
    group = Group()
    group.connect(B)
    group.seal(A, at(1, 7), known=((B, at(1, 9)),))
    answer = SealAnswer(EPOCH, 1, at(1, 6), ORIGIN, ORIGIN, True, complete=True)
    effects = group.keep(group.leader.answered(B, answer, group.now))
    assert only(Reconnect, effects).replica == B
    assert none_of(Send, effects)


def test_a_filling_member_whose_floor_is_too_low_is_an_old_copy_too() -> None:
    """Of a time when it was being filled."""
    group = Group()
    group.seal(B, at(1, 4), floor=at(1, 5))
    assert only(Reconnect, group.seal(A, at(1, 9), known=((B, at(1, 9)),))).replica == B


def test_what_a_leader_saw_acked_in_its_own_epoch_is_no_news() -> None:
    group = Group().serve()
    group.leader.disconnected(C, group.now)
    effects = group.seal(C, at(EPOCH, 1), known=((A, at(EPOCH, 1)), (B, at(EPOCH, 1))))
    assert none_of(Reconnect, effects)
    assert all(member.whole for member in group.leader.status().members)


def test_a_member_that_comes_back_with_less_than_it_acked_is_not_trusted() -> None:
    group = Group().serve()
    group.keep(group.leader.submit("w", write(1), group.now))
    group.all_ack()
    group.leader.disconnected(C, group.now)
    assert only(Reconnect, group.seal(C, at(EPOCH, 1))).replica == C
    assert not group.leader.status().members[2].whole
    assert of(SealEpoch, group.seals[C])[-1].known == at(EPOCH, 2)


# ---- what the replica makes of it


def test_a_filling_replica_that_is_known_to_have_acked_more_than_its_floor_says_forgot_that() -> None:
    replica = Replica()
    replica.sealed(1)
    replica.appended(1, *run_of(1, 1, 6))
    replica.crash(damage=at(1, 7))
    replica.sync()
    assert replica.sealed(2, known=at(1, 7)).floor == at(1, 7)
    assert replica.sealed(3, known=at(1, 9)).floor == UNKNOWN_FLOOR
    replica.crash()
    assert replica.sealed(4).floor == UNKNOWN_FLOOR


# ---- old copies of all disks: only --accept-loss goes on


def test_the_fullest_complete_log_opens_the_epoch_and_its_member_becomes_whole_by_that() -> None:
    group = Group(accept_loss=True)
    for member, end in ((A, at(1, 5)), (B, at(1, 6)), (C, at(1, 4))):
        group.seal(member, end, floor=UNKNOWN_FLOOR, complete=member != C)
    (opening,) = group.sent[B]
    assert [record.position for record in opening.records] == [at(EPOCH, 7)]
    group.ack(B)
    group.pass_time(group.leader.settings.heartbeat_s)
    catch_up = group.sent[C][-1].catch_up
    assert catch_up is not None
    assert catch_up.peers == (B,)
    group.ack(A)
    assert group.leader.commit == at(EPOCH, 7)


def test_a_replica_that_only_lacks_trust_says_that_its_content_is_complete() -> None:
    replica = Replica()
    replica.sealed(1)
    replica.appended(1, *run_of(1, 1, 6))
    distrusted = replica.sealed(2, known=at(1, 9))
    assert (distrusted.whole, distrusted.complete) == (False, True)
    replica.appended(2, *run_of(2, 7, 7, previous=at(1, 6)))
    assert replica.follower.whole
