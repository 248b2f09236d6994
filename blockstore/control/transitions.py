"""How a volume moves from state to state: one table, and pure functions from record to record.

EBS's states of a volume and of its attachment are one machine here: `in-use` is three phases. Every
move goes through `_move`, which looks it up in the table and raises Conflict where it is not there.
Invariants: the epoch grows with every attachment and renewal, and never falls; a move that ends
what one epoch began names that epoch, and fails as Fenced where it has moved on.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Final

from blockstore.control.records import (
    Attachment,
    AttachmentState,
    FrontEnd,
    Growing,
    Maintenance,
    MaintenanceState,
    Segment,
    Volume,
    check_size,
)
from blockstore.domain import FrontEndId, VolumeState
from blockstore.errors import Conflict, Fenced, InvalidRequest
from blockstore.units import Epoch


class Phase(Enum):
    """A volume's state, with its attachment's where it is in use."""

    CREATING = "being created"
    AVAILABLE = "not attached"
    ATTACHING = "being attached"
    ATTACHED = "attached"
    DETACHING = "being detached"
    DELETING = "being deleted"
    ERROR = "in error"


class Move(Enum):
    """What may happen to a volume."""

    CREATED = auto()
    PLACE_ANEW = auto()
    FAIL = auto()
    ATTACH = auto()
    TAKE_OVER = auto()
    RECOVER = auto()
    REOPEN = auto()
    OPENED = auto()
    GIVE_UP = auto()
    LOSE = auto()
    RENEW = auto()
    DETACH = auto()
    DETACHED = auto()
    DELETE = auto()
    RESIZE = auto()
    MAINTAIN = auto()
    END_MAINTENANCE = auto()
    SNAPSHOT = auto()
    HYDRATED = auto()
    MEMBERS = auto()


_IN_USE: Final = (Phase.ATTACHING, Phase.ATTACHED, Phase.DETACHING)

#: The machine: move, phase before, phase after. What is not here is refused.
MOVES: Final[dict[tuple[Move, Phase], Phase]] = {
    (Move.CREATED, Phase.CREATING): Phase.AVAILABLE,
    (Move.PLACE_ANEW, Phase.CREATING): Phase.CREATING,
    (Move.FAIL, Phase.CREATING): Phase.ERROR,
    (Move.ATTACH, Phase.AVAILABLE): Phase.ATTACHING,
    **{(Move.TAKE_OVER, before): Phase.ATTACHING for before in (Phase.AVAILABLE, *_IN_USE)},
    (Move.RECOVER, Phase.ERROR): Phase.ATTACHING,
    (Move.OPENED, Phase.ATTACHING): Phase.ATTACHED,
    (Move.GIVE_UP, Phase.ATTACHING): Phase.AVAILABLE,
    # An available one: under maintenance.
    **{(Move.LOSE, before): Phase.ERROR for before in (Phase.AVAILABLE, Phase.ATTACHING, Phase.ATTACHED)},
    (Move.REOPEN, Phase.ATTACHING): Phase.ATTACHING,
    (Move.RENEW, Phase.ATTACHED): Phase.ATTACHED,
    **{(Move.DETACH, before): Phase.DETACHING for before in _IN_USE},
    (Move.DETACHED, Phase.DETACHING): Phase.AVAILABLE,
    **{
        (Move.DELETE, before): Phase.DELETING
        for before in (Phase.CREATING, Phase.AVAILABLE, Phase.ERROR, Phase.DELETING)
    },
    **{(Move.RESIZE, same): same for same in (Phase.AVAILABLE, *_IN_USE)},
    (Move.MAINTAIN, Phase.AVAILABLE): Phase.AVAILABLE,
    (Move.END_MAINTENANCE, Phase.AVAILABLE): Phase.AVAILABLE,
    **{
        (move, same): same
        for move in (Move.SNAPSHOT, Move.HYDRATED, Move.MEMBERS)
        for same in (Phase.AVAILABLE, *_IN_USE)
    },
}

_STATES: Final[dict[Phase, tuple[VolumeState, AttachmentState | None]]] = {
    Phase.CREATING: (VolumeState.CREATING, None),
    Phase.AVAILABLE: (VolumeState.AVAILABLE, None),
    Phase.ATTACHING: (VolumeState.IN_USE, AttachmentState.ATTACHING),
    Phase.ATTACHED: (VolumeState.IN_USE, AttachmentState.ATTACHED),
    Phase.DETACHING: (VolumeState.IN_USE, AttachmentState.DETACHING),
    Phase.DELETING: (VolumeState.DELETING, None),
    Phase.ERROR: (VolumeState.ERROR, None),
}
_PHASES: Final = {states: phase for phase, states in _STATES.items()}

_ADVICE: Final = {
    Phase.CREATING: "wait until it is available",
    Phase.ATTACHING: "detach it first",
    Phase.ATTACHED: "detach it first",
    Phase.DETACHING: "wait until it is available, or detach it with --force",
    Phase.DELETING: "it cannot be used any more",
    Phase.ERROR: "see why with `cairn volume show`, then recover it with --accept-loss, or delete it",
    Phase.AVAILABLE: "attach it first",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a volume is served, for a user or for control itself."""

    front_end: FrontEndId
    epoch: Epoch


def phase_of(volume: Volume) -> Phase:
    """Where `volume` is in the machine."""
    return _PHASES[volume.state, volume.attachment.state if volume.attachment else None]


def created(volume: Volume, segments: tuple[Segment, ...]) -> Volume:
    """All replicas of these segments exist. Conflict where they have been placed anew meanwhile."""
    if volume.segments != segments:
        raise Conflict(f"the replicas of volume {volume.id} have been placed anew: these are others")
    return _move(volume, Move.CREATED, reason="")


def place_anew(volume: Volume, segments: tuple[Segment, ...]) -> Volume:
    """Other replicas are to be created in place of those before, for which nothing was ever acknowledged."""
    assert [each.size_bytes for each in segments] == [each.size_bytes for each in volume.segments]
    return _move(volume, Move.PLACE_ANEW, segments=segments, reason="")


def waiting(volume: Volume, reason: str) -> Volume:
    """What a volume that is being created waits for."""
    return replace(volume, reason=reason) if phase_of(volume) is Phase.CREATING else volume


def failed(volume: Volume, reason: str) -> Volume:
    """A replica cannot be made, and trying again would not help."""
    return _move(volume, Move.FAIL, reason=reason)


def attach(
    volume: Volume,
    front_end: FrontEnd,
    *,
    read_only: bool,
    force: bool,
    accept_loss: bool,
    now_ms: int,
    client: str = "",
) -> Volume:
    """A new epoch for `front_end`. What is attached there already in the same way stays as it is.

    force: from another front-end too. accept_loss: also out of `error`, if it ever was attached.
    client: the host that it is for. Nobody takes it from another one without force; its own host moves it from
    front-end to front-end as it likes.
    """
    now = volume.attachment
    if now and now.client != client and not force:
        raise Conflict(
            f"volume {volume.id} is attached for {_whom(now.client)}, not for {_whom(client)}: detach it first, or "
            "take it over with --force"
        )
    moves = bool(client) and now is not None and now.front_end != front_end.id
    if now and now.state is not AttachmentState.DETACHING and not force and now.front_end == front_end.id:
        if now.read_only == read_only:
            return volume
        raise Conflict(f"volume {volume.id} is attached {_mode(now.read_only)} already: detach it first")
    epoch = Epoch(volume.epoch + 1)
    attachment = Attachment(
        front_end.id, front_end.instance, epoch, AttachmentState.ATTACHING, read_only, now_ms, accept_loss, client
    )
    move = Move.TAKE_OVER if force or moves else Move.ATTACH
    if accept_loss and phase_of(volume) is Phase.ERROR and volume.epoch > 0:
        move = Move.RECOVER
    loss_epochs = (*volume.loss_epochs, epoch) if accept_loss else volume.loss_epochs
    return _move(volume, move, epoch=epoch, attachment=attachment, loss_epochs=loss_epochs)


def reopen(volume: Volume, front_end: FrontEnd) -> Volume:
    """A new epoch for a front-end that started anew before it had opened the volume, as far as control heard.

    It accepts no loss any more: the one before may have served, and what it acknowledged nobody has given up.
    """
    now = volume.attachment
    if now is None or now.front_end != front_end.id or now.instance == front_end.instance:
        return volume
    epoch = Epoch(volume.epoch + 1)
    reopened = replace(now, epoch=epoch, instance=front_end.instance, accept_loss=False)
    return _move(volume, Move.REOPEN, epoch=epoch, attachment=reopened)


def opened(volume: Volume, epoch: Epoch) -> Volume:
    """The front-end serves the volume in this epoch."""
    now = _check_epoch(volume, epoch)
    if phase_of(volume) is Phase.ATTACHED:
        return replace(volume, reason="")
    return _move(volume, Move.OPENED, reason="", attachment=replace(now, accept_loss=False))


def give_up(volume: Volume, epoch: Epoch, reason: str) -> Volume:
    """The front-end could not open the volume; the next attempt looks afresh at what its members hold."""
    _check_epoch(volume, epoch)
    return _move(volume, Move.GIVE_UP, reason=reason)


def forget_reason(volume: Volume, epoch: Epoch) -> Volume:
    """Why an attach failed is out of date. It stays where somebody has tried again since, or has the volume now."""
    is_same = phase_of(volume) is Phase.AVAILABLE and volume.epoch == epoch
    return replace(volume, reason="") if is_same else volume


def lost(volume: Volume, epoch: Epoch, reason: str) -> Volume:
    """Acknowledged records may be missing: only an attach that accepts the loss goes on."""
    if volume.attachment:
        _check_epoch(volume, epoch)
    else:
        _check_maintenance(volume, epoch)
    return _move(volume, Move.LOSE, reason=reason)


def renew(volume: Volume, front_end: FrontEnd) -> Volume:
    """A new epoch for the front-end that has the volume. Fenced where it has it no more, or not yet.

    While a volume is being attached, control alone makes the attempts: it has to say how they ended.
    """
    now = volume.attachment
    if now is None or now.front_end != front_end.id or phase_of(volume) is not Phase.ATTACHED:
        raise Fenced(f"volume {volume.id} is not attached to {front_end.id}")
    epoch = Epoch(volume.epoch + 1)
    renewed = replace(now, epoch=epoch, instance=front_end.instance)
    return _move(volume, Move.RENEW, epoch=epoch, attachment=renewed)


def detach(volume: Volume) -> Volume:
    """The front-end is to close the volume. One that is detached stays so."""
    return volume if phase_of(volume) is Phase.AVAILABLE else _move(volume, Move.DETACH)


def cut_off(volume: Volume) -> Volume:
    """Detached without the front-end's word: the next attachment's epoch fences it."""
    closing = detach(volume)
    return detached(closing, closing.attachment.epoch) if closing.attachment else closing


def detached(volume: Volume, epoch: Epoch) -> Volume:
    """The front-end has closed it."""
    _check_epoch(volume, epoch)
    return _move(volume, Move.DETACHED)


def delete(volume: Volume) -> Volume:
    """From here on it only goes away."""
    return _move(volume, Move.DELETE)


def check_resize(volume: Volume, size_bytes: int) -> None:
    """Raises InvalidRequest for a smaller size than now, Conflict where its state allows none, or another one."""
    check_size(size_bytes)
    if size_bytes < volume.size_bytes:
        raise InvalidRequest(
            f"volume {volume.id} has {volume.size_bytes} bytes and cannot shrink to {size_bytes}: volumes only grow"
        )
    if volume.growing and volume.growing.size_bytes != size_bytes:
        raise Conflict(
            f"volume {volume.id} is being enlarged to {volume.growing.size_bytes} bytes: wait until it is, "
            "see `cairn volume show`"
        )
    _move(volume, Move.RESIZE)


def resize(volume: Volume, size_bytes: int) -> Volume:
    """Grow the last segment. Raises as check_resize does."""
    check_resize(volume, size_bytes)
    *others, last = volume.segments
    grown = replace(last, size_bytes=last.size_bytes + size_bytes - volume.size_bytes)
    return _move(volume, Move.RESIZE, size_bytes=size_bytes, segments=(*others, grown))


def begin_growth(volume: Volume, growing: Growing) -> Volume:
    """Its further segments are to be created, instead of those of an earlier plan. Raises as check_resize does."""
    check_resize(volume, growing.size_bytes)
    return _move(volume, Move.RESIZE, growing=growing, maintenance=volume.maintenance)


def grown(volume: Volume, growing: Growing) -> Volume:
    """All replicas of its further segments exist: from here on they belong to it. Conflict where these are others."""
    if volume.growing != growing:
        raise Conflict(f"volume {volume.id} is not being enlarged in this way any more")
    *others, last = volume.segments
    segments = (*others, replace(last, size_bytes=growing.last_size_bytes), *growing.segments)
    assert sum(each.size_bytes for each in segments) == growing.size_bytes
    return _move(volume, Move.RESIZE, size_bytes=growing.size_bytes, segments=segments, growing=None)


def maintain(volume: Volume, front_end: FrontEnd) -> Volume:
    """A new epoch for `front_end`, for control's own work. Conflict unless it is free."""
    if volume.maintenance:
        raise Conflict(f"volume {volume.id} is open for maintenance at {volume.maintenance.front_end} already")
    epoch = Epoch(volume.epoch + 1)
    begun = Maintenance(front_end.id, front_end.instance, epoch, MaintenanceState.OPENING)
    return _move(volume, Move.MAINTAIN, epoch=epoch, maintenance=begun)


def maintained(volume: Volume, epoch: Epoch) -> Volume:
    """The front-end has it open for maintenance in this epoch."""
    now = _check_maintenance(volume, epoch)
    return _move(volume, Move.MAINTAIN, reason="", maintenance=replace(now, state=MaintenanceState.OPEN))


def end_maintenance(volume: Volume, epoch: Epoch) -> Volume:
    """Its work is done, or its front-end does not do it. Fenced where a user's request ended it before."""
    _check_maintenance(volume, epoch)
    return _move(volume, Move.END_MAINTENANCE)


def check_snapshot(volume: Volume) -> None:
    """Raises Conflict where its state allows no snapshot."""
    _move(volume, Move.SNAPSHOT)


def hydrated(volume: Volume, epoch: Epoch) -> Volume:
    """A committed record of this epoch says that it needs its source no more."""
    if place_epoch(volume) != epoch:
        raise Fenced(f"volume {volume.id} was served in epoch {epoch}, and that is over (now {volume.epoch})")
    return _move(volume, Move.HYDRATED, source=None, maintenance=volume.maintenance)


def change_members(volume: Volume, segments: tuple[Segment, ...]) -> Volume:
    """The same segments with other configurations (blockstore/control/membership.py)."""
    return _move(volume, Move.MEMBERS, segments=segments, maintenance=volume.maintenance)


def place_epoch(volume: Volume) -> Epoch | None:
    """Of its attachment, or else of its maintenance; also while it is being opened."""
    held = volume.attachment or volume.maintenance
    return held.epoch if held else None


def place_of(volume: Volume) -> Place | None:
    """Where it is served now; None while it is being opened or closed, and while nobody has it."""
    if volume.attachment:
        attached = volume.attachment.state is AttachmentState.ATTACHED
        return Place(volume.attachment.front_end, volume.attachment.epoch) if attached else None
    if volume.maintenance and volume.maintenance.state is MaintenanceState.OPEN:
        return Place(volume.maintenance.front_end, volume.maintenance.epoch)
    return None


def _move(volume: Volume, move: Move, **changes: Any) -> Volume:
    """`volume` after `move`, with `changes` and the states that belong to its new phase.

    Maintenance ends with it, unless it is among the changes.
    """
    before = phase_of(volume)
    after = MOVES.get((move, before))
    if after is None:
        where = f" to {volume.attachment.front_end}" if volume.attachment else ""
        raise Conflict(f"volume {volume.id} is {before.value}{where}: {_advice(move, before)}")
    state, attachment_state = _STATES[after]
    attachment = changes.pop("attachment", volume.attachment)
    assert attachment_state is None or attachment is not None
    kept = replace(attachment, state=attachment_state) if attachment and attachment_state else None
    maintenance = changes.pop("maintenance", None)
    moved = replace(volume, state=state, attachment=kept, maintenance=maintenance, **changes)
    assert phase_of(moved) is after
    assert moved.epoch >= volume.epoch
    return moved


def _advice(move: Move, before: Phase) -> str:
    """What to do where `move` is refused: only an attach can take a volume over."""
    takes_over = move is Move.ATTACH and before in (Phase.ATTACHING, Phase.ATTACHED)
    return _ADVICE[before] + (", or take it over with --force" if takes_over else "")


def _check_epoch(volume: Volume, epoch: Epoch) -> Attachment:
    if volume.attachment is None or volume.attachment.epoch != epoch:
        raise Fenced(f"volume {volume.id} was attached in epoch {epoch}, and that is over (now {volume.epoch})")
    return volume.attachment


def _check_maintenance(volume: Volume, epoch: Epoch) -> Maintenance:
    if volume.maintenance is None or volume.maintenance.epoch != epoch:
        raise Fenced(f"the maintenance of volume {volume.id} in epoch {epoch} is over (now {volume.epoch})")
    return volume.maintenance


def _whom(client: str) -> str:
    return f"client {client}" if client else "any NBD client"


def _mode(read_only: bool) -> str:
    return "read-only" if read_only else "for writing"
