"""A cache bounded in bytes, in which what several ask for at once is loaded once.

The least recently used value goes first. A load belongs to nobody who waits for it: one that gives up
does not take it away from the others, and where all give up it is cancelled. A load that failed is not
kept; whoever waited gets its error. A load for the background that a guest joins is promoted.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from snapshotd.gate import Gate, Ticket

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

Load = Callable[[Ticket], Awaitable[Value]]
"""Loads one value; enters the ticket for each of its steps that needs a place."""


class _Flight(Generic[Value]):
    """One load under way, and how many wait for it."""

    def __init__(self, task: "asyncio.Task[Value]", ticket: Ticket) -> None:
        self.task = task
        self.ticket = ticket
        self.waiting = 0


class FlightCache(Generic[Key, Value]):
    """limit_bytes: of all values, each weighed by `size`; one that is larger than the limit is not kept."""

    def __init__(self, limit_bytes: int, size: Callable[[Value], int], gate: Gate) -> None:
        self.size_bytes = 0
        self._limit_bytes = limit_bytes
        self._size = size
        self._gate = gate
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._flights: dict[Key, _Flight[Value]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def peek(self, key: Key) -> Value | None:
        """The value, if it is here; without a load."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    async def get(self, key: Key, load: Load[Value], *, background: bool = False) -> Value:
        """The value of `key`, from here or from `load`. Raises what that raises."""
        value = self.peek(key)
        if value is not None:
            return value
        flight = self._flights.get(key) or self._take_off(key, load, background)
        if not background:
            flight.ticket.promote()
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._flights.pop(key, None)
                flight.task.cancel()

    def drop_where(self, matches: Callable[[Key], bool]) -> None:
        """Forget what is not so any more."""
        for key in [key for key in self._values if matches(key)]:
            self.drop(key)

    def drop(self, key: Key) -> None:
        """Forget the value: it is not so any more."""
        value = self._values.pop(key, None)
        if value is not None:
            self.size_bytes -= self._size(value)

    def put(self, key: Key, value: Value) -> None:
        """Keep a value that was come by in another way."""
        self.drop(key)
        size_bytes = self._size(value)
        if size_bytes > self._limit_bytes:
            return
        self._values[key] = value
        self.size_bytes += size_bytes
        while self.size_bytes > self._limit_bytes:
            _, oldest = self._values.popitem(last=False)
            self.size_bytes -= self._size(oldest)

    def _take_off(self, key: Key, load: Load[Value], background: bool) -> _Flight[Value]:
        ticket = self._gate.ticket(background=background)
        flight = self._flights[key] = _Flight(asyncio.ensure_future(load(ticket)), ticket)
        flight.task.add_done_callback(lambda task: self._land(key, flight))
        return flight

    def _land(self, key: Key, flight: _Flight[Value]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.task.cancelled() and flight.task.exception() is None:
            self.put(key, flight.task.result())
