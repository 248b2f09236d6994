"""Whether new writes may become records: a quorum has room for them, or may have it soon, or has none (Space).

A member counts where it is here, whole, and not short of space. Invariants:
- writes are refused only where the members that are here are a quorum, and nobody who is away for a short time could
  make one of those that have room;
- where no member says that it is full, nothing is held or refused: a quorum that is missing is another matter.
Source: docs/replication.md, Space.
"""

from collections.abc import Mapping
from enum import Enum, auto

from blockstore.domain import Configuration, ReplicaId
from blockstore.replication.member import Member
from blockstore.replication.quorum import Quorum


class Room(Enum):
    """For what needs room: it goes on, it waits for who is away, it is refused."""

    ENOUGH = auto()
    AWAITED = auto()
    NONE = auto()


class QuorumRoom:
    """room: as of the last look. patience_s: who is away for longer is not waited for any more."""

    def __init__(
        self, configuration: Configuration, members: Mapping[ReplicaId, Member], patience_s: float, now: float
    ) -> None:
        self.room = Room.ENOUGH
        self._members = members
        self._patience_s = patience_s
        #: Since when a voter cannot be counted on, be it away or not whole.
        self._away_since: dict[ReplicaId, float] = {}
        self.count(configuration, now)

    def count(self, configuration: Configuration, now: float) -> None:
        """These are the voters from now on; to be followed by a look."""
        self._quorum = Quorum(configuration)
        self._node_of = {each.replica: each.node for each in configuration.everyone}
        self._away_since = {voter: self._away_since.get(voter, now) for voter in self._quorum.replicas}

    def look(self, now: float) -> bool:
        """Whether the room is another one now. For when a member comes, goes, or says that it is (not) full."""
        before, self.room = self.room, self._judge(now)
        return self.room is not before

    def _judge(self, now: float) -> Room:
        voters = [self._members[replica] for replica in self._quorum.replicas]
        for voter in voters:
            if _counts(voter):
                self._away_since.pop(voter.replica, None)
            else:
                self._away_since.setdefault(voter.replica, now)
        here = [voter.replica for voter in voters if voter.sealed]
        full = {voter.replica for voter in voters if voter.sealed and voter.full}
        away = {replica for replica, since in self._away_since.items() if now - since < self._patience_s}
        have_room = {voter.replica for voter in voters if _counts(voter)} - full
        if not full or self._quorum.reached(have_room):
            return Room.ENOUGH
        if not self._quorum.reached(here) or self._quorum.reached(have_room | (away - full)):
            return Room.AWAITED
        return Room.NONE

    def why(self) -> str:
        """Who has no room and who is not here, by node, for people; empty where all are here and have room."""
        voters = [self._members[replica] for replica in self._quorum.replicas]
        kinds = {
            "full": [voter for voter in voters if voter.sealed and voter.full],
            "away": [voter for voter in voters if not voter.sealed],
            "not whole": [voter for voter in voters if voter.sealed and not voter.whole and not voter.full],
        }
        return "; ".join(
            f"{kind}: {', '.join(self._node_of[voter.replica] for voter in found)}"
            for kind, found in kinds.items()
            if found
        )


def _counts(member: Member) -> bool:
    """Whether its acks count."""
    return member.sealed and member.whole
