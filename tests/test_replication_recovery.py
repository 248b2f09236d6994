"""Rule 1: which log an attachment goes on with. Each case is one that a laxer rule would lose."""

from blockstore.domain import ORIGIN, Position, ReplicaId
from blockstore.log import UNKNOWN_FLOOR
from blockstore.replication.messages import SealAnswer
from blockstore.replication.quorum import Quorum
from blockstore.replication.recovery import ChosenLog, Undecided, choose_log
from blockstore.units import Epoch, Generation
from tests.replication_parts import CONFIGURATION, A, B, C, at


def answer(
    end: Position,
    *,
    commit: Position = ORIGIN,
    floor: Position | None = None,
    generation: int = 1,
    complete: bool = False,
) -> SealAnswer:
    """Of a whole member; of a filling one where it has a floor, whose content may be complete all the same."""
    whole = floor is None
    layer = Generation(generation)
    return SealAnswer(Epoch(9), 1, end, commit, ORIGIN, whole, floor or ORIGIN, layer, complete=complete or whole)


def choose(answers: dict[ReplicaId, SealAnswer], *, accept_loss: bool = False) -> ChosenLog | Undecided:
    return choose_log(Quorum(CONFIGURATION), answers, accept_loss=accept_loss)


def test_the_highest_log_of_a_quorum_epoch_before_length() -> None:
    chosen = choose({A: answer(at(1, 9)), B: answer(at(2, 6), commit=at(1, 5), generation=3)})
    assert chosen == ChosenLog(at(2, 6), at(1, 5), Generation(3))


def test_one_answer_is_not_enough() -> None:
    assert choose({A: answer(at(1, 9))}) == Undecided("1 of 3 members answered; a quorum is needed")


def test_a_filling_members_log_is_never_taken() -> None:
    """It may have a hole below its end."""
    chosen = choose({A: answer(at(1, 5)), B: answer(at(1, 9), floor=at(1, 3))})
    assert isinstance(chosen, ChosenLog)
    assert chosen.end == at(1, 5)


def test_without_a_whole_member_there_is_no_log() -> None:
    two = {A: answer(at(1, 5), floor=at(1, 5)), B: answer(at(1, 5), floor=at(1, 5))}
    undecided = choose(two)
    assert isinstance(undecided, Undecided)
    assert not undecided.lost
    lost = choose({**two, C: answer(at(1, 5), floor=at(1, 5))})
    assert isinstance(lost, Undecided)
    assert lost.lost


def test_a_member_not_heard_from_and_a_floor_above_the_log_may_be_a_quorum() -> None:
    """A missed 6 and 7, which B and C acked; B lost them since, and C is away."""
    undecided = choose({A: answer(at(1, 5)), B: answer(at(1, 5), floor=at(1, 7))})
    assert isinstance(undecided, Undecided)
    assert not undecided.lost
    assert B in undecided.why
    assert C in undecided.why


def test_the_third_member_settles_it() -> None:
    chosen = choose({A: answer(at(1, 5)), B: answer(at(1, 5), floor=at(1, 7)), C: answer(at(1, 7))})
    assert isinstance(chosen, ChosenLog)
    assert chosen.end == at(1, 7)


def test_two_floors_above_the_log_are_a_loss_that_somebody_has_to_accept() -> None:
    answers = {A: answer(at(1, 5)), B: answer(at(1, 4), floor=at(1, 7)), C: answer(at(1, 4), floor=UNKNOWN_FLOOR)}
    undecided = choose(answers)
    assert isinstance(undecided, Undecided)
    assert undecided.lost
    assert "--accept-loss" in undecided.why
    chosen = choose(answers, accept_loss=True)
    assert isinstance(chosen, ChosenLog)
    assert chosen.end == at(1, 5)


def test_a_floor_at_the_log_hides_nothing() -> None:
    chosen = choose({A: answer(at(1, 5)), B: answer(at(1, 2), floor=at(1, 5))})
    assert isinstance(chosen, ChosenLog)


def test_what_is_known_to_be_committed_above_the_log_is_missing() -> None:
    undecided = choose({A: answer(at(1, 5)), B: answer(at(1, 4), commit=at(1, 8), floor=at(1, 4)), C: answer(at(1, 5))})
    assert isinstance(undecided, Undecided)
    assert undecided.lost


def test_accepting_a_loss_still_needs_a_quorum_and_a_whole_member() -> None:
    assert isinstance(choose({A: answer(at(1, 5))}, accept_loss=True), Undecided)
    filling = {A: answer(at(1, 5), floor=at(1, 5)), B: answer(at(1, 5), floor=at(1, 5))}
    assert isinstance(choose(filling, accept_loss=True), Undecided)


def test_with_a_loss_accepted_the_fullest_log_will_do_whose_content_is_complete() -> None:
    """Old copies of all three disks were put back; C was being copied to when its copy was taken."""
    answers = {
        A: answer(at(1, 5), commit=at(1, 4), floor=UNKNOWN_FLOOR, complete=True),
        B: answer(at(1, 6), commit=at(1, 4), floor=UNKNOWN_FLOOR, generation=2, complete=True),
        C: answer(at(1, 9), commit=at(1, 3), floor=UNKNOWN_FLOOR),
    }
    undecided = choose(answers)
    assert isinstance(undecided, Undecided)
    assert undecided.lost
    assert f"{B}, ends at (1, 6)" in undecided.why
    assert "--accept-loss" in undecided.why
    assert choose(answers, accept_loss=True) == ChosenLog(at(1, 6), at(1, 4), Generation(2))


def test_a_whole_log_that_is_shorter_than_a_complete_one_is_no_reason_to_lose_more() -> None:
    answers = {A: answer(at(1, 5)), **{each: answer(at(1, 8), floor=UNKNOWN_FLOOR, complete=True) for each in (B, C)}}
    assert isinstance(choose(answers), Undecided)
    chosen = choose(answers, accept_loss=True)
    assert isinstance(chosen, ChosenLog)
    assert chosen.end == at(1, 8)


def test_where_no_content_is_complete_nobody_can_go_on() -> None:
    answers = {member: answer(at(1, 5), floor=UNKNOWN_FLOOR) for member in (A, B, C)}
    for accept_loss in (False, True):
        undecided = choose(answers, accept_loss=accept_loss)
        assert isinstance(undecided, Undecided)
        assert undecided.lost
        assert "all content" in undecided.why


def test_what_was_committed_in_the_log_that_is_given_up_is_not_committed_in_the_other() -> None:
    """(1, 7) is the end of a branch that (2, 7) had replaced; all who had that are lost."""
    answers = {
        A: answer(at(1, 7), commit=at(1, 4)),
        **{each: answer(at(1, 3), commit=at(2, 8), floor=UNKNOWN_FLOOR) for each in (B, C)},
    }
    assert choose(answers, accept_loss=True) == ChosenLog(at(1, 7), at(1, 4), Generation(1))
