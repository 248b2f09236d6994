"""How soon a front-end speaks to control again.

Each step of a change of members waits for what is reported, and for what is answered: a node that is drained may have
thousands of small replicas, and four heartbeats for each are most of the time. So heartbeats follow each other fast
once a change begins or has taken a step, and more and more slowly while nothing comes of it: to fill a large replica
takes hours.
"""

from collections.abc import Set
from typing import Final

from blockstore.domain import Configuration, SegmentNumber, VolumeId

#: The least share of the interval between two heartbeats; also the most of the time that they may take, and how much
#: of the time since the last step lies between two of them.
SHARE: Final = 0.1

Change = tuple[VolumeId, SegmentNumber, Configuration]
"""A segment whose members change, and how far that is."""


class Pace:
    """interval_s: between two heartbeats where nothing changes."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._changes: Set[Change] = frozenset()
        self._since = 0.0

    def next_s(self, changes: Set[Change], took_s: float, now: float) -> float:
        """Seconds until the next heartbeat. changes: under way in what is served; took_s: the heartbeat before."""
        if changes != self._changes:
            self._changes, self._since = frozenset(changes), now
        if not changes:
            return self._interval_s
        return min(self._interval_s, max(self._interval_s * SHARE, took_s / SHARE, (now - self._since) * SHARE))
