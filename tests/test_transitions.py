"""A volume's states: the table against its promises, and random walks through it."""

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.control import transitions
from blockstore.control.records import AttachmentState, FrontEnd, Segment, Volume
from blockstore.control.transitions import MOVES, Move, Phase, phase_of
from blockstore.domain import (
    Configuration,
    FrontEndId,
    Member,
    NodeId,
    ReplicaId,
    SegmentNumber,
    VolumeId,
    VolumeState,
)
from blockstore.errors import CairnError, Conflict, Fenced, InvalidRequest
from blockstore.units import BLOCK_SIZE, GIB, Epoch

MEMBERS = tuple(Member(ReplicaId(f"rep-{n:017x}"), NodeId(f"node-{n:017x}")) for n in range(3))
ONE, OTHER = (FrontEnd(FrontEndId(f"fe-{n:017x}"), "first", f"127.0.0.1:{n}", ()) for n in (1, 2))
ONE_AGAIN = FrontEnd(ONE.id, "second", ONE.address, ())
CREATING = Volume(
    VolumeId("vol-00000000000000001"),
    "",
    GIB,
    VolumeState.CREATING,
    0,
    (Segment(SegmentNumber(0), GIB, Configuration(1, MEMBERS)),),
)
AVAILABLE = transitions.created(CREATING, CREATING.segments)


def attach(
    volume: Volume,
    front_end: FrontEnd = ONE,
    *,
    read_only: bool = False,
    force: bool = False,
    accept_loss: bool = False,
) -> Volume:
    return transitions.attach(volume, front_end, read_only=read_only, force=force, accept_loss=accept_loss, now_ms=7)


ATTACHING = attach(AVAILABLE)
ATTACHED = transitions.opened(ATTACHING, Epoch(1))
DETACHING = transitions.detach(ATTACHED)
ERROR = transitions.lost(ATTACHED, Epoch(1), "two disks are gone")
DELETING = transitions.delete(AVAILABLE)
BY_PHASE = {phase_of(each): each for each in (CREATING, AVAILABLE, ATTACHING, ATTACHED, DETACHING, ERROR, DELETING)}

Change = Callable[[Volume], Volume]
#: Every change that a user, a step or a process can ask for, in the epoch that the volume is in.
CHANGES: dict[str, Change] = {
    "created": lambda now: transitions.created(now, now.segments),
    "place anew": lambda now: transitions.place_anew(now, now.segments),
    "failed": lambda now: transitions.failed(now, "no"),
    "attach": attach,
    "attach elsewhere": lambda now: attach(now, OTHER),
    "attach by force": lambda now: attach(now, OTHER, force=True),
    "recover": lambda now: attach(now, accept_loss=True),
    "reopen": lambda now: transitions.reopen(now, ONE_AGAIN),
    "opened": lambda now: transitions.opened(now, now.epoch),
    "give up": lambda now: transitions.give_up(now, now.epoch, "no quorum"),
    "lost": lambda now: transitions.lost(now, now.epoch, "gone"),
    "renew": lambda now: transitions.renew(now, ONE_AGAIN),
    "detach": transitions.detach,
    "detached": lambda now: transitions.detached(now, now.epoch),
    "cut off": transitions.cut_off,
    "delete": transitions.delete,
    "resize": lambda now: transitions.resize(now, now.size_bytes + BLOCK_SIZE),
}


def test_every_phase_is_reached_and_every_move_is_somewhere() -> None:
    assert set(BY_PHASE) == set(Phase)
    assert {move for move, _ in MOVES} == set(Move)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_in_the_table_or_refused(phase: Phase, change: str) -> None:
    """Whatever is asked for in whatever phase: one row of the table, nothing, or a refusal."""
    before = BY_PHASE[phase]
    try:
        after = CHANGES[change](before)
    except (Conflict, Fenced):
        return
    steps = {to for (_, at), to in MOVES.items() if at is phase}
    # Two moves at once, of which the first is in the table as well.
    steps |= {Phase.AVAILABLE} if change == "cut off" else set()
    assert after == before or phase_of(after) in steps


def test_deleting_is_the_end() -> None:
    for change in CHANGES.values():
        with suppress(Conflict, Fenced):
            assert change(DELETING) == DELETING


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(sorted(CHANGES)), max_size=40))
def test_epochs_never_fall_and_no_two_attempts_share_one(walk: list[str]) -> None:
    volume = CREATING
    given_out: dict[Epoch, tuple[str, str]] = {}
    for name in walk:
        try:
            after = CHANGES[name](volume)
        except CairnError:
            continue
        assert after.epoch >= volume.epoch
        assert after.size_bytes == sum(segment.size_bytes for segment in after.segments)
        if after.attachment:
            assert after.attachment.epoch == after.epoch
            holder = (after.attachment.front_end, after.attachment.instance)
            assert given_out.setdefault(after.epoch, holder) == holder
        else:
            assert after.state is not VolumeState.IN_USE
        volume = after


@pytest.mark.parametrize(
    "change",
    [
        lambda now: transitions.opened(now, Epoch(1)),
        lambda now: transitions.give_up(now, Epoch(1), "x"),
        lambda now: transitions.lost(now, Epoch(1), "x"),
        lambda now: transitions.detached(now, Epoch(1)),
    ],
)
def test_the_end_of_an_older_epoch_is_fenced(change: Change) -> None:
    taken_over = attach(ATTACHED, OTHER, force=True)
    assert taken_over.epoch == 2
    with pytest.raises(Fenced, match="epoch 1"):
        change(taken_over)


def test_only_the_front_end_that_has_it_renews() -> None:
    renewed = transitions.renew(ATTACHED, ONE_AGAIN)
    assert renewed.attachment is not None
    assert (renewed.epoch, renewed.attachment.instance) == (2, "second")
    for volume, front_end in (
        (ATTACHED, OTHER),
        (AVAILABLE, ONE),
        (ATTACHING, ONE),
        (DETACHING, ONE),
        (ERROR, ONE),
    ):
        with pytest.raises(Fenced):
            transitions.renew(volume, front_end)


def test_a_front_end_that_may_have_served_already_accepts_no_further_loss() -> None:
    """It started anew before control heard that it serves: guests may have had answers in between."""
    recovering = attach(ERROR, accept_loss=True)
    again = transitions.reopen(recovering, ONE_AGAIN)
    assert again.attachment is not None
    assert (again.epoch, again.attachment.accept_loss) == (3, False)
    assert again.loss_epochs == (2,), "what was given up then is told by that epoch, and by no other"


def test_accepting_a_loss_holds_for_one_attempt() -> None:
    recovering = attach(ERROR, accept_loss=True)
    assert recovering.attachment is not None
    assert (recovering.attachment.accept_loss, recovering.epoch) == (True, 2)
    assert recovering.reason == "two disks are gone"
    served = transitions.opened(recovering, Epoch(2))
    assert served.attachment is not None
    assert (served.attachment.accept_loss, served.reason) == (False, "")
    assert served.loss_epochs == (2,)
    assert transitions.renew(served, ONE_AGAIN).loss_epochs == (2,), "later ones go by it"
    again = transitions.attach(recovering, ONE, read_only=False, force=True, accept_loss=True, now_ms=1)
    assert again.loss_epochs == (2, 3), "neither makes up for the other"
    assert phase_of(transitions.give_up(recovering, Epoch(2), "no quorum")) is Phase.AVAILABLE
    with pytest.raises(Conflict, match="--accept-loss"):
        attach(ERROR)
    with pytest.raises(Conflict):  # Never created: there is nothing to recover.
        attach(transitions.failed(CREATING, "no"), accept_loss=True)


def test_a_front_end_that_started_anew_while_attaching_gets_a_new_epoch() -> None:
    again = transitions.reopen(ATTACHING, ONE_AGAIN)
    assert again.attachment is not None
    assert (again.epoch, again.attachment.instance, phase_of(again)) == (2, "second", Phase.ATTACHING)
    assert transitions.reopen(again, ONE_AGAIN) == again
    assert transitions.reopen(ATTACHING, OTHER) == ATTACHING


def test_detaching_twice_and_cutting_off() -> None:
    assert transitions.detach(AVAILABLE) == AVAILABLE
    assert transitions.detach(DETACHING) == DETACHING
    for volume in (ATTACHING, ATTACHED, DETACHING):
        assert phase_of(transitions.cut_off(volume)) is Phase.AVAILABLE
    assert transitions.cut_off(AVAILABLE) == AVAILABLE


def test_waiting_is_told_only_while_creating() -> None:
    assert transitions.waiting(CREATING, "for a node").reason == "for a node"
    assert transitions.waiting(AVAILABLE, "for a node") == AVAILABLE


def test_a_resize_grows_the_last_segment() -> None:
    grown = transitions.resize(ATTACHED, 2 * GIB)
    assert (grown.size_bytes, grown.segments[-1].size_bytes, grown.attachment) == (
        2 * GIB,
        2 * GIB,
        ATTACHED.attachment,
    )
    for wrong in (GIB - BLOCK_SIZE, GIB + 1, 0):
        with pytest.raises(InvalidRequest):
            transitions.resize(AVAILABLE, wrong)


def test_read_only_stays_what_it_was() -> None:
    read_only = attach(AVAILABLE, read_only=True)
    assert read_only.attachment is not None
    assert read_only.attachment.state is AttachmentState.ATTACHING
    with pytest.raises(Conflict, match="read-only already"):
        attach(read_only)


@pytest.mark.parametrize(
    ("move", "advises_force"), [(transitions.delete, False), (lambda now: attach(now, OTHER), True)]
)
def test_only_who_attaches_is_told_of_force(move: Change, advises_force: bool) -> None:
    with pytest.raises(Conflict) as refused:
        move(ATTACHED)
    assert "detach it first" in str(refused.value)
    assert ("--force" in str(refused.value)) == advises_force
