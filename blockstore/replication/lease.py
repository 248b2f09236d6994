"""How long this front-end may answer reads (rule 4): a quorum has confirmed its epoch a moment ago.

A filling member confirms nothing: it may have lost, with its disk, the promise that it gave to a newer epoch.
"""

from blockstore.replication.member import NEVER, Member
from blockstore.replication.quorum import Quorum


class Lease:
    """Renewed with each answer, and looked at seldom: so it is computed when somebody asks."""

    def __init__(self, quorum: Quorum, members: tuple[Member, ...], lease_s: float) -> None:
        self._confirmed = NEVER
        self._renewed = False
        """Since it was computed."""
        self._quorum = quorum
        self._members = members
        self._lease_s = lease_s

    @property
    def confirmed(self) -> float:
        """A quorum of whole members has confirmed this epoch to requests that were sent then or later."""
        if self._renewed:
            self._renewed = False
            self._confirmed = self._quorum.level({m.replica: m.confirmed if m.whole else NEVER for m in self._members})
        return self._confirmed

    def renew(self) -> None:
        """A member has answered."""
        self._renewed = True

    def count(self, quorum: Quorum, members: tuple[Member, ...]) -> None:
        """These are the members from now on: what was confirmed before counts as far as they did it."""
        self._quorum, self._members = quorum, members
        self.renew()

    def held(self, now: float) -> bool:
        return now < self.confirmed + self._lease_s
