"""The steps of a change of members, from record to record (design, section 3, rule 7; docs/replication.md).

    enlist   a newcomer is to be filled, without a vote     -> dismiss, where it is not wanted any more
    join     it is a member, and quorums are of both sets   (the front-end of this epoch says that it is whole)
    settle   the old members count no more                  (it says that a record is on quorums of both)

Pure. Each step is one compare-and-swap of the record that holds the epoch. Those that rest on a front-end's
word name its epoch, and fail as Fenced where that has moved: what it said may be of a log that went on without it.
Stopping between any two of them leaves a volume that is served as before, or by quorums of both sets.
"""

from collections.abc import Callable
from dataclasses import replace

from blockstore.control.records import Segment, Tombstone, Volume
from blockstore.control.transitions import Phase, change_members, phase_of, place_of
from blockstore.domain import Configuration, Member, Replacement, ReplicaId, SegmentNumber
from blockstore.errors import Conflict, Fenced
from blockstore.units import Epoch


def enlist(volume: Volume, number: SegmentNumber, newcomer: Member, replaces: ReplicaId, reason: str) -> Volume:
    """One change at a time in a volume. Raises Conflict."""
    if any(is_changing(segment) for segment in volume.segments):
        raise Conflict(f"volume {volume.id} changes its members already")
    return _change(volume, number, lambda now: now.enlist(Replacement(newcomer, replaces, reason)))


def dismiss(volume: Volume, number: SegmentNumber, newcomer: ReplicaId) -> Volume:
    """The newcomer goes again. Raises Conflict where it is a member by now."""
    change = segment_of(volume, number).configuration.replacement
    if change is None or change.newcomer.replica != newcomer:
        raise Conflict(f"{newcomer} is no newcomer of volume {volume.id}")
    return _change(volume, number, Configuration.dismiss)


def join(volume: Volume, number: SegmentNumber, epoch: Epoch, newcomer: ReplicaId) -> Volume:
    """The newcomer becomes a member, on the word of the front-end that serves the volume in this epoch."""
    _check_epoch(volume, epoch)
    change = segment_of(volume, number).configuration.replacement
    if change is None or change.newcomer.replica != newcomer:
        raise Conflict(f"{newcomer} is no newcomer of volume {volume.id}")
    return _change(volume, number, Configuration.joint)


def settle(volume: Volume, number: SegmentNumber, epoch: Epoch, settled: int) -> Volume:
    """The old members go, on the word of the front-end that `settled` is the configuration that holds everything."""
    _check_epoch(volume, epoch)
    now = segment_of(volume, number).configuration
    if now.number != settled:
        raise Conflict(f"volume {volume.id} has configuration {now.number} by now, not {settled}")
    return _change(volume, number, Configuration.settle)


def left_by(before: Volume, after: Volume) -> list[Tombstone]:
    """The replicas that a step has left nobody in need of."""
    stay = {member for segment in after.segments for member in segment.configuration.everyone}
    return [
        Tombstone(member.replica, member.node, before.id, segment.number)
        for segment in before.segments
        for member in segment.configuration.everyone
        if member not in stay
    ]


def is_changing(segment: Segment) -> bool:
    """Whether a change of its members is under way."""
    return segment.configuration.is_changing


def is_movable(volume: Volume) -> bool:
    """Whether its state lets replicas move; not while it is opened, closed or deleted."""
    return phase_of(volume) in (Phase.AVAILABLE, Phase.ATTACHED)


def segment_of(volume: Volume, number: SegmentNumber) -> Segment:
    """Raises Conflict where there is none of that number."""
    for segment in volume.segments:
        if segment.number == number:
            return segment
    raise Conflict(f"volume {volume.id} has no segment {number}")


def _check_epoch(volume: Volume, epoch: Epoch) -> None:
    place = place_of(volume)
    if place is None or place.epoch != epoch:
        raise Fenced(f"volume {volume.id} was served in epoch {epoch}, and that is over (now {volume.epoch})")


def _change(volume: Volume, number: SegmentNumber, step: Callable[[Configuration], Configuration]) -> Volume:
    changed = tuple(
        replace(segment, configuration=step(segment.configuration)) if segment.number == number else segment
        for segment in volume.segments
    )
    return change_members(volume, changed)
