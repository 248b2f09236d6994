"""How long this front-end may answer reads (rule 4): a quorum has confirmed its epoch a moment ago.

A filling member confirms nothing: it may have lost, with its disk, the promise that it gave to a newer epoch.
"""

from blockstore.replication.member import NEVER, Member
from blockstore.replication.quorum import Quorum


class Lease:
    """confirmed: a quorum of whole members has confirmed this epoch to requests that were sent then or later."""

    def __init__(self, quorum: Quorum, members: tuple[Member, ...], lease_s: float) -> None:
        self.confirmed = self._until = NEVER
        self._quorum = quorum
        self._members = members
        self._lease_s = lease_s

    def renew(self) -> None:
        """A member has answered."""
        self.confirmed = self._quorum.level({m.replica: m.confirmed if m.whole else NEVER for m in self._members})
        self._until = self.confirmed + self._lease_s

    def count(self, quorum: Quorum, members: tuple[Member, ...]) -> None:
        """These are the members from now on: what was confirmed before counts as far as they did it."""
        self._quorum, self._members = quorum, members
        self.renew()

    def held(self, now: float) -> bool:
        return now < self._until
