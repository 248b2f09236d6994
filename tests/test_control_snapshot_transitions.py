"""The table of a snapshot's moves: what is in it happens, what is not is refused, and invariants hold."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from blockstore.control import snapshot_transitions as moves
from blockstore.control import transitions
from blockstore.control.codec import decode, encode
from blockstore.control.records import Maintenance, MaintenanceState, Source, Volume
from blockstore.control.shipping import newest_before, next_of_each_volume
from blockstore.control.snapshot_index import SnapshotIndex
from blockstore.control.snapshot_records import Snapshot, SnapshotState, Statistics
from blockstore.control.snapshot_transitions import MOVES, Move, Phase, phase_of
from blockstore.domain import ORIGIN, FrontEndId, SnapshotId, VolumeId, VolumeState
from blockstore.errors import AlreadyExists, Conflict, Fenced
from blockstore.units import Epoch

ROOT = "ab" * 32
NEW = Snapshot(
    SnapshotId("snap-00000000000000001"), VolumeId("vol-00000000000000001"), "v", 4096, SnapshotState.PENDING, 5
)
SEALED = moves.sealed(NEW, generation=3, position=ORIGIN, size_bytes=8192, pause_us=7, now_ms=9)
COMPLETED = moves.completed(SEALED, ROOT, Statistics(1, 2, 3, 4), 11, retries=0)
FAILED = moves.failed(SEALED, "no room", retries=0)

EXAMPLES: dict[Phase, Snapshot] = {
    Phase.SEALING: NEW,
    Phase.SHIPPING: SEALED,
    Phase.COMPLETED: COMPLETED,
    Phase.ERROR: FAILED,
    Phase.DELETING: moves.deleting(COMPLETED),
}
WAYS: dict[Move, Callable[[Snapshot], Snapshot]] = {
    Move.SEAL: lambda now: moves.sealed(now, generation=4, position=ORIGIN, size_bytes=1, pause_us=2, now_ms=3),
    Move.TRY_AGAIN: lambda now: moves.tried(now, SnapshotId("snap-1")),
    Move.GIVE_UP: lambda now: moves.given_up(now, "late"),
    Move.START: lambda now: moves.started(now, "snap-0", 2),
    Move.COMPLETE: lambda now: moves.completed(now, ROOT, Statistics(), 3, retries=0),
    Move.FAIL: lambda now: moves.failed(now, "why", retries=0),
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
    again = moves.retried(moves.failed(started, "no room", retries=0))
    assert (again.started, again.touched, again.parent, again.base_generation) == (False, True, "", 0)
    assert again.reason == ""
    with pytest.raises(Conflict, match="never sealed"):
        moves.retried(moves.given_up(NEW, "late"))


def test_a_completed_one_keeps_its_root() -> None:
    with pytest.raises(AlreadyExists, match="root"):
        moves.completed(COMPLETED, "cd" * 32, Statistics(), 12, retries=0)


@pytest.mark.parametrize("phase", Phase)
def test_a_record_is_read_as_it_was_written(phase: Phase) -> None:
    record = replace(EXAMPLES[phase], tags={"k": "v"}, description="d")
    assert decode(Snapshot, encode(record)) == record


# ---- in which order, and as a change of what


def of_volume(number: int, generation: int, **changes: Any) -> Snapshot:
    """A sealed snapshot of one volume."""
    named = replace(NEW, id=SnapshotId(f"snap-{number:017x}"))
    sealed = moves.sealed(named, generation=generation, position=ORIGIN, size_bytes=4096, pause_us=0, now_ms=1)
    return replace(sealed, **changes)


def done(number: int, generation: int, **changes: Any) -> Snapshot:
    return replace(moves.completed(of_volume(number, generation), ROOT, Statistics(), 2, retries=0), **changes)


def test_a_base_is_the_newest_completed_one_before_it_that_is_pinned() -> None:
    snapshot = of_volume(9, 5)
    assert newest_before(snapshot, [done(1, 1), done(2, 3), snapshot]) == done(2, 3)
    assert newest_before(snapshot, [done(1, 1), done(2, 3, pinned=False)]) == done(1, 1)
    assert newest_before(snapshot, [done(1, 7), of_volume(2, 4)]) is None
    assert newest_before(snapshot, [done(1, 1, volume=VolumeId("vol-00000000000000002"))]) is None


def test_a_base_is_none_from_before_a_loss_was_accepted() -> None:
    """Its seal may be among what was given up, and its generation another one by now."""
    earlier, later = done(1, 1, seal_epoch=3), done(2, 2, seal_epoch=6)
    snapshot = replace(of_volume(9, 5), seal_epoch=7)
    for losses, base in (((), later), ((Epoch(5),), later), ((Epoch(3),), later), ((Epoch(7),), None)):
        assert newest_before(snapshot, [earlier, later], losses) == base
    assert newest_before(snapshot, [earlier], (Epoch(4), Epoch(9))) is None


def test_of_a_volume_what_was_started_goes_on_and_else_the_oldest_content_is_first() -> None:
    first, second = of_volume(2, 1), of_volume(1, 2)
    assert next_of_each_volume([second, first]) == [first]
    assert next_of_each_volume([first, replace(second, started=True)]) == [replace(second, started=True)]
    other = of_volume(3, 1, volume=VolumeId("vol-00000000000000002"))
    assert next_of_each_volume([first, other, done(4, 1)]) == [first, other]


def test_only_the_newest_completed_one_of_a_volume_stays_pinned() -> None:
    old, new, other = done(1, 1), done(2, 2), done(3, 1, volume=VolumeId("vol-00000000000000002"))
    assert SnapshotIndex((new, old, other, of_volume(4, 3))).superseded() == [old]
    assert SnapshotIndex((new, replace(old, pinned=False))).superseded() == []
    assert SnapshotIndex((of_volume(1, 1), new)).superseded() == []  # In its turn to be shipped, also after a retry.


def test_hydrated_counts_for_the_present_epoch_only() -> None:
    source = Source(SnapshotId("snap-00000000000000001"), ROOT, 4096)
    held = Maintenance(FrontEndId("fe-00000000000000001"), "i", Epoch(4), MaintenanceState.OPEN)
    volume = Volume(NEW.volume, "v", 4096, VolumeState.AVAILABLE, 0, (), Epoch(4), source=source, maintenance=held)
    with pytest.raises(Fenced):
        transitions.hydrated(volume, Epoch(3))
    with pytest.raises(Fenced):
        transitions.hydrated(replace(volume, maintenance=None), Epoch(4))
    after = transitions.hydrated(volume, Epoch(4))
    assert (after.source, after.maintenance) == (None, held)
