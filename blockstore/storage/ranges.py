"""Ranges of blocks, the newer laid over the older: what a trim of any length costs in memory.

Ranges never overlap and are kept in order, so a lookup is a binary search however many there are,
and a trim of a whole volume is one entry.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Generic, TypeVar

V = TypeVar("V")


class RangeMap(Generic[V]):
    """Maps block numbers to the value that came with the last range that was put over them."""

    __slots__ = ("_ends", "_starts", "_values")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._values: list[V] = []

    def __len__(self) -> int:
        return len(self._starts)

    def put(self, start: int, end: int, value: V) -> None:
        """Lay [start, end) over what is there."""
        self._replace(start, end, [(start, end, value)])

    def cut(self, start: int, end: int) -> None:
        """Nothing is over [start, end) any more."""
        self._replace(start, end, [])

    def _replace(self, start: int, end: int, pieces: list[tuple[int, int, V]]) -> None:
        """What is over [start, end) gives way to `pieces`; what reaches beyond stays there."""
        assert start < end
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first < last:
            if self._starts[first] < start:
                pieces.insert(0, (self._starts[first], start, self._values[first]))
            if self._ends[last - 1] > end:
                pieces.append((end, self._ends[last - 1], self._values[last - 1]))
        self._starts[first:last] = [piece[0] for piece in pieces]
        self._ends[first:last] = [piece[1] for piece in pieces]
        self._values[first:last] = [piece[2] for piece in pieces]

    def find(self, number: int) -> V | None:
        """The value of the range over `number`."""
        at = bisect_right(self._starts, number) - 1
        return self._values[at] if at >= 0 and number < self._ends[at] else None

    def between(self, start: int, end: int) -> Iterator[tuple[int, int, V]]:
        """(start, end, value) of all that overlaps [start, end), cut to it, in order."""
        at = bisect_right(self._ends, start)
        while at < len(self._starts) and self._starts[at] < end:
            yield max(start, self._starts[at]), min(end, self._ends[at]), self._values[at]
            at += 1

    def __iter__(self) -> Iterator[tuple[int, int, V]]:
        return iter(zip(self._starts, self._ends, self._values, strict=True))
