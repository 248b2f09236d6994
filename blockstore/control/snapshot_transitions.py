"""How a snapshot moves from state to state: one table, and pure functions from record to record.

`pending` is two phases: before its content is fixed (sealing) and after (shipping). Every move goes
through `_move`, which looks it up in the table and raises Conflict where it is not there. Invariants:
a content that was fixed is never fixed anew; a snapshot that was completed keeps its root; one that
is in error can be shipped again only while its generation is pinned.
"""

from dataclasses import replace
from enum import Enum, auto
from typing import Any, Final

from blockstore.control.snapshot_records import MAX_REASON, Seal, Snapshot, SnapshotState, Statistics
from blockstore.domain import Position, SnapshotId
from blockstore.errors import AlreadyExists, Conflict, Fenced


class Phase(Enum):
    """A snapshot's state, pending in two parts."""

    SEALING = "not sealed yet"
    SHIPPING = "being shipped"
    COMPLETED = "completed"
    ERROR = "in error"
    DELETING = "being deleted"


class Move(Enum):
    """What may happen to a snapshot."""

    SEAL = auto()
    TRY_AGAIN = auto()
    GIVE_UP = auto()
    START = auto()
    COMPLETE = auto()
    FAIL = auto()
    RETRY = auto()
    UNPIN = auto()
    DELETE = auto()


#: The machine: move, phase before, phase after. What is not here is refused.
MOVES: Final[dict[tuple[Move, Phase], Phase]] = {
    (Move.SEAL, Phase.SEALING): Phase.SHIPPING,
    (Move.TRY_AGAIN, Phase.SEALING): Phase.SEALING,
    (Move.GIVE_UP, Phase.SEALING): Phase.ERROR,
    (Move.START, Phase.SHIPPING): Phase.SHIPPING,
    (Move.COMPLETE, Phase.SHIPPING): Phase.COMPLETED,
    (Move.FAIL, Phase.SHIPPING): Phase.ERROR,
    (Move.RETRY, Phase.ERROR): Phase.SHIPPING,
    (Move.UNPIN, Phase.COMPLETED): Phase.COMPLETED,
    **{
        (Move.DELETE, before): Phase.DELETING
        for before in (Phase.SHIPPING, Phase.COMPLETED, Phase.ERROR, Phase.DELETING)
    },
}

_STATES: Final = {
    Phase.SEALING: SnapshotState.PENDING,
    Phase.SHIPPING: SnapshotState.PENDING,
    Phase.COMPLETED: SnapshotState.COMPLETED,
    Phase.ERROR: SnapshotState.ERROR,
    Phase.DELETING: SnapshotState.DELETING,
}
_ADVICE: Final = {
    Phase.SEALING: "wait a moment, until it is sealed",
    Phase.SHIPPING: "wait until it is completed, or delete it",
    Phase.COMPLETED: "nothing is left to be done",
    Phase.ERROR: "see why with `cairn snapshot show`, then retry it, or delete it",
    Phase.DELETING: "it cannot be used any more",
}


def phase_of(snapshot: Snapshot) -> Phase:
    """Where `snapshot` is in the machine."""
    match snapshot.state:
        case SnapshotState.PENDING:
            return Phase.SHIPPING if snapshot.sealed_at_ms else Phase.SEALING
        case SnapshotState.COMPLETED:
            return Phase.COMPLETED
        case SnapshotState.ERROR:
            return Phase.ERROR
        case SnapshotState.DELETING:
            return Phase.DELETING


def sealed(
    snapshot: Snapshot,
    *,
    generation: int,
    position: Position,
    size_bytes: int,
    pause_us: int,
    now_ms: int,
    further: tuple[Seal, ...] = (),
) -> Snapshot:
    """Its content is fixed, and pinned.

    size_bytes: of the segments that were sealed, read after that. generation, position: of the first one's seal.
    further: the others' seals.
    """
    return _move(
        snapshot,
        Move.SEAL,
        generation=generation,
        seal_epoch=position.epoch,
        seal_sequence=position.sequence,
        further_seals=further,
        size_bytes=size_bytes,
        pause_us=pause_us,
        sealed_at_ms=now_ms,
        pinned=True,
    )


def tried(snapshot: Snapshot, sealed_as: SnapshotId) -> Snapshot:
    """A try of its barrier has failed; the seals of the next one have that name. Conflict where it was sealed."""
    return _move(snapshot, Move.TRY_AGAIN, tries=snapshot.tries + 1, sealed_as=sealed_as)


def given_up(snapshot: Snapshot, reason: str) -> Snapshot:
    """Its content will not be fixed. Conflict where it was, meanwhile."""
    return _move(snapshot, Move.GIVE_UP, reason=reason[:MAX_REASON])


def check_completed(snapshot: Snapshot) -> None:
    """Raises Conflict unless a volume can be made from it."""
    if phase_of(snapshot) is not Phase.COMPLETED:
        raise _refused(snapshot)


def is_readable(snapshot: Snapshot, *, again: bool = False) -> bool:
    """Whether its content is somewhere: in the object store, or in a generation that is pinned.

    again: for one who reads it already, and keeps a deleted one's content there by that.
    """
    if phase_of(snapshot) is Phase.DELETING:
        return again and bool(snapshot.root or snapshot.sealed_at_ms)
    return bool(snapshot.root) or snapshot.pinned


def started(snapshot: Snapshot, parent: str, *base_generations: int) -> Snapshot:
    """A daemon is to ship it as a change of `parent`, or whole where that is empty. Once for each try.

    base_generations: the parent's, of each segment that it has.
    """
    if snapshot.started:
        return snapshot
    first, *further = base_generations or (0,)
    return _move(
        snapshot,
        Move.START,
        touched=True,
        started=True,
        parent=parent,
        base_generation=first,
        further_bases=tuple(further),
    )


def completed(snapshot: Snapshot, root: str, statistics: Statistics, now_ms: int, *, retries: int) -> Snapshot:
    """It is whole in the object store. The same again changes nothing; AlreadyExists for another root.

    retries: which try it is the end of. Fenced where it was retried since, which may be as a change of another base:
    only that one stays in the object store until this is completed.
    """
    if phase_of(snapshot) is Phase.COMPLETED:
        if snapshot.root != root:
            raise AlreadyExists(f"snapshot {snapshot.id} is completed with the root {snapshot.root}, not {root}")
        return snapshot
    _check_try(snapshot, retries)
    return _move(snapshot, Move.COMPLETE, root=root, statistics=statistics, completed_at_ms=now_ms, reason="")


def failed(snapshot: Snapshot, reason: str, *, retries: int) -> Snapshot:
    """It could not be shipped by the try `retries`; in error already, it keeps its first reason.

    Fenced where it was retried since: what stopped an earlier try may not be in the way of this one.
    """
    if phase_of(snapshot) is Phase.ERROR:
        return snapshot
    _check_try(snapshot, retries)
    return _move(snapshot, Move.FAIL, reason=reason[:MAX_REASON])


def retried(snapshot: Snapshot) -> Snapshot:
    """It is shipped once more. One that is being shipped stays so; Conflict where it was never sealed."""
    if phase_of(snapshot) is Phase.SHIPPING:
        return snapshot
    if phase_of(snapshot) is Phase.ERROR and not snapshot.pinned:
        raise Conflict(
            f"snapshot {snapshot.id} was never sealed ({snapshot.reason}), and its instant is over: "
            "delete it and create another"
        )
    return _move(
        snapshot,
        Move.RETRY,
        reason="",
        retries=snapshot.retries + 1,
        started=False,
        parent="",
        base_generation=0,
        further_bases=(),
    )


def unpinned(snapshot: Snapshot) -> Snapshot:
    """Its generation is not needed as a base any more."""
    return _move(snapshot, Move.UNPIN, pinned=False)


def deleting(snapshot: Snapshot) -> Snapshot:
    """From here on it only goes away."""
    return _move(snapshot, Move.DELETE, pinned=False)


def _check_try(snapshot: Snapshot, retries: int) -> None:
    if phase_of(snapshot) is Phase.SHIPPING and snapshot.retries != retries:
        raise Fenced(f"snapshot {snapshot.id} was retried since (try {snapshot.retries}, not {retries}): begin anew")


def _move(snapshot: Snapshot, move: Move, **changes: Any) -> Snapshot:
    """`snapshot` after `move`, with `changes` and the state that belongs to its new phase."""
    before = phase_of(snapshot)
    after = MOVES.get((move, before))
    if after is None:
        raise _refused(snapshot)
    moved = replace(snapshot, state=_STATES[after], **changes)
    assert phase_of(moved) is after
    return moved


def _refused(snapshot: Snapshot) -> Conflict:
    phase = phase_of(snapshot)
    why = f" ({snapshot.reason})" if snapshot.reason else ""
    return Conflict(f"snapshot {snapshot.id} is {phase.value}{why}: {_ADVICE[phase]}")
