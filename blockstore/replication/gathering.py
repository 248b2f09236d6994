"""Whether the next record waits for writes that are likely to come. Pure.

A message costs a member as much as some twenty writes in it. A guest that keeps many writes in flight sends new ones as
soon as it is answered; a record that is made at the very commit has only those that came meanwhile, and leaves the
others to the next one: two groups of writes take turns then, for ever, in twice as many messages. So the next record
waits until those answered are followed by as many as followed before, for `gather_s` at most (PostgreSQL's
commit_delay, with the number of siblings learned). A guest with one write in flight waits for nothing: its next write
is all that is expected.

How many follow is learned for each commit anew, quickly down and slowly up, so that whoever does not come is waited
for once in a while only.
"""

from typing import Final

#: Of what was found to be too low; some twenty commits take it up.
_UP: Final = 1 / 8


class Gathering:
    """For one log. Times in seconds, of the leader's clock."""

    def __init__(self, gather_s: float) -> None:
        self._gather_s = gather_s
        self._share = 0.0
        """Of the writes that were answered, how many others follow at once."""
        self._answered = 0
        self._came = 0
        """Since the last commit."""
        self._wanted = 0
        self._until = 0.0

    @property
    def until(self) -> float | None:
        """When it is over; None where nothing is waited for, or only one write, which needs no clock."""
        return self._until if self._wanted > 1 and self._gather_s else None

    def came(self) -> None:
        """One more write was queued."""
        self._came += 1

    def committed(self, answered: int, waiting: int, now: float) -> None:
        """So many writes are answered now, and others wait already."""
        self._learn()
        self._answered, self._came = answered, 0
        self._wanted = waiting + int(self._share * answered)
        self._until = now + self._gather_s

    def is_over(self, waiting: int, now: float) -> bool:
        """Whether a record of those that wait is due."""
        if waiting >= self._wanted:
            return True
        if now < self._until:
            return False
        self.end()
        return True

    def end(self) -> None:
        """Time is up."""
        self._learn()
        self._answered = self._wanted = 0

    def _learn(self) -> None:
        if self._answered:
            share = min(1.0, self._came / self._answered)
            self._share = share if share < self._share else self._share + (share - self._share) * _UP
