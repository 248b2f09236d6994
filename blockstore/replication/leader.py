"""The front-end's side of the log: attach, order the guest's writes, know when they are safe.

Pure: requests, answers and the time in, effects out. Source: docs/replication.md (the numbers of the
rules are those of that page); Raft, sections 5.3 and 5.4.

Invariants:
- nothing is sent before the log is chosen (rule 1), no guest is served before the epoch's first
  record is on a quorum and no older lease can be left;
- a record is committed when a quorum of whole members has it on disk; the guest's answers and the
  commit position follow from that alone;
- records are numbered, sent and committed in one order, that of submission;
- one member at a time gives up what it holds, and only while a quorum of the others is sound and has all that is
  committed; from that word on nothing is committed by its ack.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from blockstore.domain import Configuration, Position, ReplicaId
from blockstore.errors import CairnError, Conflict, Corrupt, Fenced, InvalidRequest, NoSpace, QuorumUnavailable
from blockstore.log import UNKNOWN_FLOOR
from blockstore.record import MAX_OPERATION_BLOCKS, Operation, OperationKind
from blockstore.replication.attaching import Attaching
from blockstore.replication.in_flight import Write
from blockstore.replication.leader_log import LeaderLog
from blockstore.replication.lease import Lease
from blockstore.replication.member import Member
from blockstore.replication.messages import (
    AppendAnswer,
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
from blockstore.replication.recovery import ChosenLog
from blockstore.replication.room import QuorumRoom, Room
from blockstore.replication.settings import LeaderSettings
from blockstore.replication.status import LeaderStatus, MemberStatus, member_status
from blockstore.replication.write_queue import NEEDS_ROOM, WriteQueue
from blockstore.units import BlockNumber, Epoch, Generation

__all__ = ["Leader", "LeaderSettings", "LeaderStatus", "MemberStatus"]


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
        loss_epochs: tuple[Epoch, ...] = (),
    ) -> None:
        """accept_loss: go on without what may have been acknowledged and cannot be found any more.

        Only after every member answered, or had settings.loss_wait_s to. loss_epochs: those that went on so.
        """
        self.epoch = epoch
        self.configuration = configuration
        self.settings = settings
        self._quorum = Quorum(configuration)
        self._members = {each.replica: Member(each.replica) for each in configuration.everyone}
        members = tuple(self._members.values())
        self._attaching = Attaching(
            self._quorum, self._members, settings, now, accept_loss=accept_loss, loss_epochs=loss_epochs
        )
        self._log = LeaderLog(epoch, configuration.number, members, settings, loss_epochs)
        self._lease = Lease(self._quorum, members, settings.lease_s)
        self._reads = Reads(self._readable(), settings.lease_s)
        #: Of the first record under this configuration, in this epoch.
        self._configured_at = 0
        self._writes = WriteQueue(settings.max_record_bytes, settings.queue_bytes)
        self._in_flight: deque[_InFlight] = deque()
        self._over: CairnError | None = None
        self._serving = False
        self._room = QuorumRoom(configuration, self._members, settings.retry_limit_s, now)
        self._hydrated = False

    @property
    def commit(self) -> Position:
        """Up to here everything is on a quorum; never falls."""
        return self._log.commit

    @property
    def serving(self) -> bool:
        return self._serving

    @property
    def congested(self) -> bool:
        """So much waits that no more should be submitted until Relieved."""
        return self._writes.congested

    # ---- rule 7: the members change

    def reconfigure(self, configuration: Configuration, now: float) -> list[LeaderEffect]:
        """Go on under this one, which stands in the record that holds the epoch. Nothing before it serves.

        A quorum is that of `configuration` from here on, also for records that are in flight. A record behind
        all of those, once it is committed, says that they are where the new quorum needs them: see `settled`.
        """
        older = configuration.number < self.configuration.number
        if not self._serving or older or configuration == self.configuration:
            return []
        counts = configuration.number > self.configuration.number
        self.configuration = configuration
        effects = self._change_members(now)
        if counts:
            self._append_configuration()
        for member in self._members.values():
            effects += self._log.stream(member, now)
        return effects + self._advance(now) + self._look_for_room(now)

    def _change_members(self, now: float) -> list[LeaderEffect]:
        """Those of the configuration take part, and nobody else."""
        replicas = [each.replica for each in self.configuration.everyone]
        kept = {replica: self._members.get(replica) or Member(replica) for replica in replicas}
        gone = [member for replica, member in self._members.items() if replica not in kept]
        self._members.clear()
        self._members.update(kept)
        for member in gone:
            member.close()
        self._quorum = Quorum(self.configuration)
        members = tuple(kept.values())
        self._attaching.count(self._quorum)
        self._log.send_to(members, self.configuration.number)
        self._lease.count(self._quorum, members)
        self._room.count(self.configuration, now)
        return self._reads.read_from(self._readable(), self._log.commit, now)

    def _readable(self) -> tuple[Member, ...]:
        """The new members only: every later attachment seals those, or waits until this one's lease is over."""
        return tuple(self._members[each.replica] for each in self.configuration.members)

    def _append_configuration(self) -> None:
        number = self.configuration.number
        self._append_record((Operation(OperationKind.CONFIGURATION, argument=str(number).encode()),), [])
        self._configured_at = self._log.end.sequence

    @property
    def settled(self) -> int:
        """The number of the configuration whose quorum holds everything that is committed; 0: none does for sure."""
        log = self._log
        opened = self._serving and log.commit.epoch == self.epoch
        return self.configuration.number if opened and log.commit.sequence >= self._configured_at else 0

    # ---- the members

    def connected(self, replica: ReplicaId, now: float) -> list[LeaderEffect]:
        """The way to this member is open, again or for the first time."""
        if self._over is not None or replica not in self._members:
            return []
        member = self._members[replica]
        member.open(now)
        return [Send(replica, SealEpoch(self.epoch, self.configuration.number, member.acked, member.connection))]

    def disconnected(self, replica: ReplicaId, now: float) -> list[LeaderEffect]:
        """Everything under way to this member may be lost."""
        if self._over is not None or replica not in self._members:
            return []
        return self._lost(replica, now) + self._look_for_room(now)

    def _lost(self, replica: ReplicaId, now: float) -> list[LeaderEffect]:
        self._members[replica].close()
        return self._reads.member_lost(replica, self._log.commit, now)

    def answered(
        self, replica: ReplicaId, message: SealAnswer | AppendAnswer | FencedBy, now: float
    ) -> list[LeaderEffect]:
        """What a member said to a SealEpoch or an Append of this leader."""
        if self._over is not None or replica not in self._members:
            return []  # of a member that has left it counts no more, whatever it says
        member = self._members[replica]
        match message:
            case FencedBy(epoch, _) if epoch == self.epoch:
                # It heard of a newer configuration of this very leader on a connection before.
                return [*self.disconnected(replica, now), Reconnect(replica)]
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
        self._lease.renew()
        effects: list[LeaderEffect] = []
        for peer in self._attaching.heard(member, answer, now):
            effects += [*self._lost(peer.replica, now), Reconnect(peer.replica)]
        if self._log.chosen is None:
            effects += self._choose(now)
        elif member.sealed and answer.floor == UNKNOWN_FLOOR:
            member.doubt(now)
        elif member.sealed:
            effects += self._log.rejoin(member, now)
        if self._over is None:
            effects += self._advance(now)
            effects += self._reads.retry(self._log.commit, now)
            effects += self._look_for_room(now)
        return effects

    def _choose(self, now: float) -> list[LeaderEffect]:
        """Take the log to go on with, if that can be said already, and open the epoch behind it."""
        chosen = self._attaching.choose(now)
        if not isinstance(chosen, ChosenLog):
            return self._end(Corrupt(f"acknowledged writes may be lost: {chosen.why}")) if chosen.lost else []
        self._log.go_on_from(chosen)
        self._append_record((Operation(OperationKind.EPOCH_START),), [])
        self._configured_at = self._log.end.sequence
        effects: list[LeaderEffect] = []
        for member in self._members.values():
            if member.sealed:
                effects += self._log.rejoin(member, now)
        return effects

    def _take_in(self, now: float) -> list[LeaderEffect]:
        """Go on with members that may have lost a promise, once a quorum without them knows of no newer epoch.

        Such an epoch cannot have rested on that promise then, and none that comes later does.
        """
        effects: list[LeaderEffect] = []
        for member in self._members.values():
            if member.doubted_at is not None and self._lease.confirmed > member.doubted_at:
                member.trust()
                effects += self._log.rejoin(member, now)
        return effects

    # ---- rule 6: a damaged member

    def _have_filled_anew(self, now: float) -> list[LeaderEffect]:
        """Tell a damaged member to have everything copied, where no content can be lost by it.

        Members do not decide that among themselves: two that are damaged in different blocks would each hear that the
        others are whole, and give up what only they had.
        """
        effects: list[LeaderEffect] = []
        for member in self._members.values():
            if self._serving and member.damaged and member.takes_part and not member.emptied:
                others = [m for m in self._members.values() if m is not member and self._has_everything(m)]
                if self._quorum.reached([other.replica for other in others]):
                    effects.append(self._log.fill_anew(member, now))
                    self._lease.renew()
        return effects

    def _has_everything(self, member: Member) -> bool:
        return member.sound and member.matched.sequence >= self._log.commit.sequence

    # ---- rule 2: records

    def submit(self, ticket: Hashable, operation: Operation, now: float) -> list[LeaderEffect]:
        """Queue one operation; answered by Completed or Sealed once it is committed, or by Failed."""
        if self._over is not None:
            return [Failed((ticket,), self._over)]
        limit = self.settings.max_record_bytes
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
        self._writes.add(ticket, operation, now)
        return self._send_queued(now)

    def _look_for_room(self, now: float) -> list[LeaderEffect]:
        """Hold, refuse or let go what needs room, as the members have it now. Only once all that are sealed stream."""
        if not self._room.look(now):
            return []
        if self._room.room is Room.ENOUGH:
            self._writes.let_go()
            return self._send_queued(now)
        effects = self._ask_again(self._writes.hold(), now)
        tickets = self._writes.refuse_held() if self._room.room is Room.NONE else ()
        if tickets:
            effects.append(Failed(tickets, self._no_room()))
        return effects + self._relieve()

    def _no_room(self) -> NoSpace:
        return NoSpace(
            f"too few of the volume's nodes have room for new writes ({self._room.why()}); "
            "free space on those that are full, or bring back those that are away"
        )

    def _relieve(self) -> list[LeaderEffect]:
        return [Relieved()] if self._writes.relieved() else []

    def _may_append(self) -> bool:
        """Whether a record is due: nothing is in flight, or enough waits to be worth another message."""
        in_flight = len(self._in_flight)
        if not self._writes or in_flight >= self.settings.max_records_in_flight:
            return False
        return not in_flight or self._writes.waiting_bytes >= self.settings.batch_bytes

    def _send_queued(self, now: float) -> list[LeaderEffect]:
        """Make records of what waits, as long as fewer than the limit are in flight, and send them."""
        if not self._serving:
            return []
        taken = False
        while self._may_append():
            taken = True
            batch = self._writes.next_batch()
            if batch:
                self._append_record((write.operation for write in batch), batch)
        if not taken:
            return []
        effects: list[LeaderEffect] = []
        for member in self._members.values():
            effects += self._log.stream(member, now)
        return effects + self._relieve()

    def _append_record(self, operations: Iterable[Operation], writes: list[Write]) -> None:
        record = self._log.append(operations)
        self._in_flight.append(_InFlight(record.position, record.generation, writes))

    def _acked(self, member: Member, answer: AppendAnswer, now: float) -> list[LeaderEffect]:
        log = self._log
        if answer.epoch != self.epoch or not member.sealed or member.foreign or log.chosen is None:
            return []
        matched, was_whole, was_full = member.matched, member.whole, member.full
        lost_track = member.take(answer)
        moved = member.matched != matched
        self._lease.renew()
        effects = self._take_in(now)
        if lost_track:
            member.fall_back()
        if member.catching_up:
            effects += log.go_on_with(member, now, moved=moved or lost_track)
        if effects or (member.whole, member.full) != (was_whole, was_full):
            effects += self._look_for_room(now)
        if moved or member.whole != was_whole:
            effects += self._advance(now)
        effects += log.stream(member, now)
        if self._lease.held(now):
            effects += self._reads.lease_held()
        return effects

    # ---- rule 3: commit

    def _advance(self, now: float) -> list[LeaderEffect]:
        """Commit what a quorum of whole members has on disk, from this epoch's first record on."""
        if self._log.chosen is None:
            return []
        level = self._quorum.level({m.replica: m.matched.sequence if m.whole else 0 for m in self._members.values()})
        effects: list[LeaderEffect] = []
        if self._log.commit_up_to(level):
            effects += self._complete(now)
            self._log.forget()
        effects += self._serve_if_due(now)
        effects += self._send_queued(now)
        return effects

    def _complete(self, now: float) -> list[LeaderEffect]:
        tickets: list[Hashable] = []
        effects: list[LeaderEffect] = []
        while self._in_flight and self._in_flight[0].position.sequence <= self._log.commit.sequence:
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
                if write.waiters:
                    effects += self._release(write, now)
            if record.writes and record.writes[-1].operation.kind is OperationKind.SEAL:
                # Not with the next record: a generation can be read where it is known to be committed.
                effects += self._log.tell_commit(now)
        return [Completed(tuple(tickets)), *effects] if tickets else effects

    def _release(self, write: Write, now: float) -> list[LeaderEffect]:
        """Reads that waited for this write go on."""
        effects: list[LeaderEffect] = []
        for read in write.waiters:
            assert isinstance(read, Read)
            effects += self._ask(read, now)
        write.waiters.clear()
        return effects

    def _serve_if_due(self, now: float) -> list[LeaderEffect]:
        """Serve once the epoch's first record is committed and every older lease has run out."""
        if self._serving or self._log.commit.epoch != self.epoch or not self._attaching.older_leases_are_over(now):
            return []
        self._serving = True
        effects: list[LeaderEffect] = [Serving()]
        return effects + self._send_queued(now) + self._reads.retry(self._log.commit, now)

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
        if not self._serving:
            self._reads.park(read)
            return []
        return self._reads.ask(read, self._log.commit, now)

    def read_arrived(self, attempt: int, now: float) -> list[LeaderEffect]:
        """The data of `attempt` is here and passed its checksum."""
        return self._reads.arrived(attempt, self._lease.held(now))

    def read_failed(self, attempt: int, error: CairnError, now: float) -> list[LeaderEffect]:
        """The member that was asked for `attempt` could not answer."""
        if self._over is not None:
            return []
        if isinstance(error, Fenced):
            return self._end(error)
        return self._reads.failed(attempt, error, self._log.commit, now)

    # ---- rule 5, and time

    def tick(self, now: float) -> list[LeaderEffect]:
        """Heartbeats, leases, retry limits; at least every half heartbeat."""
        if self._over is not None:
            return []
        effects: list[LeaderEffect] = [*self._log.heartbeats(now)]
        effects += self._expire(now - self.settings.retry_limit_s, now)
        effects += self._serve_if_due(now)
        if self._serving:
            effects += self._reads.retry(self._log.commit, now)
        effects += self._have_filled_anew(now)
        effects += self._look_for_room(now)
        if self._log.chosen is None and self._attaching.accept_loss:
            effects += self._choose(now)
        return effects + self._give_up_attach(now)

    def _expire(self, before: float, now: float) -> list[LeaderEffect]:
        """Fail what is older than the retry limit. A record stays in flight, and overlapping reads wait."""
        tickets, dropped = self._writes.expire(before)
        effects: list[LeaderEffect] = []
        if tickets:
            late = f"fewer than a quorum of the members acked within {self.settings.retry_limit_s} s"
            effects.append(Failed(tuple(tickets), QuorumUnavailable(f"{late} ({self._room.why() or 'all are here'})")))
        return effects + self._ask_again(dropped, now) + self._relieve() + self._reads.expire(before)

    def _give_up_attach(self, now: float) -> list[LeaderEffect]:
        chosen = self._log.chosen
        if self._serving or chosen is None or not self._attaching.is_stuck(chosen, now):
            return []
        return self._end(QuorumUnavailable(f"the attachment made no progress ({self._attaching.why}); attach again"))

    def _end(self, error: CairnError) -> list[LeaderEffect]:
        """Fail everything; nothing leaves this leader any more."""
        self._over, self._serving = error, False
        tickets = self._writes.close()
        effects: list[LeaderEffect] = [Failed(tickets, error)] if tickets else []
        effects += self._reads.fail_all(error)
        self._in_flight.clear()
        return [*effects, Over(error)]

    # ---- for people

    def status(self) -> LeaderStatus:
        """A picture of now."""
        log, over = self._log, self._over
        why = str(over) if over is not None else self._attaching.why
        return LeaderStatus(
            serving=self._serving,
            epoch=self.epoch,
            end=log.end,
            commit=log.commit,
            generation=log.generation,
            over=over,
            why=why,
            members=tuple(member_status(member, log) for member in self._members.values()),
            settled=self.settled,
            held=self._writes.held_count,
            lacks_room="" if self._room.room is Room.ENOUGH else self._room.why(),
        )
