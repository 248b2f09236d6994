"""By how much a replica is behind the others of its segment, as far as the words of their nodes tell.

While records are written, words of different times are no measure. So a replica is behind only where another one ended
beyond it in a word that is *older* than its own: then it lacked at that time what another one had had before. What is
said here may be out of date, and never wrong about the past; who serves a volume knows better.
"""

from collections.abc import Mapping

from blockstore.control.catalog import tombstones_of
from blockstore.control.presence import Presence
from blockstore.control.records import Segment, Volume
from blockstore.domain import Member, NodeId, ReplicaId
from blockstore.rpc.replica_pb2 import Position, ReplicaStatus


def lag_records(presence: Presence, segment: Segment, member: Member) -> int:
    """Records that it lacks; 0 where it lacks none, or nothing can be said."""
    word = presence.node(member.node)
    own = word.replicas.get(member.replica) if word and word.replicas else None
    if word is None or own is None:
        return 0
    others = (
        earlier.replicas.get(each.replica)
        for each in segment.configuration.members
        if (earlier := presence.node_before(each.node, word.heard_at)) and earlier.replicas
    )
    own_end = _place(own.end)
    longest = max((_place(each.end) for each in others if each), default=own_end)
    # At one sequence in an older epoch its last record differs.
    return max(1, longest[1] - own_end[1]) if longest > own_end else 0


def behind(presence: Presence, volume: Volume, statuses: Mapping[ReplicaId, ReplicaStatus]) -> frozenset[ReplicaId]:
    """The members of a detached volume that lack records. statuses: what the nodes that are up say of its replicas."""
    candidates = shorter(volume, statuses)  # of nearly all volumes there are none
    return frozenset(
        member.replica
        for segment in volume.segments
        for member in segment.configuration.members
        if member.replica in candidates and lag_records(presence, segment, member)
    )


def heard(here: Mapping[NodeId, Mapping[ReplicaId, ReplicaStatus]], volume: Volume) -> dict[ReplicaId, ReplicaStatus]:
    """What is said of its replicas, newcomers included. here: by the nodes that are up, of all that they have."""
    found = {}
    for each in tombstones_of(volume):
        replicas = here.get(each.node)
        if replicas and each.replica in replicas:
            found[each.replica] = replicas[each.replica]
    return found


def shorter(volume: Volume, statuses: Mapping[ReplicaId, ReplicaStatus]) -> frozenset[ReplicaId]:
    """The members that end before another one by their last words, of whatever times these are."""
    found = set[ReplicaId]()
    for segment in volume.segments:
        members = [each.replica for each in segment.configuration.members]
        ends = {each: _place(statuses[each].end) for each in members if each in statuses}
        longest = max(ends.values(), default=(0, 0))
        found.update(replica for replica, end in ends.items() if end < longest)
    return frozenset(found)


def _place(position: Position) -> tuple[int, int]:
    return position.epoch, position.sequence
