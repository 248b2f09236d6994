"""One replica's log: what it holds, what of that is durable, the leader's, committed.

The lowest of three layers (this, filling, follower). It knows no messages but the effects that come out.
Invariants:
- `commit` <= what is durable here and matches the leader's log; nothing at or below it is cut;
- a position never falls: where a cut would let it, the replica fills, with its old end as floor.
Source: docs/replication.md, rules 2 and 3; Raft, section 5.3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from blockstore.domain import ORIGIN, Position, ReplicaId
from blockstore.errors import Corrupt
from blockstore.log import (
    UNKNOWN_FLOOR,
    Filling,
    FillingEntry,
    LogEntry,
    LogImage,
    RecordEntry,
    TruncateEntry,
)
from blockstore.record import RECORD_OVERHEAD_BYTES, Record
from blockstore.replication.messages import AckedPositions, Commit, FollowerEffect, Persist, SealEpoch
from blockstore.replication.record_run import RecordRun, earlier, generation_after
from blockstore.replication.replay import Replayed, copies, replay, replay_entry
from blockstore.units import Epoch, Generation


@dataclass(slots=True)
class Pending:
    """What waits until the journal has confirmed `number`.

    entries: of the Persist with that number. end: of the log with it. acks: the epoch whose leader waits
    for it. seal: to be answered to `origin`.
    """

    number: int
    end: Position
    entries: tuple[LogEntry, ...] = ()
    acks: Epoch | None = None
    seal: SealEpoch | None = None
    origin: Hashable = None


class ReplicaLog:
    """The log of `replica`, and what its last checkpoint left out."""

    def __init__(self, replica: ReplicaId, image: LogImage) -> None:
        self.replica = replica
        self.epoch: Epoch = image.epoch
        self.configuration = image.configuration
        self.filling: Filling | None = image.filling
        self.commit: Position = image.applied
        self._run = RecordRun(image.applied, image.records)
        self._applied = image.applied
        #: The highest that a checkpoint of a whole replica was given to apply; it may be under way.
        self._applied_as_whole = ORIGIN
        self._copied = image.copied
        self._generation = self._applied_generation = image.generation
        self._acked = ORIGIN
        #: What the other members have acked, as leaders told it.
        self._known: AckedPositions = image.known
        #: The current log is durable up to this sequence.
        self._durable: int = self._run.end.sequence
        #: While a cut, or the beginning of a filling, is not durable: the log as it is on disk, what its
        #: `applied` means, and the number of the entry after which the two are the same again.
        self._on_disk: Replayed | None = None
        self._on_disk_generation = image.generation
        self._same_again = 0
        #: Up to here the log is the leader's, whether durable or not.
        self._matched = image.applied
        #: What a leader of this epoch has said to be committed; honoured up to what matches.
        self._told_commit = image.applied
        self._pending: deque[Pending] = deque()
        self._number = self._durable_number = 0
        #: The numbers of the entries that began the filling and that end it.
        self._filling_number = 0
        self._whole_number: int | None = None

    # ---- what it is

    @property
    def end(self) -> Position:
        """Of the log, durable or not."""
        return self._run.end

    @property
    def applied(self) -> Position:
        """As of the last checkpoint."""
        return self._applied

    @property
    def whole(self) -> bool:
        return self.filling is None

    @property
    def generation(self) -> Generation:
        """The layer that a write behind `end` belongs to; of no meaning while filling."""
        return self._generation if self._run.last is None else generation_after(self._run.last)

    @property
    def acked(self) -> Position:
        """At or above every position that was ever acked; never falls, but for a floor that is unknown."""
        return self._acked

    @property
    def unapplied_bytes(self) -> int:
        """What the records take in memory: a checkpoint frees those that are committed."""
        return self._run.size_bytes + RECORD_OVERHEAD_BYTES * len(self._run)

    @property
    def durable_end(self) -> Position:
        """Of the log that is on disk; for a moment lower than what was acked, while a tail is being replaced."""
        position = self._run.position_at(self._durable)
        assert position is not None
        return position

    @property
    def _durable_match(self) -> Position:
        return earlier(self._matched, self.durable_end)

    @property
    def _needs_delta(self) -> bool:
        """Whether content below the log's start is missing, rather than only trust."""
        return copies(self.filling)

    # ---- epochs

    def _fences(self, epoch: Epoch, configuration: int) -> bool:
        return epoch < self.epoch or configuration < self.configuration

    def _promise(self, epoch: Epoch, configuration: int) -> None:
        """Nothing older is accepted from here on; what an older leader vouched for counts no more."""
        if epoch != self.epoch:
            self._matched = self._told_commit = self.commit
        self.epoch, self.configuration = epoch, configuration

    # ---- records

    def _take(self, records: Seq[Record]) -> tuple[list[LogEntry], bool]:
        """Entries for those records that are new here; False where the predecessor is missing."""
        run = self._run
        for index, record in enumerate(records):
            if record.sequence <= run.start.sequence or run.holds(record.position):
                continue
            if run.position_at(record.sequence - 1) != record.previous:
                return [], False
            return self._extend(records[index:]), True
        return [], True

    def _extend(self, records: Seq[Record]) -> list[LogEntry]:
        """The records join the log in place of whatever stands there."""
        entries: list[LogEntry] = []
        first = records[0]
        if not len(self._run):
            self._generation = self._applied_generation = first.generation
        if first.sequence <= self._run.end.sequence:
            entries.append(self._cut(first.previous, records[-1].position))
        for record in records:
            self._run.append(record)
            entries.append(RecordEntry(record))
        return entries

    def _cut(self, after: Position, new_end: Position) -> LogEntry:
        """Drop the tail behind `after`, for a log that then ends at `new_end`.

        A position never falls: where the new end is below the old one, which a leader's resent older
        records can bring about, the replica fills (without copying) until it is above that again.
        """
        if after.sequence < self.commit.sequence:
            raise Corrupt(f"{self.replica}: asked to cut its log at {tuple(after)}, below its commit {self.commit}")
        old_end = self._run.end
        self._keep_what_is_on_disk()
        self._run.truncate(after.sequence)
        self._durable = min(self._durable, after.sequence)
        if (self.filling is None or self._whole_number is not None) and new_end < old_end:
            return self._begin_filling(Filling(old_end, after, after.sequence))
        return TruncateEntry(after.sequence)

    def _begin_filling(self, filling: Filling) -> FillingEntry:
        """The entry that says so; what was about to end an earlier filling counts no more."""
        self._keep_what_is_on_disk()
        self.filling = filling
        self._whole_number = None
        return FillingEntry(filling)

    # ---- durable

    def _persist(self, *entries: LogEntry, acks: Epoch | None = None) -> Persist:
        self._number += 1
        self._pending.append(Pending(self._number, self._run.end, entries, acks))
        if isinstance(entries[0], FillingEntry):
            self._filling_number = self._number
        return Persist(self._number, entries)

    def _confirmed(self, number: int) -> Iterator[Pending]:
        """What waited for the journal to hold all up to `number`, in order, each when its own is durable."""
        self._durable_number = number
        while self._pending and self._pending[0].number <= number:
            pending = self._pending.popleft()
            if self._on_disk is not None:
                for entry in pending.entries:
                    replay_entry(self._on_disk, entry)
            if self._run.holds(pending.end):
                self._durable = max(self._durable, pending.end.sequence)
            yield pending
        if number >= self._same_again:
            self._on_disk = None

    def _note_known(self, acked: AckedPositions) -> None:
        """A leader names all other members: who is not named is no member any more."""
        if acked:
            known = dict(self._known)
            self._known = tuple((peer, max(known.get(peer, ORIGIN), position)) for peer, position in acked)

    def _note_acked(self) -> None:
        if self.filling is None:
            self._acked = max(self._acked, self.durable_end)
        elif self.filling.floor != UNKNOWN_FLOOR:
            self._acked = max(self._acked, self.filling.floor)

    # ---- the leader's, and committed

    def _match(self, position: Position) -> None:
        if position.sequence > self._matched.sequence:
            self._matched = position

    def _match_below(self, position: Position) -> None:
        """The leader's log holds `position`, and so all records of its epoch below: one leader wrote them."""
        held = self._run.last_of(position.epoch, position.sequence)
        if held is not None:
            self._match(held)

    def _advance_commit(self) -> list[FollowerEffect]:
        target = earlier(self._told_commit, self._durable_match)
        if target.sequence <= self.commit.sequence:
            return []
        records = self._run.between(self.commit.sequence, target.sequence)
        assert records[-1].position == target, (records[-1].position, target)
        self.commit = target
        self._generation = generation_after(records[-1])
        return [Commit(records)]

    # ---- checkpoints, and peers

    def image(self) -> LogImage:
        """For a checkpoint that applies everything committed so far."""
        image = self._image(self.commit, self._generation)
        if image.filling is None:
            self._applied_as_whole = max(self._applied_as_whole, image.applied)
        return image

    def image_of_log(self) -> LogImage:
        """For tables that can apply nothing more just now: the log behind what they hold."""
        return self._image(self._applied, self._applied_generation)

    def _image(self, applied: Position, generation: Generation) -> LogImage:
        run, durable, filling = self._run, self._durable, self.filling
        if self._on_disk is not None:
            run, filling = self._on_disk.run, self._on_disk.filling
            durable = run.end.sequence
            if not run.holds(applied):  # of a log that began anew, and that a crash may not find
                applied, generation = run.start, self._on_disk_generation
        records = run.between(applied.sequence, durable)
        return LogImage(
            applied, self.epoch, self.configuration, filling, records, generation, self._copied, self._known
        )

    def _keep_what_is_on_disk(self) -> None:
        """An image must not show more than the journal: what is about to change may never get there.

        Entries before it may: an end of an earlier filling would end, on replay, one that only the image knows of.
        """
        if self._on_disk is None:
            self._on_disk = replay(self._image(self._applied, self._applied_generation), ())
            self._on_disk_generation = self._applied_generation
        self._same_again = self._number + 1

    def _forget_on_disk(self, image: LogImage) -> None:
        """A checkpoint that was under way has ended: no later image applies less."""
        disk = self._on_disk
        if disk is not None and disk.run.holds(image.applied):
            disk.run.forget(image.applied)
            self._on_disk_generation = image.generation

    def records(self, after: Position, up_to: Position) -> tuple[Record, ...] | None:
        """For a peer that fills a gap; None where this memory does not hold all of it, or while filling."""
        if self.filling is not None or not self._run.holds(after) or not self._run.holds(up_to):
            return None
        return self._run.between(after.sequence, up_to.sequence)
