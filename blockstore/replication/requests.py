"""The guest's requests, from when they come until they are answered (rules 2 to 5).

A write queues, becomes part of a record while few of those are in flight, and is answered once its record is
committed; while the members lack room, what needs some is held or refused. A read waits for the writes that it
overlaps, and is then asked of a member (see reads). Invariants:
- records are numbered and answered in one order, that of submission;
- no record is made, and no member asked, before guests are served;
- an error at the retry limit ends the request, not its record: overlapping reads go on waiting.
Source: docs/replication.md (the numbers of the rules are those of that page, and so is Space).
"""

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from blockstore.domain import Position
from blockstore.errors import CairnError, Conflict, InvalidRequest, NoSpace, QuorumUnavailable
from blockstore.metrics import Durations
from blockstore.record import MAX_OPERATION_BLOCKS, Operation, OperationKind
from blockstore.replication.gathering import Gathering
from blockstore.replication.in_flight import Write
from blockstore.replication.leader_log import LeaderLog
from blockstore.replication.messages import Completed, Failed, LeaderEffect, Relieved, Sealed, Serving
from blockstore.replication.reads import Read, Reads
from blockstore.replication.recent_writes import RecentWrites
from blockstore.replication.room import QuorumRoom, Room
from blockstore.replication.settings import LeaderSettings
from blockstore.replication.write_queue import NEEDS_ROOM, WriteQueue
from blockstore.units import BlockNumber, Generation


@dataclass(slots=True, eq=False)
class _InFlight:
    """A record with these writes that is not committed yet."""

    position: Position
    generation: Generation
    writes: list[Write]


class Requests:
    """Those of one attachment, in `log`. serving: the guest's requests are carried out, and do not only queue."""

    def __init__(self, settings: LeaderSettings, log: LeaderLog, reads: Reads, room: QuorumRoom) -> None:
        self.serving = False
        self._settings = settings
        self._log = log
        self._reads = reads
        self._room = room
        self._queue = WriteQueue(settings.max_record_bytes, settings.queue_bytes)
        self._in_flight: deque[_InFlight] = deque()
        self._gathering = Gathering(settings.gather_s)
        self._hydrated = False
        self.commits = Durations()
        """Of each record, from when its first write came until it was committed."""
        self.recent: RecentWrites | None = None
        """What is in the log, while somebody reads tables; records that came before it count as its floor."""

    @property
    def congested(self) -> bool:
        """So much waits that no more should be submitted until Relieved."""
        return self._queue.congested

    @property
    def held_count(self) -> int:
        """How many wait for room."""
        return self._queue.held_count

    @property
    def waiting_bytes(self) -> int:
        """Of writes that are in no record yet, and not held."""
        return self._queue.waiting_bytes

    @property
    def gathers_until(self) -> float | None:
        """When `send_gathered` is due, where a record may wait for more writes."""
        return self._gathering.until

    @property
    def lacks_room(self) -> str:
        """Who is full and who is away, where writes are held or refused for that; else empty."""
        return "" if self._room.room is Room.ENOUGH else self._room.why()

    def serve(self, now: float) -> list[LeaderEffect]:
        """Carry out what came so far, and all that comes from now on."""
        self.serving = True
        return [Serving(), *self.send_queued(now), *self.retry(now)]

    # ---- rule 2: writes become records

    def submit(self, ticket: Hashable, operation: Operation, now: float) -> list[LeaderEffect]:
        """Queue one operation; answered by Completed or Sealed once it is committed, or by Failed."""
        limit = self._settings.max_record_bytes
        if len(operation.data) > limit or operation.count > MAX_OPERATION_BLOCKS:
            what = f"{operation.count} blocks with {len(operation.data)} bytes in one operation"
            return [Failed((ticket,), InvalidRequest(f"{what}, {MAX_OPERATION_BLOCKS} and {limit} at most"))]
        if self._room.room is Room.NONE and operation.kind in NEEDS_ROOM:
            return [Failed((ticket,), self._no_room())]
        if operation.kind is OperationKind.HYDRATED:
            self._hydrated = True
        elif self._hydrated and operation.kind is OperationKind.FILL:
            # Also where the HYDRATED failed: its record may commit yet, and a fill behind it would bring trimmed blocks
            # back.
            return [Failed((ticket,), Conflict("a volume that is hydrated, or about to be, takes no fills"))]
        self._queue.add(ticket, operation, now)
        self._gathering.came()
        return self.send_queued(now)

    def send_gathered(self, now: float) -> list[LeaderEffect]:
        """Nobody else is waited for any more."""
        self._gathering.end()
        return self.send_queued(now)

    def send_queued(self, now: float) -> list[LeaderEffect]:
        """Make records of what waits, as long as fewer than the limit are in flight, and send them."""
        if not self.serving:
            return []
        taken = False
        while self._may_append(now):
            taken = True
            batch = self._queue.next_batch()
            if batch:
                record = self._log.append(write.operation for write in batch)
                if self.recent is not None:
                    for write in batch:
                        self.recent.note(record.sequence, write.operation)
                self._in_flight.append(_InFlight(record.position, record.generation, batch))
        return [*self._log.stream_to_all(now), *self._relieve()] if taken else []

    def _may_append(self, now: float) -> bool:
        """Whether a record is due: enough waits for a message, or nothing is in flight and no more is expected."""
        if not self._queue:
            return False
        enough = self._queue.waiting_bytes >= self._settings.batch_bytes
        if self._in_flight and not enough:
            return False
        in_flight = self._log.uncommitted
        if in_flight >= self._settings.max_records_in_flight:
            return False
        if enough:
            return True
        return not in_flight and self._gathering.is_over(self._queue.waiting_count, now)

    def _relieve(self) -> list[LeaderEffect]:
        return [Relieved()] if self._queue.relieved() else []

    # ---- Space

    def look_for_room(self, now: float) -> list[LeaderEffect]:
        """Hold, refuse or let go what needs room, as the members have it now. Only once all that are sealed stream."""
        if not self._room.look(now):
            return []
        if self._room.room is Room.ENOUGH:
            self._queue.let_go()
            return self.send_queued(now)
        effects = self._ask_again(self._queue.hold(), now)
        tickets = self._queue.refuse_held() if self._room.room is Room.NONE else ()
        if tickets:
            effects.append(Failed(tickets, self._no_room()))
        return effects + self._relieve()

    def _no_room(self) -> NoSpace:
        return NoSpace(
            f"too few of the volume's nodes have room for new writes ({self._room.why()}); "
            "free space on those that are full, or bring back those that are away"
        )

    # ---- rule 3: what is committed is answered

    def complete(self, now: float) -> list[LeaderEffect]:
        """Answer the writes whose records are committed by now; reads that waited for them go on."""
        tickets: list[Hashable] = []
        effects: list[LeaderEffect] = []
        answered = 0
        while self._in_flight and self._in_flight[0].position.sequence <= self._log.commit.sequence:
            record = self._in_flight.popleft()
            answered += len(record.writes)
            self.commits.add(now - record.writes[0].since)
            for write in record.writes:
                self._queue.committed(write)
                if write.answered:
                    continue
                write.answered = True
                if write.operation.kind is OperationKind.SEAL:
                    effects.append(Sealed(write.ticket, record.generation, record.position))
                else:
                    tickets.append(write.ticket)
            for write in record.writes:
                if write.waiters:
                    effects += self._release(write, now)
            if record.writes[-1].operation.kind is OperationKind.SEAL:
                # Not with the next record: a generation can be read where it is known to be committed.
                effects += self._log.tell_commit(now)
        self._gathering.committed(answered, self._queue.waiting_count, now)
        return [Completed(tuple(tickets)), *effects] if tickets else effects

    def _release(self, write: Write, now: float) -> list[LeaderEffect]:
        """Reads that waited for this write go on."""
        effects: list[LeaderEffect] = []
        for read in write.waiters:
            assert isinstance(read, Read)
            effects += self._ask(read, now)
        write.waiters.clear()
        return effects

    # ---- rule 4: reads

    def read(self, ticket: Hashable, start: BlockNumber, count: int, now: float) -> list[LeaderEffect]:
        """Read `count` blocks; answered by ReadDone for an attempt whose data has arrived, or by Failed."""
        read = Read(ticket, start, count, now)
        self._reads.add(read)
        return self._ask_when_clear(read, now)

    def _ask_when_clear(self, read: Read, now: float) -> list[LeaderEffect]:
        write = self._queue.newest_over(read.start, read.count)
        if write is None:
            return self._ask(read, now)
        write.waiters.append(read)
        return []

    def _ask_again(self, writes: Iterable[Write], now: float) -> list[LeaderEffect]:
        """Reads that waited for these wait for them no more, but for what else is in their way."""
        effects: list[LeaderEffect] = []
        for write in writes:
            waiters, write.waiters = write.waiters, []
            for read in waiters:
                assert isinstance(read, Read)
                effects += self._ask_when_clear(read, now)
        return effects

    def _ask(self, read: Read, now: float) -> list[LeaderEffect]:
        if not self.serving:
            self._reads.park(read)
            return []
        return self._reads.ask(read, self._log.commit, now)

    def retry(self, now: float) -> list[LeaderEffect]:
        """Ask once more for what nobody could answer."""
        return self._reads.retry(self._log.commit, now) if self.serving else []

    # ---- rule 5: what takes too long, and the end

    def expire(self, now: float) -> list[LeaderEffect]:
        """Fail what is older than the retry limit. A record stays in flight, and overlapping reads wait."""
        limit_s = self._settings.retry_limit_s
        tickets, dropped = self._queue.expire(now - limit_s)
        effects: list[LeaderEffect] = []
        if tickets:
            late = f"fewer than a quorum of the members acked within {limit_s} s"
            effects.append(Failed(tuple(tickets), QuorumUnavailable(f"{late} ({self._room.why() or 'all are here'})")))
        return effects + self._ask_again(dropped, now) + self._relieve() + self._reads.expire(now - limit_s)

    def end(self, error: CairnError) -> list[LeaderEffect]:
        """Fail everything: nothing is carried out any more."""
        self.serving = False
        tickets = self._queue.close()
        self._in_flight.clear()
        effects: list[LeaderEffect] = [Failed(tickets, error)] if tickets else []
        return effects + self._reads.fail_all(error)
