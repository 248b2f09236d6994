"""The guest's writes that are not committed yet: first they wait, then they are part of a record.

Both in the order in which they came. A batch takes as many from the front as fit one record: none
overlaps another of the batch, and what is not on blocks (a SEAL) comes last. Fills have an overlap index of
their own: they change nothing that a read shows, so no read waits for one.

While the members lack room, what needs some is held beside the queue, and all else passes it: what frees
room must not wait for room. Invariants:
- the two overlap indexes together hold exactly the writes that are not out of the way, but for those held:
  as nothing of these is in any log yet, reads need not wait for them;
- changes that overlap become records in the order in which they came, and no HYDRATED passes a fill.
"""

from collections import deque
from collections.abc import Hashable
from typing import Final

from blockstore.record import MAX_OPERATIONS, Operation, OperationKind
from blockstore.replication.in_flight import OverlapIndex, Write
from blockstore.units import BlockNumber

#: What needs room on a node; trims, seals and the like make room or need next to none.
NEEDS_ROOM: Final = frozenset({OperationKind.WRITE, OperationKind.FILL, OperationKind.ZERO})


class WriteQueue:
    """record_bytes: the payload of one record. queue_bytes: what may wait before no more should be taken.

    congested: more than that waits; it stays so until half of it is gone.
    """

    def __init__(self, record_bytes: int, queue_bytes: int) -> None:
        self.congested = False
        self._record_bytes = record_bytes
        self._queue_bytes = queue_bytes
        self._waiting: deque[Write] = deque()
        self._waiting_bytes = 0
        self._in_records: deque[Write] = deque()
        self._by_age: deque[Write] = deque()
        self._changes = OverlapIndex()
        self._fills = OverlapIndex()
        self._number = 0
        self._holding = False
        self._held: deque[Write] = deque()
        self._held_bytes = 0
        #: The changes among those held.
        self._held_changes = OverlapIndex()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, ticket: Hashable, operation: Operation, now: float) -> None:
        """One more, behind all others."""
        write = Write(0, ticket, operation, now)
        self._by_age.append(write)
        if self._holding and self._has_to_wait(operation):
            self._hold(write)
        else:
            self._enqueue(write)
        self.congested = self.congested or self._waiting_bytes + self._held_bytes > self._queue_bytes

    def _enqueue(self, write: Write) -> None:
        self._number += 1
        write.number = self._number
        self._index(write)
        self._waiting.append(write)
        self._waiting_bytes += write.size_bytes

    @property
    def waiting_bytes(self) -> int:
        """Of those that are in no record yet, and not held."""
        return self._waiting_bytes

    @property
    def waiting_count(self) -> int:
        """How many those are, and what was dropped among them."""
        return len(self._waiting)

    def newest_over(self, start: BlockNumber, count: int) -> Write | None:
        """The newest write over any of these blocks, waiting or in a record, that changes what they show."""
        return self._changes.newest_over(start, count)

    def _index(self, write: Write) -> None:
        """It comes after whatever it overlaps, in either index."""
        operation = write.operation
        if operation.kind is OperationKind.FILL:
            self._fills.add(write)
            below = self._changes.newest_over(operation.start, operation.count)
        else:
            self._changes.add(write)
            below = self._fills.newest_over(operation.start, operation.count) if self._fills else None
        if below is not None:
            write.after = max(write.after, below.number)

    def _index_of(self, write: Write) -> OverlapIndex:
        return self._fills if write.operation.kind is OperationKind.FILL else self._changes

    def next_batch(self) -> list[Write]:
        """The next writes that fit one record; they are part of it from here on. Empty where all were dropped."""
        batch: list[Write] = []
        room, waiting = self._record_bytes, self._waiting
        while waiting and len(batch) < MAX_OPERATIONS:
            write = waiting[0]
            operation = write.operation
            if batch and (write.after >= batch[0].number or len(operation.data) > room):
                break
            waiting.popleft()
            self._waiting_bytes -= write.size_bytes
            if write.done:
                continue
            write.in_log = True
            batch.append(write)
            room -= len(operation.data)
            if not operation.on_blocks:
                break
        self._in_records += batch
        return batch

    def relieved(self) -> bool:
        """True once when it is congested no more."""
        if not self.congested or self._waiting_bytes + self._held_bytes > self._queue_bytes // 2:
            return False
        self.congested = False
        return True

    def committed(self, write: Write) -> None:
        """The next write in records is out of the way."""
        first = self._in_records.popleft()
        assert first is write
        write.done = True
        self._index_of(write).remove(write)

    def expire(self, before: float) -> tuple[list[Hashable], list[Write]]:
        """The tickets of what came before then and has no answer yet, and which of these writes are dropped.

        A write in a record stays in flight; one that still waits is dropped.
        """
        tickets: list[Hashable] = []
        dropped: list[Write] = []
        while self._by_age and (self._by_age[0].done or self._by_age[0].since <= before):
            write = self._by_age.popleft()
            if write.done:
                continue
            write.answered = True
            tickets.append(write.ticket)
            if not write.in_log:
                write.done = True
                dropped.append(write)
        if dropped:
            self._index_anew()
            self._hold_only([write for write in self._held if not write.done])
        return tickets, dropped

    def _index_anew(self) -> None:
        self._changes, self._fills = OverlapIndex(), OverlapIndex()
        for write in (*self._in_records, *(write for write in self._waiting if not write.done)):
            self._index(write)

    # ---- while the members lack room

    @property
    def held_count(self) -> int:
        """How many wait for room."""
        return len(self._held)

    def hold(self) -> list[Write]:
        """What needs room, and what comes behind that, waits until `let_go`; those that had waited for a record."""
        if self._holding:
            return []
        self._holding = True
        waiting, self._waiting = self._waiting, deque()
        self._waiting_bytes = 0
        for write in waiting:
            if write.done:
                continue
            if self._has_to_wait(write.operation):
                self._hold(write)
            else:
                self._waiting.append(write)
                self._waiting_bytes += write.size_bytes
        self._index_anew()
        return list(self._held)

    def _has_to_wait(self, operation: Operation) -> bool:
        """Behind a fill only HYDRATED waits: whatever else overlaps one wins over it in either order."""
        if operation.kind is OperationKind.HYDRATED:
            return any(write.operation.kind is OperationKind.FILL for write in self._held)
        if operation.kind in NEEDS_ROOM:
            return True
        return operation.on_blocks and self._held_changes.newest_over(operation.start, operation.count) is not None

    def _hold(self, write: Write) -> None:
        self._held.append(write)
        self._held_bytes += write.size_bytes
        if write.operation.kind is not OperationKind.FILL:
            self._held_changes.add(write)

    def _hold_only(self, writes: list[Write]) -> None:
        self._held, self._held_bytes, self._held_changes = deque(), 0, OverlapIndex()
        for write in writes:
            self._hold(write)

    def let_go(self) -> None:
        """There is room: what was held queues behind what waits, which it does not overlap."""
        self._holding = False
        held = self._held
        self._hold_only([])
        for write in held:
            self._enqueue(write)

    def refuse_held(self) -> tuple[Hashable, ...]:
        """None of those held will take effect; their tickets."""
        for write in self._held:
            write.answered = write.done = True
        tickets = tuple(write.ticket for write in self._held)
        self._hold_only([])
        return tickets

    def close(self) -> tuple[Hashable, ...]:
        """The tickets that have no answer yet; nothing is left."""
        tickets = tuple(write.ticket for write in self._by_age if not write.answered)
        self._by_age.clear()
        self._waiting.clear()
        self._in_records.clear()
        self._hold_only([])
        return tickets
