"""One replica's side of the log: what it accepts, acks, commits, and how it becomes whole again.

Pure: messages and the journal's confirmations in, effects out. Source: docs/replication.md (the
numbers of the rules are those of that page); Raft, sections 5.3 and 5.4.

Invariants:
- an ack, or the answer to a seal, never rests on anything that is not durable here;
- after a seal was accepted, nothing of an older epoch or configuration is acked;
- `commit` <= what is durable here and matches the leader's log; nothing at or below it is cut;
- while filling, `floor` is at or above every position that was ever acked, and no ack counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from blockstore.domain import ORIGIN, Position, ReplicaId
from blockstore.errors import Conflict, Corrupt, Fenced, QuorumUnavailable
from blockstore.log import (
    UNKNOWN_FLOOR,
    Filling,
    FillingEntry,
    LogEntry,
    LogImage,
    RecordEntry,
    SealEntry,
    TruncateEntry,
    WholeEntry,
)
from blockstore.record import Record
from blockstore.replication.catch_up import DeltaCopy, LogFetch
from blockstore.replication.messages import (
    Answer,
    Append,
    AppendAnswer,
    CatchUp,
    Checkpoint,
    Commit,
    FencedBy,
    FetchDelta,
    FetchLog,
    FollowerEffect,
    Persist,
    ResetLog,
    SealAnswer,
    SealEpoch,
)
from blockstore.replication.record_run import RecordRun, earlier, generation_after
from blockstore.replication.replay import Replayed, copies, replay, replay_entry
from blockstore.units import Epoch, Generation


@dataclass(slots=True)
class _Pending:
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


class Follower:
    """The replica `replica`; see the module. One event at a time, effects carried out in order."""

    def __init__(self, replica: ReplicaId, image: LogImage) -> None:
        self.replica = replica
        self.full = False
        self.epoch: Epoch = image.epoch
        self.configuration = image.configuration
        self.filling: Filling | None = image.filling
        self.commit: Position = image.applied
        self._run = RecordRun(image.applied, image.records)
        self._applied = image.applied
        self._copied = image.copied
        self._generation = self._applied_generation = image.generation
        self._acked = ORIGIN
        #: The current log is durable up to this sequence.
        self._durable: int = self._run.end.sequence
        #: While a cut is not durable: the log as it is on disk, with the tail that the cut takes away.
        self._on_disk: Replayed | None = None
        self._cut_number = 0
        #: Up to here the log is the leader's, whether durable or not.
        self._matched = image.applied
        #: What a leader of this epoch has said to be committed; honoured up to what matches.
        self._told_commit = image.applied
        #: Sealed since this object was made: appends of streams from before its restart are refused.
        self._sealed = False
        self._pending: deque[_Pending] = deque()
        self._number = self._durable_number = 0
        #: The numbers of the entries that began the filling and that end it.
        self._filling_number = 0
        self._whole_number: int | None = None
        #: Whose Append came last, and its request.
        self._stream: tuple[Hashable, int] | None = None
        self._behind = False
        self._attempt = 0
        self._fetch: LogFetch | None = None
        self._delta = DeltaCopy()
        self._checkpoint_asked = False

    @classmethod
    def restore(
        cls, replica: ReplicaId, image: LogImage, entries: Iterable[LogEntry], *, damage: Position | None = None
    ) -> tuple[Follower, list[FollowerEffect]]:
        """The replica as its last checkpoint and the journal after it leave it, and what to do first.

        damage: at or above all that it may have acked, where entries of it are lost; it then fills.
        """
        state = replay(image, entries)
        floor = damage if damage is not None else UNKNOWN_FLOOR if state.gap else None
        unfinished = floor is not None and copies(image.filling) and not copies(state.filling)
        if unfinished:  # what ended it may be older than the image, and what began it again may be lost
            state.filling = image.filling
        follower = cls(replica, image)
        follower.epoch, follower.configuration = state.epoch, state.configuration
        follower.filling = state.filling
        follower._run = state.run
        follower.commit = follower._applied = follower._matched = follower._told_commit = state.run.start
        follower._durable = state.run.end.sequence
        follower._acked = ORIGIN if state.filling else state.run.end
        if len(state.run):
            follower._generation = follower._applied_generation = state.run.first.generation
        if floor is None:
            return follower, []
        return follower, follower._distrust(max(floor, state.highest), anew=state.gap or unfinished)

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
        """Bytes of the records in memory: a checkpoint frees those that are committed."""
        return self._run.size_bytes

    @property
    def _durable_end(self) -> Position:
        position = self._run.position_at(self._durable)
        assert position is not None
        return position

    @property
    def _durable_match(self) -> Position:
        return earlier(self._matched, self._durable_end)

    @property
    def _needs_delta(self) -> bool:
        """Whether content below the log's start is missing, rather than only trust."""
        return copies(self.filling)

    # ---- rule 1: seals

    def seal(self, origin: Hashable, message: SealEpoch) -> list[FollowerEffect]:
        """Accept nothing older from here on; answered when all that was accepted before is durable."""
        if self._fences(message.epoch, message.configuration):
            return [Answer(origin, FencedBy(self.epoch, self.configuration))]
        effects: list[FollowerEffect] = []
        if (message.epoch, message.configuration) != (self.epoch, self.configuration):
            effects.append(self._enter(message))
        self._sealed = True
        effects += self.know_acked(message.known)
        if self._pending:
            self._pending.append(_Pending(self._number, self._run.end, seal=message, origin=origin))
        else:
            effects.append(self._seal_answer(origin, message))
        return effects

    def _enter(self, message: SealEpoch) -> Persist:
        self._promise(message.epoch, message.configuration)
        return self._persist(SealEntry(message.epoch, message.configuration))

    def _promise(self, epoch: Epoch, configuration: int) -> None:
        """Nothing older is accepted from here on; what an older leader vouched for counts no more."""
        if epoch != self.epoch:
            self._matched = self._told_commit = self.commit
            self._fetch = None
        self.epoch, self.configuration = epoch, configuration
        self._stream, self._behind = None, False

    def _fences(self, epoch: Epoch, configuration: int) -> bool:
        return epoch < self.epoch or configuration < self.configuration

    def _seal_answer(self, origin: Hashable, message: SealEpoch) -> Answer:
        if (message.epoch, message.configuration) != (self.epoch, self.configuration):
            return Answer(origin, FencedBy(self.epoch, self.configuration))
        known = max(self.commit, self._copied) if self.filling else self.commit
        floor = self.filling.floor if self.filling else ORIGIN
        end = self._durable_end
        self._note_acked()
        return Answer(
            origin,
            SealAnswer(
                self.epoch, self.configuration, end, known, self._applied, self.whole, floor, self.generation, self.full
            ),
        )

    # ---- rule 2: records

    def append(self, origin: Hashable, message: Append) -> list[FollowerEffect]:
        """Records, or a heartbeat: acked when what they bring is durable.

        Raises Conflict where this epoch was not sealed since this replica started: the stream has to
        end, so that the leader seals again and hears what is here.
        """
        if self._fences(message.epoch, message.configuration):
            return [Answer(origin, FencedBy(self.epoch, self.configuration))]
        if not self._sealed or (message.epoch, message.configuration) != (self.epoch, self.configuration):
            raise Conflict(f"{self.replica}: epoch {message.epoch} was not sealed since it started; seal it again")
        self._stream = (origin, message.request)
        effects: list[FollowerEffect] = []
        entries, follows = self._take(message.records)
        if message.records:
            self._behind = not follows
            if follows:
                self._match(message.records[-1].position)
        self._learn(message)
        effects.append(self._persist(*entries, acks=self.epoch) if entries else self._ack())
        if self.filling and self.filling.floor == UNKNOWN_FLOOR and message.end.epoch == self.epoch:
            effects.append(self._persist(*self._fill_above(message.end), acks=self.epoch))
        if message.catch_up is not None:
            effects += self._catch_up_by(message.catch_up)
        effects += self._go_on()
        return effects

    def _learn(self, message: Append) -> None:
        """Where the leader's log ends and what it has committed; both may show that this log matches."""
        if self._matched != self._run.end:
            self._match_below(message.end)
            self._match_below(message.commit)
        self._told_commit = max(self._told_commit, message.commit)

    def _match(self, position: Position) -> None:
        if position.sequence > self._matched.sequence:
            self._matched = position

    def _match_below(self, position: Position) -> None:
        """The leader's log holds `position`, and so all records of its epoch below: one leader wrote them."""
        held = self._run.last_of(position.epoch, position.sequence)
        if held is not None:
            self._match(held)

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
        if self._on_disk is None and self._durable > after.sequence:
            self._on_disk = replay(self._image(self._applied, self._applied_generation), ())
        self._cut_number = self._number + 1
        self._run.truncate(after.sequence)
        self._durable = min(self._durable, after.sequence)
        if (self.filling is None or self._whole_number is not None) and new_end < old_end:
            return self._begin_filling(Filling(old_end, after, after.sequence))
        return TruncateEntry(after.sequence)

    def _persist(self, *entries: LogEntry, acks: Epoch | None = None) -> Persist:
        self._number += 1
        self._pending.append(_Pending(self._number, self._run.end, entries, acks))
        if isinstance(entries[0], FillingEntry):
            self._filling_number = self._number
        return Persist(self._number, entries)

    def persisted(self, number: int) -> list[FollowerEffect]:
        """The journal holds all entries up to this number: acks may leave."""
        effects: list[FollowerEffect] = []
        ack = False
        self._durable_number = number
        while self._pending and self._pending[0].number <= number:
            pending = self._pending.popleft()
            if self._on_disk is not None:
                for entry in pending.entries:
                    replay_entry(self._on_disk, entry)
            if self._run.holds(pending.end):
                self._durable = max(self._durable, pending.end.sequence)
            if pending.number == self._whole_number:
                self.filling = self._whole_number = None
                ack = True
            if pending.seal is not None:
                effects.append(self._seal_answer(pending.origin, pending.seal))
            ack = ack or pending.acks == self.epoch
        if number >= self._cut_number:
            self._on_disk = None
        if ack and self._stream is not None:
            effects.append(self._ack())
        effects += self._go_on()
        return effects

    def _ack(self) -> Answer:
        """Cumulative: to the newest request of the stream, of all that is durable and matches."""
        assert self._stream is not None
        origin, request = self._stream
        delta = self._delta
        self._note_acked()
        return Answer(
            origin,
            AppendAnswer(
                self.epoch,
                request,
                self._durable_match,
                self.commit,
                self._durable_end,
                self.whole,
                self.full,
                self._behind,
                delta.extents_done,
                delta.extents_total,
            ),
        )

    def _note_acked(self) -> None:
        if self.filling is None:
            self._acked = max(self._acked, self._durable_end)
        elif self.filling.floor != UNKNOWN_FLOOR:
            self._acked = max(self._acked, self.filling.floor)

    # ---- rules 3 and 4: commit and reads

    def _go_on(self) -> list[FollowerEffect]:
        """What has become possible: to commit, to copy, to become whole."""
        effects: list[FollowerEffect] = self._advance_commit()
        if self.filling is not None:
            effects += self._copy_if_due()
            effects += self._finish_filling()
        return effects

    def _advance_commit(self) -> list[FollowerEffect]:
        target = earlier(self._told_commit, self._durable_match)
        if target.sequence <= self.commit.sequence:
            return []
        records = self._run.between(self.commit.sequence, target.sequence)
        assert records[-1].position == target, (records[-1].position, target)
        self.commit = target
        self._generation = generation_after(records[-1])
        return [Commit(records)]

    def read(self, epoch: Epoch, configuration: int, commit: Position) -> list[FollowerEffect]:
        """Whether a read that carries this commit may be answered; effects to carry out before it is.

        Raises Fenced where the reader is of an older epoch, QuorumUnavailable where this replica lacks
        something that is committed.
        """
        if self._fences(epoch, configuration):
            raise Fenced(f"{self.replica}: epoch {epoch} is over, {self.epoch} was sealed; attach again")
        if (epoch, configuration) != (self.epoch, self.configuration):
            raise QuorumUnavailable(f"{self.replica}: epoch {epoch} was not sealed here yet")
        if self.filling is not None:
            raise QuorumUnavailable(f"{self.replica} is filling and serves no reads")
        if self._run.holds(commit):
            self._match(commit)
            self._told_commit = max(self._told_commit, commit)
        reachable = max(self.commit, earlier(self._told_commit, self._durable_match))
        if reachable < commit:  # nothing is committed then: what is raised carries no effects
            raise QuorumUnavailable(f"{self.replica} can commit up to {reachable}, the read needs {commit}")
        return self._advance_commit()

    # ---- rule 6: catching up

    def _catch_up_by(self, catch_up: CatchUp) -> list[FollowerEffect]:
        peers = [peer for peer in catch_up.peers if peer != self.replica]
        if not self._delta.running:
            self._delta.peers = peers
        if self._fetch is not None or catch_up.target.sequence <= self._run.start.sequence:
            return []
        self._match_below(catch_up.target)
        if self._run.holds(catch_up.target):
            return []
        self._fetch = LogFetch(catch_up, list(peers))
        return self._ask_next_peer()

    def _ask_next_peer(self) -> list[FollowerEffect]:
        fetch = self._fetch
        assert fetch is not None
        if not fetch.peers:
            self._fetch = None
            return self._fill_from(fetch.catch_up) if fetch.refused else []
        self._attempt += 1
        fetch.attempt = self._attempt
        target = fetch.catch_up.target
        return [FetchLog(fetch.attempt, fetch.peers.pop(0), self._matched, target)]

    def log_fetched(self, attempt: int, records: tuple[Record, ...]) -> list[FollowerEffect]:
        """Records that the peer holds below the target, behind those it sent before."""
        if self._fetch is None or self._fetch.attempt != attempt:
            return []
        entries, follows = self._take(records)
        if not follows:
            return self._ask_next_peer()
        if records and self._run.holds(records[-1].position):
            self._match(records[-1].position)
        effects: list[FollowerEffect] = [self._persist(*entries, acks=self.epoch)] if entries else []
        return effects + self._go_on()

    def log_ended(self, attempt: int) -> list[FollowerEffect]:
        """The peer has sent all up to the target."""
        fetch = self._fetch
        if fetch is None or fetch.attempt != attempt:
            return []
        target = fetch.catch_up.target
        if not self._run.holds(target) and target.sequence > self._run.start.sequence:
            return self._ask_next_peer()
        self._fetch = None
        if self._run.holds(target):
            self._match(target)
        effects: list[FollowerEffect] = [self._ack()] if self._stream is not None else []
        return effects + self._go_on()

    def log_not_held(self, attempt: int) -> list[FollowerEffect]:
        """The peer no longer holds the gap. When none does, the tables are copied."""
        if self._fetch is None or self._fetch.attempt != attempt:
            return []
        self._fetch.refused = True
        return self._ask_next_peer()

    def fetch_failed(self, attempt: int) -> list[FollowerEffect]:
        """The peer did not answer, or not with what was asked for."""
        if self._fetch is None or self._fetch.attempt != attempt:
            return []
        return self._ask_next_peer()

    def _fill_from(self, catch_up: CatchUp) -> list[FollowerEffect]:
        """No peer holds the gap: the log starts anew at the base, and the tables are copied.

        Nothing is given up that others lack: the base is committed and not in this log, so a quorum
        without this replica held it, and all before it.
        """
        base = catch_up.base
        if base > self._told_commit or base.sequence <= self.commit.sequence:
            return []
        if self._run.holds(base):
            self._match(base)
            return self._advance_commit()
        floor = self.filling.floor if self.filling else max(self._run.end, self._acked)
        since = self.filling.since if self.filling and self._needs_delta else self._applied.sequence
        self._run, self._on_disk = RecordRun(base), None
        self._durable = base.sequence
        self.commit = self._applied = self._matched = base
        entry = self._begin_filling(Filling(floor, base, since))
        self._behind = False
        return [self._persist(entry, acks=self.epoch), ResetLog()]

    def _begin_filling(self, filling: Filling) -> FillingEntry:
        self.filling = filling
        self._delta = DeltaCopy(self._delta.peers)
        self._fetch = None
        self._checkpoint_asked = False
        self._whole_number = None
        return FillingEntry(filling)

    def _distrust(self, floor: Position, *, anew: bool = False) -> list[FollowerEffect]:
        """What stands here is right but may not be all that was acked: fill, and keep what there is.

        Nothing has to be copied for that, but for what a filling under way was copying already.
        anew: the journal does not say all of that yet, even where a filling is under way with that floor.
        """
        floor = max(floor, self.filling.floor) if self.filling is not None else floor
        if self.filling is not None and floor == self.filling.floor and not anew:
            return []
        return [self._persist(*self._fill_above(floor), *self._promise_of(floor))]

    def _fill_above(self, floor: Position) -> tuple[LogEntry, ...]:
        """Fill from here on, with that floor.

        An unknown one becomes known as where the log ends of the leader that takes this replica in: it
        made sure that no newer epoch had chosen a log with an answer that was lost here, so what was acked
        before is of an older epoch, or in that very log.
        """
        if self.filling is not None and self._needs_delta:
            return self._begin_filling_again(self.filling, floor)
        base = self._run.end
        return (self._begin_filling(Filling(floor, base, base.sequence)),)

    def _promise_of(self, floor: Position) -> tuple[LogEntry, ...]:
        """Who acked in an epoch had sealed it, even if that was lost since."""
        if floor == UNKNOWN_FLOOR or floor.epoch <= self.epoch:
            return ()
        self._promise(floor.epoch, self.configuration)
        return (SealEntry(floor.epoch, self.configuration),)

    def _begin_filling_again(self, filling: Filling, floor: Position) -> tuple[LogEntry, ...]:
        """The same copy with a higher floor. A record stays behind the base: it says which generation is current."""
        last = self._run.last
        if last is None or filling.base.sequence < self._run.start.sequence:
            return (self._begin_filling(replace(filling, floor=floor)),)
        return self._begin_filling(Filling(floor, last.previous, filling.since)), RecordEntry(last)

    def know_acked(self, position: Position) -> list[FollowerEffect]:
        """Rule 10: somebody knows that this replica acked up to `position`. Below it, it is an old copy."""
        if self.filling is not None or position <= self._run.end or position <= self._acked:
            return []
        return self._distrust(position)

    # ---- rule 6: copying

    def _copy_if_due(self) -> list[FollowerEffect]:
        """Ask the next peer for its tables, once the `filling` entry is durable."""
        delta = self._delta
        if delta.running or delta.complete or not delta.peers or not self._needs_delta:
            return []
        if self._durable_number < self._filling_number:
            return []
        assert self.filling is not None
        self._attempt += 1
        peer = delta.peers.pop(0)
        self._delta = DeltaCopy(delta.peers, self._attempt, running=True)
        return [FetchDelta(self._attempt, peer, self.filling.since, self._copy_at_least)]

    @property
    def _copy_at_least(self) -> Position:
        """No copy is older than one that is here already: tombstones below that may be gone."""
        assert self.filling is not None
        return max(self.filling.base, self._copied)

    def accept_copy(self, attempt: int, applied: Position) -> LogImage | None:
        """The image for a transaction that writes a copy stated at `applied`; None where the copy is void.

        The image applies nothing: no checkpoint may end between this call and the transaction.
        """
        if not self._delta_is(attempt) or applied < self._copy_at_least:
            return None
        self._copied = max(self._copied, applied)
        return self._image(self._applied, self._applied_generation)

    def _delta_is(self, attempt: int) -> bool:
        return self._delta.running and self._delta.attempt == attempt

    def delta_progress(self, attempt: int, done: int, total: int) -> None:
        """So many of the extents are copied; for status only."""
        if self._delta_is(attempt):
            self._delta.extents_done, self._delta.extents_total = done, total

    def delta_done(self, attempt: int) -> list[FollowerEffect]:
        """Every extent is copied, in synced transactions."""
        if not self._delta_is(attempt):
            return []
        self._delta.running, self._delta.complete = False, True
        return self._go_on()

    def delta_failed(self, attempt: int) -> list[FollowerEffect]:
        """The peer did not bring it to its end: the next one begins from scratch."""
        if not self._delta_is(attempt):
            return []
        self._delta.running = False
        return self._go_on()

    def _finish_filling(self) -> list[FollowerEffect]:
        """Whole again once all is copied, the tables are past every copy, and the floor is reached."""
        if self._whole_number is not None or self._durable_number < self._filling_number:
            return []
        if self._needs_delta:
            if not self._delta.complete or not self._past_copies():
                return []
            if self._applied.sequence < self._copied.sequence:
                asked, self._checkpoint_asked = self._checkpoint_asked, True
                return [] if asked else [Checkpoint()]
        if not self._floor_reached():
            return []
        effect = self._persist(WholeEntry())
        self._whole_number = effect.number
        return [effect]

    def _past_copies(self) -> bool:
        """A record behind the base is here, too: it says which generation is current."""
        assert self.filling is not None
        behind_base = self._durable_match.sequence > self.filling.base.sequence
        return behind_base and self.commit.sequence >= self._copied.sequence

    def _floor_reached(self) -> bool:
        """Whether the log is durable, and the leader's, at or above all that was ever acked."""
        assert self.filling is not None
        return self._durable_match >= self.filling.floor

    # ---- checkpoints, and peers

    def image(self) -> LogImage:
        """For a checkpoint that applies everything committed so far."""
        return self._image(self.commit, self._generation)

    def _image(self, applied: Position, generation: Generation) -> LogImage:
        run, durable = self._run, self._durable
        if self._on_disk is not None:
            run, durable = self._on_disk.run, self._on_disk.run.end.sequence
        records = run.between(applied.sequence, durable)
        return LogImage(applied, self.epoch, self.configuration, self.filling, records, generation, self._copied)

    def checkpointed(self, image: LogImage) -> list[FollowerEffect]:
        """The tables hold this image, synced. One from before the log began anew is of no use here."""
        if image.filling != self.filling or image.applied.sequence <= self._applied.sequence:
            return []
        self._run.forget(image.applied)
        self._applied, self._applied_generation = image.applied, image.generation
        self._checkpoint_asked = False
        return self._go_on()

    def records(self, after: Position, up_to: Position) -> tuple[Record, ...] | None:
        """For a peer that fills a gap; None where this memory does not hold all of it, or while filling."""
        if self.filling is not None or not self._run.holds(after) or not self._run.holds(up_to):
            return None
        return self._run.between(after.sequence, up_to.sequence)
