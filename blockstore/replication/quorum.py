"""Majorities over a configuration: of the members, and of the old members while a change is under way.

Whatever needs a quorum needs one of each set (Raft, section 6, joint consensus): here is the one
place that knows it.
"""

from collections.abc import Collection, Mapping
from typing import TypeVar

from blockstore.domain import Configuration, ReplicaId

V = TypeVar("V", int, float)


class Quorum:
    """The majorities of one configuration. replicas: every member, old ones included, each once; no newcomer."""

    __slots__ = ("_sets", "replicas")

    def __init__(self, configuration: Configuration) -> None:
        """Raises ValueError where there is no member."""
        if not configuration.members:
            raise ValueError(f"configuration {configuration.number} has no members")
        sets = (configuration.members, configuration.old_members)
        self._sets = tuple(tuple(member.replica for member in members) for members in sets if members)
        self.replicas: tuple[ReplicaId, ...] = tuple(dict.fromkeys(r for ids in self._sets for r in ids))

    def reached(self, replicas: Collection[ReplicaId]) -> bool:
        """Whether `replicas` hold a majority of each set."""
        return all(2 * sum(replica in replicas for replica in ids) > len(ids) for ids in self._sets)

    def reached_before(self, replicas: Collection[ReplicaId]) -> bool:
        """Whether `replicas` hold a majority of the old members: before both were needed, that was a quorum."""
        oldest = self._sets[-1]
        return 2 * sum(replica in replicas for replica in oldest) > len(oldest)

    def level(self, values: Mapping[ReplicaId, V]) -> V:
        """The highest value that a quorum has reached; `values` has one for every member.

        Source: Raft, section 5.3 (the median of a sorted list rather than a scan).
        """
        return min(sorted((values[replica] for replica in ids), reverse=True)[len(ids) // 2] for ids in self._sets)
