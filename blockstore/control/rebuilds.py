"""How far the filling of replicas is, and how long it takes yet: from what front-ends report.

In memory only: after a start of control the rate is known again after a few heartbeats.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

from blockstore.domain import ReplicaId
from blockstore.rpc import control_pb2
from blockstore.units import MIB

#: The rate is that of so long: shorter ones jump about, longer ones lag behind what happens.
_WINDOW_S: Final = 20.0
#: An extent (docs/storage.md); sparse ones hold less.
_EXTENT_BYTES: Final = MIB


@dataclass(frozen=True, slots=True)
class Rebuild:
    """seconds_left: 0 where nothing can be said."""

    rate_bytes: int = 0
    seconds_left: float = 0.0


class Rebuilds:
    """The last seconds of each replica that is filled."""

    def __init__(self) -> None:
        self._seen: dict[ReplicaId, deque[tuple[float, int, int]]] = {}

    def learn(self, member: control_pb2.MemberReport, now: float) -> None:
        """What a front-end says of a member; now: in seconds, never falling."""
        replica = ReplicaId(member.replica)
        if member.whole:
            self._seen.pop(replica, None)
            return
        seen = self._seen.setdefault(replica, deque())
        if seen and member.extents_done < seen[-1][1]:
            seen.clear()  # it began anew
        seen.append((now, member.extents_done, member.extents_total))
        while seen[0][0] < now - _WINDOW_S and len(seen) > 2:
            seen.popleft()

    def forget_silent(self, now: float) -> None:
        """Of whom nothing was said of late: they are gone, or nobody fills them."""
        for gone in [replica for replica, seen in self._seen.items() if seen[-1][0] < now - _WINDOW_S]:
            del self._seen[gone]

    def of(self, replica: ReplicaId) -> Rebuild:
        """As it went of late."""
        seen = self._seen.get(replica)
        if not seen:
            return Rebuild()
        (began, before, _), (at, done, total) = seen[0], seen[-1]
        if at <= began or done <= before:
            return Rebuild()
        rate = (done - before) / (at - began)
        return Rebuild(round(rate * _EXTENT_BYTES), max(0.0, (total - done) / rate))
