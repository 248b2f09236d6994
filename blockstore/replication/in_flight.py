"""The guest's writes between submission and commit, and which of them a request overlaps.

Writes are numbered in the order in which they came, and commit in that order; so whoever overlaps
several waits for the one with the highest number. Narrow writes are found by block, in one
dictionary look-up for each block; wide ones (no payload: trims and zeroes) in a short list.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

from blockstore.record import Operation
from blockstore.units import EXTENT_BLOCKS

#: A write over more blocks than any payload has is kept as one interval: a trim may cover the volume.
_NARROW_BLOCKS: Final = EXTENT_BLOCKS

#: What a request without payload counts for in the queue, so that trims cannot pile up without end.
REQUEST_BYTES: Final = 512


class Waiter:
    """Something that goes on when a write is out of the way: a read."""

    __slots__ = ()


@dataclass(slots=True, eq=False)
class Write:
    """One submitted operation.

    number: grows along the order in which writes become records. after: the highest number that it overlaps, 0 for
    none. answered: the guest has its answer, be it an error. done: out of the way, committed or dropped.
    """

    number: int
    ticket: Hashable
    operation: Operation
    since: float
    after: int = 0
    answered: bool = False
    done: bool = False
    in_log: bool = False
    waiters: list[Waiter] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        return len(self.operation.data) + REQUEST_BYTES


class OverlapIndex:
    """The newest write over each block, among those that are not out of the way."""

    __slots__ = ("_newest", "_wide")

    def __init__(self) -> None:
        self._newest: dict[int, Write] = {}
        self._wide: list[Write] = []

    def __bool__(self) -> bool:
        return bool(self._newest or self._wide)

    def newest_over(self, start: int, count: int) -> Write | None:
        """The write with the highest number that touches a block of [start, start + count)."""
        found: Write | None = None
        newest = self._newest
        if count <= _NARROW_BLOCKS:
            for block in range(start, start + count):
                write = newest.get(block)
                if write is not None and (found is None or write.number > found.number):
                    found = write
        elif newest:
            inside = (write for block, write in newest.items() if start <= block < start + count)
            found = max(inside, key=lambda write: write.number, default=None)
        for write in self._wide:
            operation = write.operation
            if (
                operation.start < start + count
                and start < operation.end
                and (found is None or write.number > found.number)
            ):
                found = write
        return found

    def add(self, write: Write) -> None:
        """Also finds out what it comes after."""
        operation = write.operation
        if operation.count == 1 and not self._wide:  # what guests send most: the same as below in fewer calls
            narrow = self._newest.get(operation.start)
            write.after = narrow.number if narrow is not None else 0
            self._newest[operation.start] = write
            return
        if not operation.on_blocks:
            return
        below = self.newest_over(operation.start, operation.count)
        write.after = below.number if below is not None else 0
        if operation.count > _NARROW_BLOCKS:
            self._wide.append(write)
        else:
            for block in range(operation.start, operation.end):
                self._newest[block] = write

    def remove(self, write: Write) -> None:
        """It committed, and with it all before it."""
        operation = write.operation
        if operation.count == 1:
            if self._newest.get(operation.start) is write:
                del self._newest[operation.start]
            return
        if not operation.on_blocks:
            return
        if operation.count > _NARROW_BLOCKS:
            self._wide.remove(write)
            return
        newest = self._newest
        for block in range(operation.start, operation.end):
            if newest.get(block) is write:
                del newest[block]
