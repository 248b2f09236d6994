"""A run of a segment's log in memory: consecutive records behind a position that is known.

Both sides keep one: a follower what its tables do not hold yet, a leader what a slow member may
still need. Invariant: each record's `previous` is the position before it, so that two logs that
hold the same position hold the same records up to it (Raft's log matching, section 5.3).
"""

from bisect import bisect_right
from collections.abc import Iterable

from blockstore.domain import Position
from blockstore.record import OperationKind, Record
from blockstore.units import Generation


class RecordRun:
    """The records behind `start`, in order and without gaps.

    start: the position before the first record; size_bytes: of their encodings, in all.
    """

    __slots__ = ("_records", "size_bytes", "start")

    def __init__(self, start: Position, records: Iterable[Record] = ()) -> None:
        self.start = start
        self.size_bytes = 0
        self._records: list[Record] = []
        for record in records:
            self.append(record)

    @property
    def end(self) -> Position:
        """The position of the last record; `start` where there is none."""
        return self._records[-1].position if self._records else self.start

    @property
    def first(self) -> Record:
        return self._records[0]

    @property
    def last(self) -> Record | None:
        return self._records[-1] if self._records else None

    def __len__(self) -> int:
        return len(self._records)

    def position_at(self, sequence: int) -> Position | None:
        """The position that this run holds at `sequence`, `start` included; None outside."""
        index = sequence - self.start.sequence - 1
        if index == -1:
            return self.start
        return self._records[index].position if 0 <= index < len(self._records) else None

    def holds(self, position: Position) -> bool:
        return self.position_at(position.sequence) == position

    def last_of(self, epoch: int, up_to: int) -> Position | None:
        """The highest position of that epoch with a sequence of at most `up_to`; epochs never fall along a log."""
        records, first = self._records, self.start.sequence + 1
        index = min(bisect_right(records, epoch, key=lambda record: record.position.epoch), up_to - first + 1)
        if index < 0:
            return None
        position = records[index - 1].position if index else self.start
        return position if position.epoch == epoch else None

    def between(self, after: int, up_to: int) -> tuple[Record, ...]:
        """The records with sequences in (after, up_to]; both are inside the run."""
        first = self.start.sequence
        assert first <= after, (self.start, after)
        assert up_to <= self.end.sequence, (up_to, self.end)
        return tuple(self._records[after - first : up_to - first])

    def chunk(self, first: int, max_bytes: int) -> tuple[Record, ...]:
        """The records from the sequence `first` on, at least one and then as many as fit into max_bytes."""
        index = first - self.start.sequence - 1
        assert 0 <= index < len(self._records), (first, self.start, self.end)
        size, stop = 0, index
        while stop < len(self._records):
            size += len(self._records[stop].encoded)
            if size > max_bytes and stop > index:
                break
            stop += 1
        return tuple(self._records[index:stop])

    def size_after(self, sequence: int) -> int | None:
        """Bytes of the records above `sequence`; None where some of them are not in this run."""
        index = sequence - self.start.sequence
        return sum(len(record.encoded) for record in self._records[index:]) if index >= 0 else None

    def append(self, record: Record) -> None:
        """Asserts that the record follows the end."""
        assert record.previous == self.end, (record.previous, self.end)
        assert record.sequence == self.end.sequence + 1, (record.position, self.end)
        self._records.append(record)
        self.size_bytes += len(record.encoded)

    def truncate(self, after: int) -> None:
        """Drop every record above the sequence `after`, which is at or above the start."""
        index = after - self.start.sequence
        assert index >= 0
        self.size_bytes -= sum(len(record.encoded) for record in self._records[index:])
        del self._records[index:]

    def forget(self, up_to: Position) -> None:
        """Drop the records up to a position that the run holds: it becomes the start."""
        assert self.holds(up_to)
        count = up_to.sequence - self.start.sequence
        self.size_bytes -= sum(len(record.encoded) for record in self._records[:count])
        del self._records[:count]
        self.start = up_to

    def shrink(self, max_bytes: int, below: int) -> None:
        """Where it holds more than that: drop the oldest until an eighth is free, none at or above `below`."""
        if self.size_bytes <= max_bytes:
            return
        count, size = 0, self.size_bytes
        while size > max_bytes - max_bytes // 8 and self._records[count].sequence < below:
            size -= len(self._records[count].encoded)
            count += 1
        if count:
            self.forget(self._records[count - 1].position)


def generation_after(record: Record) -> Generation:
    """The layer that a write behind `record` belongs to. A leader puts a SEAL last in its record."""
    sealed = record.operations[-1].kind is OperationKind.SEAL
    return Generation(record.generation + sealed)


def earlier(left: Position, right: Position) -> Position:
    """The one with the lower sequence, of two positions of one log."""
    return left if left.sequence <= right.sequence else right
