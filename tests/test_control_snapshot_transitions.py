"""The table of a snapshot's moves: what is in it happens, what is not is refused, and invariants hold."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from blockstore.control import snapshot_transitions as moves
from blockstore.control.codec import decode, encode
from blockstore.control.snapshot_records import Snapshot, SnapshotState, Statistics
from blockstore.control.snapshot_transitions import MOVES, Move, Phase, phase_of
from blockstore.domain import SnapshotId, VolumeId
from blockstore.errors import AlreadyExists, Conflict

ROOT = "ab" * 32
NEW = Snapshot(
    SnapshotId("snap-00000000000000001"), VolumeId("vol-00000000000000001"), "v", 4096, SnapshotState.PENDING, 5
)
SEALED = moves.sealed(NEW, generation=3, size_bytes=8192, pause_us=7, now_ms=9)
COMPLETED = moves.completed(SEALED, ROOT, Statistics(1, 2, 3, 4), 11)
FAILED = moves.failed(SEALED, "no room")

EXAMPLES: dict[Phase, Snapshot] = {
    Phase.SEALING: NEW,
    Phase.SHIPPING: SEALED,
    Phase.COMPLETED: COMPLETED,
    Phase.ERROR: FAILED,
    Phase.DELETING: moves.deleting(COMPLETED),
}
WAYS: dict[Move, Callable[[Snapshot], Snapshot]] = {
    Move.SEAL: lambda now: moves.sealed(now, generation=4, size_bytes=1, pause_us=2, now_ms=3),
    Move.GIVE_UP: lambda now: moves.given_up(now, "late"),
    Move.START: lambda now: moves.started(now, "snap-0", 2),
    Move.COMPLETE: lambda now: moves.completed(now, ROOT, Statistics(), 3),
    Move.FAIL: lambda now: moves.failed(now, "why"),
    Move.RETRY: moves.retried,
    Move.UNPIN: moves.unpinned,
    Move.DELETE: moves.deleting,
}
#: A call that may be made twice: the second time nothing changes.
AGAIN = {(Move.COMPLETE, Phase.COMPLETED), (Move.FAIL, Phase.ERROR), (Move.RETRY, Phase.SHIPPING)}


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("move", Move)
def test_each_move_from_each_phase(move: Move, phase: Phase) -> None:
    before = EXAMPLES[phase]
    assert phase_of(before) is phase
    if (move, phase) in MOVES:
        assert phase_of(WAYS[move](before)) is MOVES[move, phase]
    elif (move, phase) in AGAIN:
        assert WAYS[move](before) == before
    else:
        with pytest.raises(Conflict, match=phase.value):
            WAYS[move](before)


def test_a_content_that_was_fixed_is_not_given_up_by_whoever_comes_late() -> None:
    with pytest.raises(Conflict):
        moves.given_up(SEALED, "control was restarted")


def test_sealing_pins_and_only_giving_up_deleting_or_a_newer_one_unpins() -> None:
    assert (NEW.pinned, SEALED.pinned, COMPLETED.pinned, FAILED.pinned) == (False, True, True, True)
    assert not moves.deleting(COMPLETED).pinned
    assert not moves.unpinned(COMPLETED).pinned


def test_a_retry_chooses_its_base_anew_and_takes_what_was_never_sealed_as_lost() -> None:
    started = moves.started(SEALED, "snap-0", 2)
    assert moves.started(started, "snap-1", 1) == started  # Once for each try.
    again = moves.retried(moves.failed(started, "no room"))
    assert (again.started, again.touched, again.parent, again.base_generation) == (False, True, "", 0)
    assert again.reason == ""
    with pytest.raises(Conflict, match="never sealed"):
        moves.retried(moves.given_up(NEW, "late"))


def test_a_completed_one_keeps_its_root() -> None:
    with pytest.raises(AlreadyExists, match="root"):
        moves.completed(COMPLETED, "cd" * 32, Statistics(), 12)


@pytest.mark.parametrize("phase", Phase)
def test_a_record_is_read_as_it_was_written(phase: Phase) -> None:
    record = replace(EXAMPLES[phase], tags={"k": "v"}, description="d")
    assert decode(Snapshot, encode(record)) == record
