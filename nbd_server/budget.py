"""Memory that clients may hold: each its share, and all together a total.

What counts is payloads of writes, from before their memory is made until they are answered, and
results of reads and of questions what blocks are, until the client has fetched them. A connection
asks before it begins a request and waits in line where it may not; its socket is not read meanwhile.

Invariants: `used_bytes` is the sum of all shares, and exceeds `total_bytes` by no more than what each
client may hold whatever the others do, so that no client is stopped by others that hoard. Nobody is
passed by in the line; one who can not go on leaves it.

The connections of one client have a limit of their own below that, with a line of their own: one that waits there
is not in the line of all. One that is in the line of all has had its turn in the other, and goes back only where its
client has used up what was left: else those of one client could send each other from line to line without an end.
"""

from collections.abc import Callable
from typing import Final

from nbd_server.limits import Limits
from nbd_server.transmission import MAX_REQUEST_BYTES
from nbd_server.turns import Turns


class Line:
    """Those who wait for others to give memory back, the longest waiting first. waiting: who they are; for a look."""

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: dict[Share, None] = {}

    def may_go(self, share: "Share", *, fits: bool) -> bool:
        """Whether it is the turn of `share`, and what it wants fits; else it is in line and will be told."""
        if fits and next(iter(self.waiting), share) is share:
            self.leave(share)
            return True
        self.waiting[share] = None
        return False

    def leave(self, share: "Share") -> None:
        """`share` waits no longer, if it did; who is behind it may have its turn."""
        if self.waiting:
            self.waiting.pop(share, None)
            self.tell_first()

    def tell_first(self) -> None:
        """Let the first in line look again."""
        for share in self.waiting:
            share.look_again()
            break


class Budget:
    """The total of one server, and the line of those who wait for some of it."""

    def __init__(self, limits: Limits) -> None:
        self.limits: Final = limits
        self.line: Final = Line()
        self.used_bytes = 0

    @property
    def waiting_count(self) -> int:
        """Connections that wait for others to give memory back."""
        return len(self.line.waiting)


class Client:
    """What all connections of one client hold, the line of those that wait for the others of them, and their turns."""

    __slots__ = ("connections", "held_bytes", "line", "turns")

    def __init__(self) -> None:
        self.connections = 0
        self.held_bytes = 0
        self.line: Final = Line()
        self.turns: Final = Turns()


class Share:
    """What one connection holds. look_again: called when it was refused and may ask once more; only marks it.

    client: whose connection it is; set before anything is taken. most_bytes: beyond that nothing more is taken.
    """

    __slots__ = ("_budget", "client", "held_bytes", "look_again", "most_bytes")

    def __init__(self, budget: Budget, look_again: Callable[[], object]) -> None:
        self.client = Client()
        self.held_bytes = 0
        self.most_bytes = budget.limits.in_flight_bytes
        self.look_again = look_again
        self._budget = budget

    def is_ample(self) -> bool:
        """Whether any one request fits, and nobody waits: there is nothing to look at more closely."""
        budget, client = self._budget, self.client
        return (
            self.held_bytes < self.most_bytes
            and budget.used_bytes + MAX_REQUEST_BYTES <= budget.limits.total_bytes
            and client.held_bytes + MAX_REQUEST_BYTES <= budget.limits.client_bytes
            and not budget.line.waiting
            and not client.line.waiting
        )

    def may_take(self, count_bytes: int) -> bool:
        """Whether a request that takes so much may begin; where others are in the way, `look_again` follows."""
        limits = self._budget.limits
        if count_bytes and self.held_bytes >= self.most_bytes:
            return False
        if self.held_bytes + count_bytes <= limits.own_bytes:
            self.leave_line()
            return True
        if not count_bytes:
            return True
        client, budget = self.client, self._budget
        fits = client.held_bytes + count_bytes <= limits.client_bytes
        if not (fits and self in budget.line.waiting) and not client.line.may_go(self, fits=fits):
            budget.line.leave(self)
            return False
        return budget.line.may_go(self, fits=budget.used_bytes + count_bytes <= limits.total_bytes)

    def take(self, count_bytes: int) -> None:
        """Hold more; asked for before."""
        self.held_bytes += count_bytes
        self.client.held_bytes += count_bytes
        self._budget.used_bytes += count_bytes

    def give_back(self, count_bytes: int) -> None:
        """Hold less."""
        self.held_bytes -= count_bytes
        self.client.held_bytes -= count_bytes
        self._budget.used_bytes -= count_bytes
        assert self.held_bytes >= 0
        self._budget.line.tell_first()
        self.client.line.tell_first()

    def leave_line(self) -> None:
        """This connection begins nothing for now: let the others pass."""
        self.client.line.leave(self)
        self._budget.line.leave(self)
