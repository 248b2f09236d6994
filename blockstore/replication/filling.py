"""How a replica gets what it lacks: from its peers' logs, else as copies of their tables.

The middle of three layers (replica_log, this, follower). Invariants:
- while filling, `floor` is at or above every position that was ever acked, and no ack counts;
- nothing is copied before the entry that begins the filling is durable;
- whole again only when all is copied, the tables are past every copy, and the floor is reached.
Source: docs/replication.md, rules 6 and 10.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from blockstore.domain import Position, ReplicaId
from blockstore.log import (
    UNKNOWN_FLOOR,
    Filling,
    FillingEntry,
    LogEntry,
    LogImage,
    RecordEntry,
    SealEntry,
    WholeEntry,
)
from blockstore.record import Record
from blockstore.replication.catch_up import DeltaCopy, LogFetch
from blockstore.replication.messages import (
    Answer,
    AppendAnswer,
    CatchUp,
    Checkpoint,
    FetchDelta,
    FetchLog,
    FollowerEffect,
    ResetLog,
)
from blockstore.replication.record_run import RecordRun
from blockstore.replication.replica_log import ReplicaLog
from blockstore.units import Epoch, Sequence


class FillingReplica(ReplicaLog):
    """A log that catches up. full: short of space; damaged: see `content_lost`. Both go out with every answer."""

    def __init__(self, replica: ReplicaId, image: LogImage) -> None:
        super().__init__(replica, image)
        self.full = False
        self.damaged = False
        #: Whose Append came last, and its request.
        self._stream: tuple[Hashable, int] | None = None
        self._behind = False
        self._attempt = 0
        self._fetch: LogFetch | None = None
        self._delta = DeltaCopy()
        self._checkpoint_asked = False
        #: What the tables held when the filling began, or this object was made; or this attempt, if it copies all.
        self._tables_at_start = image.applied

    def _promise(self, epoch: Epoch, configuration: int) -> None:
        if epoch != self.epoch:
            self._fetch = None
        self._stream, self._behind = None, False
        super()._promise(epoch, configuration)

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
                self.durable_end,
                self.whole,
                self.full,
                self._behind,
                delta.extents_done,
                delta.extents_total,
                self.damaged,
            ),
        )

    def _go_on_filling(self) -> list[FollowerEffect]:
        """What has become possible: to copy, to become whole."""
        return [*self._copy_if_due(), *self._finish_filling()] if self.filling is not None else []

    @property
    def copied_extents(self) -> tuple[int, int]:
        """Of a copy under way: extents that are here, and all; (0, 0) where none is."""
        return self._delta.extents_done, self._delta.extents_total

    # ---- from a peer's log

    def _catch_up_by(self, catch_up: CatchUp) -> list[FollowerEffect]:
        peers = [peer for peer in catch_up.peers if peer != self.replica]
        if not self._delta.running:
            self._delta.peers = peers
        if self._fetch is not None or catch_up.target.sequence <= self._run.start.sequence:
            return []
        self._match_below(catch_up.target)
        effects = self._advance_commit()
        if self._run.holds(catch_up.target):
            return effects
        self._fetch = LogFetch(catch_up, list(peers))
        return effects + self._ask_next_peer()

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
        return effects + self._advance_commit() + self._go_on_filling()

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
        effects = self._advance_commit()
        if self._stream is not None:
            effects.append(self._ack())
        return effects + self._go_on_filling()

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

    # ---- to begin filling

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
        floor = self._floor if self.filling else max(self._run.end, self._acked)
        since = self.filling.since if self.filling and self._needs_delta else self._applied.sequence
        self._keep_what_is_on_disk()
        self._run = RecordRun(base)
        self._durable = base.sequence
        self.commit = self._applied = self._matched = base
        entry = self._begin_filling(Filling(floor, base, since))
        self._behind = False
        return [self._persist(entry, acks=self.epoch), ResetLog()]

    @property
    def _floor(self) -> Position:
        """That of the filling under way; the whole log, once the entry that ends the filling may be on disk."""
        assert self.filling is not None
        return self.filling.floor if self._whole_number is None else max(self.filling.floor, self._run.end)

    def _begin_filling(self, filling: Filling) -> FillingEntry:
        self._delta = DeltaCopy(self._delta.peers)
        self._fetch = None
        self._checkpoint_asked = False
        self._tables_at_start = self._applied
        return super()._begin_filling(filling)

    def _distrust(self, floor: Position, *, anew: bool = False) -> list[FollowerEffect]:
        """What stands here is right but may not be all that was acked: fill, and keep what there is.

        Nothing has to be copied for that, but for what a filling under way was copying already.
        anew: the journal does not say all of that yet, even where a filling is under way with that floor.
        """
        floor = max(floor, self._floor) if self.filling is not None else floor
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

    def _begin_filling_again(self, filling: Filling, floor: Position) -> tuple[LogEntry, ...]:
        """The same copy with a higher floor. A record stays behind the base: it says which generation is current."""
        last = self._run.last
        if last is None or filling.base.sequence < self._run.start.sequence:
            return (self._begin_filling(replace(filling, floor=floor)),)
        return self._begin_filling(Filling(floor, last.previous, filling.since)), RecordEntry(last)

    def _promise_of(self, floor: Position) -> tuple[LogEntry, ...]:
        """Who acked in an epoch had sealed it, even if that was lost since."""
        if floor == UNKNOWN_FLOOR or floor.epoch <= self.epoch:
            return ()
        self._promise(floor.epoch, self.configuration)
        return (SealEntry(floor.epoch, self.configuration),)

    def know_acked(self, position: Position) -> list[FollowerEffect]:
        """Rule 10: somebody knows that this replica acked up to `position`. Answering for less, it is an old copy.

        What is known lags behind what was acked, and what was promised is lost as well: the floor is unknown.
        """
        answers_for = self._floor if self.filling is not None else self._run.end
        if position <= max(answers_for, self._acked):
            return []
        return self._distrust(UNKNOWN_FLOOR)

    @property
    def copies_all(self) -> bool:
        """Whether everything is being copied, so that nothing which the tables hold is counted on."""
        return self.filling is not None and self._needs_delta and not self.filling.since

    def content_lost(self) -> list[FollowerEffect]:
        """The tables have lost something, and nobody can say what: everything is copied, over the log as it is.

        Only where the leader says so: it knows that a quorum without this one has everything. The log has no gap, so
        what a copy overtakes is applied in order again. A record stays behind the base, if only in the tables, where
        an image of the log holds none: it says which generation is current.
        """
        if self.copies_all or (self._needs_delta and not len(self._run)):
            return []  # what the next record tells is needed: which generation is current
        floor = self._floor if self.filling is not None else max(self._run.end, self._acked)
        run, commit = self._run, self.commit
        below = Position(commit.epoch, Sequence(max(0, commit.sequence - 1)))
        base = commit if run.end > commit else run.position_at(below.sequence) or below
        if not base.sequence:
            return []  # there was no content yet
        behind = run.between(max(base.sequence, run.start.sequence), run.end.sequence)
        filling = self._begin_filling(Filling(floor, base, Sequence(0)))
        self.damaged = False
        return [self._persist(filling, *map(RecordEntry, behind), acks=self.epoch)]

    # ---- copies of a peer's tables

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
        if self.copies_all:
            self._tables_at_start = self._applied
        return [FetchDelta(self._attempt, peer, self.filling.since, self._copy_at_least)]

    @property
    def _copy_at_least(self) -> Position:
        """No copy is older than one that is here already: tombstones below that may be gone.

        Nor than what the tables held when the filling began: entries that they have lost cannot stay. What
        they apply meanwhile is newer and stays: a source that checkpoints less often is none the worse. Only what a
        checkpoint applies that was begun before all this was durable keeps no tombstones: none of it may come back.
        """
        assert self.filling is not None
        return max(self.filling.base, self._copied, self._tables_at_start, self._applied_as_whole)

    def accept_copy(self, attempt: int, applied: Position, *, absent: bool = False) -> LogImage | None:
        """The image for a transaction that writes a copy stated at `applied`; None where the copy is void.

        absent: nothing comes with it; it takes away what the peer did not have when this attempt began.
        The image applies nothing: no checkpoint may end between this call and the transaction.
        """
        if not self._delta_is(attempt) or (applied < self._copy_at_least and not absent):
            return None
        self._copied = max(self._copied, applied)
        return self.image_of_log()

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
        return self._go_on_filling()

    def delta_failed(self, attempt: int) -> list[FollowerEffect]:
        """The peer did not bring it to its end: the next one begins from scratch."""
        if not self._delta_is(attempt):
            return []
        self._delta.running = False
        return self._go_on_filling()

    # ---- to be whole again

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
        """A record behind the base is here, too: it says which generation is current.

        A lower one of a later epoch will do, where the base was given up with a loss that was accepted.
        """
        assert self.filling is not None
        behind_base = self._durable_match > self.filling.base
        return behind_base and self.commit.sequence >= self._copied.sequence

    def _floor_reached(self) -> bool:
        """Whether the log is durable, and the leader's, at or above all that was ever acked."""
        assert self.filling is not None
        return self._durable_match >= self.filling.floor

    def checkpointed(self, image: LogImage) -> list[FollowerEffect]:
        """The tables hold this image, synced. One from before the log began anew is of no use here."""
        self._forget_on_disk(image)
        if image.applied.sequence <= self._applied.sequence or not self._run.holds(image.applied):
            return []
        self._run.forget(image.applied)
        self._applied, self._applied_generation = image.applied, image.generation
        self._checkpoint_asked = False
        return self._go_on_filling()
