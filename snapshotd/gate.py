"""Who may use the object store next: guests first, then whoever works ahead.

Fetches are limited in number, so that each gets its share of the store's speed. A guest's fetch takes
the next free place; one for the background pass takes it only while no guest waits, and leaves one
place free at all times. A fetch that a guest joins becomes a guest's.
"""

import asyncio
from collections import deque


class Ticket:
    """One use of the gate: `async with ticket:`; once."""

    def __init__(self, gate: "Gate", background: bool) -> None:
        self._gate = gate
        self.background = background
        self.entered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.inside = False

    def promote(self) -> None:
        """A guest waits for this one now."""
        if self.background:
            self._gate.promote(self)

    async def __aenter__(self) -> None:
        self._gate.queue(self)
        try:
            await self.entered
        except asyncio.CancelledError:
            self._gate.leave(self)
            raise

    async def __aexit__(self, *_: object) -> None:
        self._gate.leave(self)


class Gate:
    """At most `places` uses at once, at most `places - 1` of them (but one at least) of the background."""

    def __init__(self, places: int) -> None:
        assert places >= 1
        self._free = places
        self._free_for_background = max(1, places - 1)
        self._guests: deque[Ticket] = deque()
        self._background: deque[Ticket] = deque()

    def ticket(self, *, background: bool) -> Ticket:
        return Ticket(self, background)

    def queue(self, ticket: Ticket) -> None:
        (self._background if ticket.background else self._guests).append(ticket)
        self._admit()

    def promote(self, ticket: Ticket) -> None:
        """Moves a waiting ticket among the guests; one that has entered counts as one of them from here on."""
        ticket.background = False
        if ticket in self._background:
            self._background.remove(ticket)
            self._guests.append(ticket)
            self._admit()
        elif ticket.inside:
            self._free_for_background += 1
            self._admit()

    def leave(self, ticket: Ticket) -> None:
        """The place is free again, or the ticket waits no more."""
        if ticket.inside:
            ticket.inside = False
            self._free += 1
            self._free_for_background += ticket.background
        else:
            queue = self._background if ticket.background else self._guests
            if ticket in queue:
                queue.remove(ticket)
        self._admit()

    def _admit(self) -> None:
        while self._free and (self._guests or (self._background and self._free_for_background)):
            ticket = (self._guests or self._background).popleft()
            if ticket.entered.done():
                continue  # it was cancelled, and has not come round to leaving yet
            self._free -= 1
            self._free_for_background -= ticket.background
            ticket.inside = True
            ticket.entered.set_result(None)
