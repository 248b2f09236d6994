"""What a leader does where members say that they are full, judged by what each of them said last.

- a write is refused for lack of room only where the members that are here are a quorum, and those of them that have
  room would be none even with all who have been away for a short time;
- none is held while a quorum of whole members that are here has room;
- nothing that needs room becomes a record while there is no such quorum, and somebody is full.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blockstore.domain import ORIGIN, Position, ReplicaId
from blockstore.errors import CairnError, NoSpace
from blockstore.record import OperationKind
from tests.simulation.violation import expect

if TYPE_CHECKING:
    from tests.simulation.front_end import FrontEnd

_NEEDS_ROOM = {OperationKind.WRITE, OperationKind.ZERO, OperationKind.FILL}


@dataclass(slots=True)
class _Seen:
    """Of one leader. away_since: by its clock, who is not here or not whole. end: of its log, at the last step."""

    away_since: dict[ReplicaId, float] = field(default_factory=dict)
    end: Position = ORIGIN
    enough: bool = True


class RoomChecker:
    """Told of each step of each leader, and of each request that fails."""

    def __init__(self) -> None:
        self._leaders: dict[int, _Seen] = {}

    def leader_stepped(self, front_end: "FrontEnd") -> None:
        seen = self._leaders.setdefault(front_end.epoch, _Seen())
        leader = front_end.leader
        for member in leader._members.values():
            if member.sealed and member.whole:
                seen.away_since.pop(member.replica, None)
            else:
                seen.away_since.setdefault(member.replica, front_end.clock())
        full, with_room = _full(front_end), _with_room(front_end)
        enough = not full or _is_quorum(front_end, with_room)
        held = leader._requests.held_count
        front_end.world.seen["held for room"] += held
        expect(not held or not enough, f"{front_end.name} holds {held} requests, and {with_room} have room")
        before, seen.end = seen.end, leader._log.end
        if not enough and not seen.enough and before.epoch == seen.end.epoch:
            for record in leader._log._run.between(max(before.sequence, leader._log.start.sequence), seen.end.sequence):
                needy = [each.kind.name for each in record.operations if each.kind in _NEEDS_ROOM]
                expect(not needy, f"{record.position} has {needy}, and only {with_room} have room, not {full}")
        seen.enough = enough

    def failed(self, front_end: "FrontEnd", error: CairnError) -> None:
        if not isinstance(error, NoSpace):
            return
        here = {member.replica for member in front_end.leader._members.values() if member.sealed}
        patience_s = front_end.world.plan.settings.retry_limit_s
        since = self._leaders[front_end.epoch].away_since
        soon = {replica for replica, at in since.items() if front_end.clock() - at < patience_s}
        hoped = _with_room(front_end) | (soon - _full(front_end))
        expect(_is_quorum(front_end, here), f"{front_end.name}: no space, and only {here} are here")
        expect(not _is_quorum(front_end, hoped), f"{front_end.name}: no space, and {hoped} may have some soon")


def _full(front_end: "FrontEnd") -> set[ReplicaId]:
    voters = [each.replica for sets in _sets(front_end) for each in sets]
    members = front_end.leader._members
    return {replica for replica in voters if members[replica].sealed and members[replica].full}


def _with_room(front_end: "FrontEnd") -> set[ReplicaId]:
    members = front_end.leader._members.values()
    return {each.replica for each in members if each.sealed and each.whole and not each.full}


def _is_quorum(front_end: "FrontEnd", replicas: set[ReplicaId]) -> bool:
    return all(2 * sum(each.replica in replicas for each in members) > len(members) for members in _sets(front_end))


def _sets(front_end: "FrontEnd") -> list[tuple]:  # type: ignore[type-arg]
    configuration = front_end.leader.configuration
    return [members for members in (configuration.members, configuration.old_members) if members]
