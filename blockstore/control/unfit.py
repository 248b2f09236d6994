"""Which members need more than their node can do: a front-end that brings them to be whole, or another replica. Pure.

    filling, damaged, behind     the front-end that serves the volume mends it; a detached volume is opened for that
    left out, two are damaged    nothing that is done to the member itself helps: another replica takes its place

A member is left out once it has committed what was given up with --accept-loss. Of two that are damaged neither is
emptied (docs/replication.md, rule 6), so one of them is replaced, by a replica that is filled beside it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final

from blockstore.control.records import Segment, Volume
from blockstore.domain import NodeId, ReplicaId
from blockstore.rpc.control_pb2 import MemberReport
from blockstore.rpc.replica_pb2 import ReplicaStatus

LEFT_OUT: Final = "left out"
DAMAGED: Final = "damaged"


def to_be_replaced(volume: Volume, reports: Iterable[MemberReport]) -> dict[ReplicaId, str]:
    """The members that nothing else helps, and why; by the word of the front-end that serves the volume."""
    said = {ReplicaId(each.replica): each for each in reports}
    found = {replica: LEFT_OUT for replica, each in said.items() if each.left_out}
    for segment in volume.segments:
        found |= dict.fromkeys(_blocked(segment, said), DAMAGED)
    members = {each.replica for segment in volume.segments for each in segment.configuration.members}
    return {replica: why for replica, why in found.items() if replica in members}


def _blocked(segment: Segment, said: Mapping[ReplicaId, MemberReport]) -> Iterator[ReplicaId]:
    """Damaged members of which none can be emptied while the others are; where there is one to fill a newcomer from."""
    members = [each.replica for each in segment.configuration.members]
    reports = [said[replica] for replica in members if replica in said]
    damaged = [ReplicaId(each.replica) for each in reports if each.damaged]
    sound = any(each.connected and each.whole and not each.damaged for each in reports)
    if sound and damaged and 2 * (len(members) - len(damaged)) <= len(members):
        yield from damaged


def are_alike(volume: Volume, here: Mapping[NodeId, Mapping[ReplicaId, ReplicaStatus]]) -> bool:
    """Whether all members that are here are whole and sound, and end at one position: then there is nothing to mend.

    So it is of nearly all volumes at nearly all times, and this is asked of each of a thousand in every pass: it builds
    nothing. here: what the nodes that are up say of their replicas.
    """
    for segment in volume.segments:
        end = None
        for member in segment.configuration.members:
            replicas = here.get(member.node)
            status = replicas.get(member.replica) if replicas else None
            if status is None:
                continue
            if not status.whole or status.damage:
                return False
            if end is None:
                end = status.end
            elif status.end != end:
                return False
    return True


def can_be_mended(volume: Volume, statuses: Mapping[ReplicaId, ReplicaStatus]) -> bool:
    """Whether a member of a detached volume is filling or damaged, and a front-end would make it good.

    That is where the others that are whole are a quorum, and each other segment has one. With fewer, whoever opens the
    volume may find that acknowledged writes are missing: that is for a person to begin.
    statuses: what the nodes that are up say of their replicas.
    """
    return _can_be_opened(volume, statuses) and any(
        (not each.whole or each.damage) and 2 * (_whole(here) - each.whole) > number
        for number, here in _segments(volume, statuses)
        for each in here.values()
    )


def can_catch_up(volume: Volume, statuses: Mapping[ReplicaId, ReplicaStatus], behind: Collection[ReplicaId]) -> bool:
    """Whether a whole member of a detached volume is behind, and enough are here to open it.

    It has everything up to where it ends, so it counts for the quorum that opens the volume. Until it has the rest, the
    loss of one more member may leave a single copy of the newest writes.
    """
    return _can_be_opened(volume, statuses) and any(
        each.whole and replica in behind for _, here in _segments(volume, statuses) for replica, each in here.items()
    )


def _can_be_opened(volume: Volume, statuses: Mapping[ReplicaId, ReplicaStatus]) -> bool:
    """Whether each segment has a quorum of whole members here: who opens a volume opens all of them."""
    return all(2 * _whole(here) > number for number, here in _segments(volume, statuses))


def _segments(
    volume: Volume, statuses: Mapping[ReplicaId, ReplicaStatus]
) -> Iterator[tuple[int, dict[ReplicaId, ReplicaStatus]]]:
    """Of each segment how many members it has, and those that are here."""
    for segment in volume.segments:
        members = [each.replica for each in segment.configuration.members]
        yield len(members), {each: statuses[each] for each in members if each in statuses}


def _whole(here: Mapping[ReplicaId, ReplicaStatus]) -> int:
    return sum(each.whole for each in here.values())
