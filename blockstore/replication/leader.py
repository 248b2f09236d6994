"""The front-end's side of the log: attach, order the guest's writes, know when they are safe.

Pure: requests, answers and the time in, effects out. Source: docs/replication.md (the numbers of the
rules are those of that page); Raft, sections 5.3 and 5.4.

Invariants:
- nothing is sent before the log is chosen (rule 1), no guest is served before the epoch's first
  record is on a quorum and no older lease can be left;
- a record is committed when a quorum of whole members has it on disk; the guest's answers and the
  commit position follow from that alone;
- records are numbered, sent and committed in one order, that of submission.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from blockstore.domain import ORIGIN, Configuration, Position, ReplicaId
from blockstore.errors import CairnError, Conflict, Corrupt, Fenced, InvalidRequest, NoSpace, QuorumUnavailable
from blockstore.log import UNKNOWN_FLOOR
from blockstore.record import Operation, OperationKind, Record, encode_record
from blockstore.replication.in_flight import Write
from blockstore.replication.member import NEVER, Member
from blockstore.replication.messages import (
    AckedPositions,
    Append,
    AppendAnswer,
    CatchUp,
    Completed,
    Failed,
    FencedBy,
    LeaderEffect,
    Over,
    Reconnect,
    Relieved,
    SealAnswer,
    Sealed,
    SealEpoch,
    Send,
    Serving,
)
from blockstore.replication.quorum import Quorum
from blockstore.replication.reads import Read, Reads
from blockstore.replication.record_run import RecordRun
from blockstore.replication.recovery import ChosenLog, answers_for, choose_log
from blockstore.replication.settings import LeaderSettings
from blockstore.replication.status import LeaderStatus, MemberStatus
from blockstore.replication.write_queue import WriteQueue
from blockstore.units import FIRST_GENERATION, BlockNumber, Epoch, Generation, Sequence

__all__ = ["Leader", "LeaderSettings", "LeaderStatus", "MemberStatus"]

#: What needs room on a node; trims, seals and the like make room or need next to none.
_NEEDS_ROOM = frozenset({OperationKind.WRITE, OperationKind.FILL, OperationKind.ZERO})


@dataclass(slots=True, eq=False)
class _InFlight:
    """A record of this epoch that is not committed yet; no writes for the one that opens the epoch."""

    position: Position
    generation: Generation
    writes: list[Write]


class Leader:
    """One attachment of one segment; see the module. `now` is the shell's boot-time clock, in seconds."""

    def __init__(
        self,
        epoch: Epoch,
        configuration: Configuration,
        settings: LeaderSettings,
        now: float,
        *,
        accept_loss: bool = False,
    ) -> None:
        """accept_loss: go on without what may have been acknowledged and cannot be found any more.

        Only after every member answered, or had settings.loss_wait_s to.
        """
        self.epoch = epoch
        self.configuration = configuration
        self.settings = settings
        self._accept_loss = accept_loss
        self._quorum = Quorum(configuration)
        self._members = {replica: Member(replica) for replica in self._quorum.replicas}
        self._reads = Reads(self._members.values(), settings.lease_s)
        self._over: CairnError | None = None
        self._serving = False
        self._why = "no member has answered yet"
        #: The members that answered this epoch's seal, and when a quorum of them had.
        self._answers: dict[ReplicaId, SealAnswer] = {}
        self._heard_quorum_at: float | None = None
        self._chosen: ChosenLog | None = None
        self._began = self._chosen_at = now
        self._run = RecordRun(ORIGIN)
        self._commit: Position = ORIGIN
        self._generation: Generation = FIRST_GENERATION
        self._in_flight: deque[_InFlight] = deque()
        self._writes = WriteQueue(settings.max_record_bytes, settings.queue_bytes)
        #: A quorum of whole members has confirmed this epoch to requests that were sent then or later.
        self._confirmed = self._lease_until = NEVER
        self._short_of_space = False
        self._hydrated = False

    @property
    def commit(self) -> Position:
        """Up to here everything is on a quorum; never falls."""
        return self._commit

    @property
    def serving(self) -> bool:
        return self._serving

    @property
    def congested(self) -> bool:
        """So much waits that no more should be submitted until Relieved."""
        return self._writes.congested

    # ---- the members

    def connected(self, replica: ReplicaId, now: float) -> list[LeaderEffect]:
        """The way to this member is open, again or for the first time."""
        if self._over is not None:
            return []
        member = self._members[replica]
        member.open(now)
        return [Send(replica, SealEpoch(self.epoch, self.configuration.number, member.acked))]

    def disconnected(self, replica: ReplicaId, now: float) -> list[LeaderEffect]:
        """Everything under way to this member may be lost."""
        if self._over is not None:
            return []
        self._members[replica].close()
        self._note_space()
        return self._reads.member_lost(replica, self._commit, now)

    def answered(
        self, replica: ReplicaId, message: SealAnswer | AppendAnswer | FencedBy, now: float
    ) -> list[LeaderEffect]:
        """What a member said to a SealEpoch or an Append of this leader."""
        if self._over is not None:
            return []
        member = self._members[replica]
        match message:
            case FencedBy(epoch, _):
                return self._end(Fenced(f"epoch {self.epoch} is over: {replica} was sealed by epoch {epoch}"))
            case SealAnswer():
                return self._sealed(member, message, now)
            case AppendAnswer():
                return self._acked(member, message, now)

    # ---- rule 1: attach

    def _sealed(self, member: Member, answer: SealAnswer, now: float) -> list[LeaderEffect]:
        if answer.epoch != self.epoch or not member.connected:
            return []
        member.take_seal(answer)
        self._renew_lease()
        self._note_space()
        self._answers[member.replica] = answer
        if self._heard_quorum_at is None and self._quorum.reached(self._answers):
            self._heard_quorum_at = now
        effects = self._learn(member, answer, now)
        if self._chosen is None:
            effects += self._choose(now)
        elif member.sealed and answer.floor == UNKNOWN_FLOOR:
            member.doubt(now)
        elif member.sealed:
            effects += self._rejoin(member, self._chosen, now)
        if self._over is None:
            effects += self._advance(now)
            effects += self._reads.retry(self._commit, now)
        return effects

    def _learn(self, member: Member, answer: SealAnswer, now: float) -> list[LeaderEffect]:
        """Rule 10: who answers for less than what it is known to have acked is an old copy that was put back."""
        if answer.whole:
            member.acked = max(member.acked, answer.end)
        effects: list[LeaderEffect] = []
        for replica, position in ((member.replica, member.acked), *answer.known):
            peer = self._members.get(replica)
            if peer is None or (peer is not member and position <= peer.acked):
                continue
            peer.acked = position
            if peer.sealed and answers_for(self._answers[replica]) < position:
                effects += self._distrust(peer, now)
        return effects

    def _distrust(self, member: Member, now: float) -> list[LeaderEffect]:
        """From here on it is filling, whatever it said; sealed again with what is known, it makes that durable."""
        answer = self._answers[member.replica]
        self._answers[member.replica] = replace(answer, whole=False, floor=UNKNOWN_FLOOR)
        member.whole = False
        return [*self.disconnected(member.replica, now), Reconnect(member.replica)]

    def _choose(self, now: float) -> list[LeaderEffect]:
        """Take the log to go on with, if that can be said already, and open the epoch behind it.

        Only answers of connections that stand count: a member that restarts may have lost its promise.
        """
        answers = {replica: answer for replica, answer in self._answers.items() if self._members[replica].sealed}
        waited = len(answers) == len(self._members) or now - self._began >= self.settings.loss_wait_s
        chosen = choose_log(self._quorum, answers, accept_loss=self._accept_loss and waited)
        if not isinstance(chosen, ChosenLog):
            self._why = chosen.why
            return self._end(Corrupt(f"acknowledged writes may be lost: {chosen.why}")) if chosen.lost else []
        self._chosen, self._chosen_at = chosen, now
        self._why = "the record that opens the epoch is not on a quorum yet"
        self._run = RecordRun(chosen.end)
        self._commit = chosen.committed
        self._generation = chosen.generation
        self._append_record((Operation(OperationKind.EPOCH_START),), [])
        effects: list[LeaderEffect] = []
        for member in self._members.values():
            if member.sealed:
                effects += self._rejoin(member, chosen, now)
        return effects

    def _take_in(self, now: float) -> list[LeaderEffect]:
        """Go on with members that may have lost a promise, once a quorum without them knows of no newer epoch.

        Such an epoch cannot have rested on that promise then, and none that comes later does.
        """
        assert self._chosen is not None
        effects: list[LeaderEffect] = []
        for member in self._members.values():
            if member.doubted_at is not None and self._confirmed > member.doubted_at:
                member.trust()
                effects += self._rejoin(member, self._chosen, now)
        return effects

    def _rejoin(self, member: Member, chosen: ChosenLog, now: float) -> list[LeaderEffect]:
        """Go on with a member from what its seal's answer says that it holds."""
        answer = self._answers[member.replica]
        member.foreign = answer.commit.epoch != self.epoch and answer.commit > chosen.end
        if member.foreign:
            member.whole = False
            member.fall_back()
            return []
        if self._commit < answer.commit <= chosen.end:
            self._commit = answer.commit  # committed in an older epoch; only this member had heard of it
        certain = answer.end
        if not self._in_log(answer.end, chosen):
            certain = answer.commit if answer.whole else ORIGIN
        member.matched = certain
        if certain.sequence < self._run.start.sequence:
            member.fall_back()
            return [self._heartbeat(member, now)]
        member.stream_from(certain.sequence + 1)
        effects = self._stream(member, now)
        return effects or [self._heartbeat(member, now)]

    def _in_log(self, position: Position, chosen: ChosenLog) -> bool:
        """Whether this leader's log is certain to hold it: one leader wrote all records of an epoch."""
        if position.epoch == self.epoch:
            return True
        return position.epoch == chosen.end.epoch and position.sequence <= chosen.end.sequence

    # ---- rule 2: records

    def submit(self, ticket: Hashable, operation: Operation, now: float) -> list[LeaderEffect]:
        """Queue one operation; answered by Completed or Sealed once it is committed, or by Failed."""
        if self._over is not None:
            return [Failed((ticket,), self._over)]
        if len(operation.data) > self.settings.max_record_bytes:
            limit = self.settings.max_record_bytes
            return [Failed((ticket,), InvalidRequest(f"{len(operation.data)} bytes in one operation, {limit} at most"))]
        if self._short_of_space and operation.kind in _NEEDS_ROOM:
            return [Failed((ticket,), NoSpace("fewer than a quorum of the volume's nodes have room; free some space"))]
        if operation.kind is OperationKind.HYDRATED:
            self._hydrated = True
        elif self._hydrated and operation.kind is OperationKind.FILL:
            # Also where the HYDRATED failed: its record may commit yet, and a fill behind it would bring trimmed blocks
            # back.
            return [Failed((ticket,), Conflict("a volume that is hydrated, or about to be, takes no fills"))]
        self._writes.add(ticket, operation, now)
        return self._send_queued(now)

    def _note_space(self) -> None:
        """Short of it: some members say that they are full, and the others that are here are no quorum."""
        here = [member for member in self._members.values() if member.sealed]
        full = any(member.full for member in here)
        self._short_of_space = full and not self._quorum.reached([m.replica for m in here if not m.full])

    def _may_append(self) -> bool:
        """Whether a record is due: nothing is in flight, or enough waits to be worth another message."""
        in_flight = len(self._in_flight)
        if not self._writes or in_flight >= self.settings.max_records_in_flight:
            return False
        return not in_flight or self._writes.waiting_bytes >= self.settings.batch_bytes

    def _send_queued(self, now: float) -> list[LeaderEffect]:
        """Make records of what waits, as long as fewer than the limit are in flight, and send them."""
        if not self._serving or not self._may_append():
            return []
        while self._may_append():
            batch = self._writes.next_batch()
            if batch:
                self._append_record((write.operation for write in batch), batch)
        effects: list[LeaderEffect] = []
        for member in self._members.values():
            effects += self._stream(member, now)
        if self._writes.relieved():
            effects.append(Relieved())
        return effects

    def _append_record(self, operations: Iterable[Operation], writes: list[Write]) -> None:
        end = self._run.end
        position = Position(self.epoch, Sequence(end.sequence + 1))
        record = encode_record(position, end, self._generation, self.configuration.number, operations)
        self._run.append(record)
        self._in_flight.append(_InFlight(position, self._generation, writes))
        if record.operations[-1].kind is OperationKind.SEAL:
            self._generation = Generation(self._generation + 1)

    def _stream(self, member: Member, now: float) -> list[LeaderEffect]:
        """What this member may be sent now, within its window."""
        if not member.sealed or member.catching_up or self._chosen is None:
            return []
        effects: list[LeaderEffect] = []
        while member.next <= self._run.end.sequence and member.window_bytes < self.settings.window_bytes:
            if member.next <= self._run.start.sequence:
                member.fall_back()
                effects.append(self._heartbeat(member, now))
                break
            effects.append(self._send(member, self._run.chunk(member.next, self.settings.max_record_bytes), now))
        return effects

    def _send(self, member: Member, records: tuple[Record, ...], now: float) -> Send:
        size_bytes = sum(len(record.encoded) for record in records)
        request = member.sending(now, records[-1].sequence, size_bytes)
        return self._append(member, request, now, records)

    def _heartbeat(self, member: Member, now: float) -> Send:
        """Without records; tells a member that is not whole, or behind, where to find what it lacks."""
        request = member.sending(now)
        catch_up = self._catch_up(member) if member.catching_up or not member.whole else None
        return self._append(member, request, now, catch_up=catch_up)

    def _append(
        self,
        member: Member,
        request: int,
        now: float,
        records: tuple[Record, ...] = (),
        catch_up: CatchUp | None = None,
    ) -> Send:
        number, end, acked = self.configuration.number, self._run.end, self._acked_by_others(member, now)
        message = Append(self.epoch, number, request, self._commit, end, records, catch_up, acked)
        return Send(member.replica, message)

    def _acked_by_others(self, member: Member, now: float) -> AckedPositions:
        """For a member to remember (rule 10); empty where it was told less than a heartbeat ago."""
        if now - member.told_at < self.settings.heartbeat_s:
            return ()
        member.told_at = now
        return tuple((other.replica, other.acked) for other in self._members.values() if other is not member)

    def _catch_up(self, member: Member) -> CatchUp:
        """Reach the start of what is retained here, or start anew at a committed base that a record follows."""
        target = self._run.start
        base = self._run.position_at(self._commit.sequence - 1) or self._commit
        sources = [
            other
            for other in self._members.values()
            if other is not member and other.whole and other.matched.sequence >= target.sequence
        ]
        sources.sort(key=lambda other: (not other.sealed, -other.matched.sequence))
        return CatchUp(target, base, tuple(source.replica for source in sources))

    def _acked(self, member: Member, answer: AppendAnswer, now: float) -> list[LeaderEffect]:
        if answer.epoch != self.epoch or not member.sealed or member.foreign or self._chosen is None:
            return []
        matched, was_whole, was_full = member.matched, member.whole, member.full
        lost_track = member.take(answer)
        self._renew_lease()
        if member.full != was_full:
            self._note_space()
        effects = self._take_in(now)
        if lost_track:
            member.fall_back()
        if member.catching_up:
            if member.matched.sequence >= self._run.start.sequence:
                member.stream_from(member.matched.sequence + 1)
            elif lost_track or member.matched != matched:
                effects.append(self._heartbeat(member, now))
        if member.matched != matched or member.whole != was_whole:
            effects += self._advance(now)
        effects += self._stream(member, now)
        effects += self._hand_on_reads(now)
        return effects

    # ---- rule 3: commit

    def _advance(self, now: float) -> list[LeaderEffect]:
        """Commit what a quorum of whole members has on disk, from this epoch's first record on."""
        if self._chosen is None:
            return []
        level = self._quorum.level({m.replica: m.matched.sequence if m.whole else 0 for m in self._members.values()})
        effects: list[LeaderEffect] = []
        if level > self._commit.sequence and level > self._chosen.end.sequence:
            position = self._run.position_at(min(level, self._run.end.sequence))
            assert position is not None
            assert position.epoch == self.epoch
            self._commit = position
            effects += self._complete(now)
            self._forget()
        effects += self._serve_if_due(now)
        effects += self._send_queued(now)
        return effects

    def _complete(self, now: float) -> list[LeaderEffect]:
        tickets: list[Hashable] = []
        effects: list[LeaderEffect] = []
        while self._in_flight and self._in_flight[0].position.sequence <= self._commit.sequence:
            record = self._in_flight.popleft()
            for write in record.writes:
                self._writes.committed(write)
                if write.answered:
                    continue
                write.answered = True
                if write.operation.kind is OperationKind.SEAL:
                    effects.append(Sealed(write.ticket, record.generation, record.position))
                else:
                    tickets.append(write.ticket)
            for write in record.writes:
                effects += self._release(write, now)
            if record.writes and record.writes[-1].operation.kind is OperationKind.SEAL:
                effects += self._tell_commit(now)
        return [Completed(tuple(tickets)), *effects] if tickets else effects

    def _tell_commit(self, now: float) -> list[LeaderEffect]:
        """At once, and not with the next record: a generation can be read where it is known to be committed."""
        return [
            self._heartbeat(member, now) for member in self._members.values() if member.sealed and not member.foreign
        ]

    def _release(self, write: Write, now: float) -> list[LeaderEffect]:
        """Reads that waited for this write go on."""
        effects: list[LeaderEffect] = []
        for read in write.waiters:
            assert isinstance(read, Read)
            effects += self._ask(read, now)
        write.waiters.clear()
        return effects

    def _forget(self) -> None:
        """Retain what a member may still need, up to the limit, and always the last committed record."""
        needed = min(member.matched.sequence for member in self._members.values())
        start = self._run.start.sequence
        last = self._commit.sequence
        unneeded = self._run.position_at(min(needed, last - 1))
        if unneeded is not None and unneeded.sequence > start:
            self._run.forget(unneeded)
        self._run.shrink(self.settings.retained_bytes, last)

    def _serve_if_due(self, now: float) -> list[LeaderEffect]:
        """Serve once the epoch's first record is committed and every older lease has run out."""
        if self._serving or self._commit.epoch != self.epoch:
            return []
        assert self._heard_quorum_at is not None
        lease_out = self._heard_quorum_at + self.settings.lease_s + self.settings.drift_s
        if len(self._answers) < len(self._members) and now < lease_out:
            self._why = "a front-end before this one may hold its lease still"
            return []
        self._serving, self._why = True, ""
        effects: list[LeaderEffect] = [Serving()]
        return effects + self._send_queued(now) + self._reads.retry(self._commit, now)

    # ---- rule 4: reads

    def read(self, ticket: Hashable, start: BlockNumber, count: int, now: float) -> list[LeaderEffect]:
        """Read `count` blocks; answered by ReadDone for an attempt whose data has arrived, or by Failed."""
        if self._over is not None:
            return [Failed((ticket,), self._over)]
        read = Read(ticket, start, count, now)
        self._reads.add(read)
        return self._ask_when_clear(read, now)

    def _ask_when_clear(self, read: Read, now: float) -> list[LeaderEffect]:
        write = self._writes.newest_over(read.start, read.count)
        if write is None:
            return self._ask(read, now)
        write.waiters.append(read)
        return []

    def _ask(self, read: Read, now: float) -> list[LeaderEffect]:
        if not self._serving:
            self._reads.park(read)
            return []
        return self._reads.ask(read, self._commit, now)

    def read_arrived(self, attempt: int, now: float) -> list[LeaderEffect]:
        """The data of `attempt` is here and passed its checksum."""
        return self._reads.arrived(attempt, now < self._lease_until)

    def read_failed(self, attempt: int, error: CairnError, now: float) -> list[LeaderEffect]:
        """The member that was asked for `attempt` could not answer."""
        if self._over is not None:
            return []
        if isinstance(error, Fenced):
            return self._end(error)
        return self._reads.failed(attempt, error, self._commit, now)

    def _renew_lease(self) -> None:
        """A filling member may have lost the promise that it gave a newer epoch: it confirms nothing."""
        confirmed = {m.replica: m.confirmed if m.whole else NEVER for m in self._members.values()}
        self._confirmed = self._quorum.level(confirmed)
        self._lease_until = self._confirmed + self.settings.lease_s

    def _hand_on_reads(self, now: float) -> list[LeaderEffect]:
        return self._reads.lease_held() if now < self._lease_until else []

    # ---- rule 5, and time

    def tick(self, now: float) -> list[LeaderEffect]:
        """Heartbeats, leases, retry limits; at least every half heartbeat."""
        if self._over is not None:
            return []
        effects: list[LeaderEffect] = []
        for member in self._members.values():
            idle = now - member.sent_at >= self.settings.heartbeat_s
            if idle and member.sealed and not member.foreign and self._chosen is not None:
                effects.append(self._heartbeat(member, now))
        effects += self._expire(now - self.settings.retry_limit_s, now)
        effects += self._serve_if_due(now)
        if self._serving:
            effects += self._reads.retry(self._commit, now)
        if self._chosen is None and self._accept_loss:
            effects += self._choose(now)
        return effects + self._give_up_attach(now)

    def _expire(self, before: float, now: float) -> list[LeaderEffect]:
        """Fail what is older than the retry limit. A record stays in flight, and overlapping reads wait."""
        tickets, dropped = self._writes.expire(before)
        effects: list[LeaderEffect] = []
        if tickets:
            error = QuorumUnavailable(
                f"fewer than a quorum of the members acked within {self.settings.retry_limit_s} s"
            )
            effects.append(Failed(tuple(tickets), error))
        for write in dropped:
            for read in write.waiters:
                assert isinstance(read, Read)
                effects += self._ask_when_clear(read, now)
        return effects + self._reads.expire(before)

    def _give_up_attach(self, now: float) -> list[LeaderEffect]:
        """A quorum is here, but nobody in it has the log that was chosen: another epoch may choose another."""
        if self._serving or self._chosen is None or now - self._chosen_at < self.settings.retry_limit_s:
            return []
        here = [member for member in self._members.values() if member.sealed]
        end = self._chosen.end.sequence
        if not self._quorum.reached([m.replica for m in here]) or any(
            m.matched.sequence >= end for m in here if m.whole
        ):
            return []
        return self._end(QuorumUnavailable(f"the attachment made no progress ({self._why}); attach again"))

    def _end(self, error: CairnError) -> list[LeaderEffect]:
        """Fail everything; nothing leaves this leader any more."""
        self._over, self._serving, self._why = error, False, str(error)
        tickets = self._writes.close()
        effects: list[LeaderEffect] = [Failed(tickets, error)] if tickets else []
        effects += self._reads.fail_all(error)
        self._in_flight.clear()
        return [*effects, Over(error)]

    # ---- for people

    def status(self) -> LeaderStatus:
        """A picture of now."""
        members = tuple(self._member_status(member) for member in self._members.values())
        return LeaderStatus(
            self._serving, self.epoch, self._run.end, self._commit, self._generation, self._over, self._why, members
        )

    def _member_status(self, member: Member) -> MemberStatus:
        return MemberStatus(
            replica=member.replica,
            connected=member.connected,
            sealed=member.sealed,
            whole=member.whole,
            full=member.full,
            matched=member.matched,
            commit=member.commit,
            lag_records=max(0, self._run.end.sequence - member.matched.sequence),
            lag_bytes=self._run.size_after(member.matched.sequence),
            extents_done=member.extents_done,
            extents_total=member.extents_total,
            behind=member.catching_up,
            left_out=member.left_out,
        )
