"""The front-end's side of the log: attach, and know what is safe on the members; the guest's requests are in requests.

Pure: requests, answers and the time in, effects out. Source: docs/replication.md (the numbers of the
rules are those of that page); Raft, sections 5.3 and 5.4.

Invariants:
- nothing is sent before the log is chosen (rule 1), no guest is served before the epoch's first
  record is on a quorum and no older lease can be left;
- a record is committed when a quorum of whole members has it on disk; the guest's answers and the
  commit position follow from that alone;
- one member at a time gives up what it holds, and only while a quorum of the others is sound and has all that is
  committed; from that word on nothing is committed by its ack.
"""

from collections.abc import Hashable

from blockstore.domain import Configuration, Position, ReplicaId
from blockstore.errors import CairnError, Corrupt, Fenced, QuorumUnavailable
from blockstore.log import UNKNOWN_FLOOR
from blockstore.record import Operation, OperationKind
from blockstore.replication.attaching import Attaching
from blockstore.replication.leader_log import LeaderLog
from blockstore.replication.lease import Lease
from blockstore.replication.member import Member
from blockstore.replication.messages import (
    AppendAnswer,
    Failed,
    FencedBy,
    LeaderEffect,
    Over,
    Reconnect,
    SealAnswer,
    SealEpoch,
    Send,
)
from blockstore.replication.quorum import Quorum
from blockstore.replication.reads import Reads
from blockstore.replication.recent_writes import RecentWrites
from blockstore.replication.recovery import ChosenLog
from blockstore.replication.requests import Requests
from blockstore.replication.room import QuorumRoom
from blockstore.replication.settings import LeaderSettings
from blockstore.replication.status import LeaderStatus, MemberStatus, member_status
from blockstore.units import BlockNumber, Epoch, Sequence

__all__ = ["Leader", "LeaderSettings", "LeaderStatus", "MemberStatus"]


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
        self._over: CairnError | None = None
        self._room = QuorumRoom(configuration, self._members, settings.retry_limit_s, now)
        self._requests = Requests(settings, self._log, self._reads, self._room)

    @property
    def commit(self) -> Position:
        """Up to here everything is on a quorum; never falls."""
        return self._log.commit

    @property
    def serving(self) -> bool:
        """The guest's requests are carried out."""
        return self._requests.serving

    @property
    def congested(self) -> bool:
        """So much waits that no more should be submitted until Relieved."""
        return self._requests.congested

    # ---- rule 7: the members change

    def reconfigure(self, configuration: Configuration, now: float) -> list[LeaderEffect]:
        """Go on under this one, which stands in the record that holds the epoch. Nothing before it serves.

        A quorum is that of `configuration` from here on, also for records that are in flight. A record behind
        all of those, once it is committed, says that they are where the new quorum needs them: see `settled`.
        """
        older = configuration.number < self.configuration.number
        if not self.serving or older or configuration == self.configuration:
            return []
        counts = configuration.number > self.configuration.number
        self.configuration = configuration
        effects = self._change_members(now)
        if counts:
            self._append_configuration()
        effects += self._log.stream_to_all(now)
        return effects + self._advance(now) + self._requests.look_for_room(now)

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
        self._append_own(Operation(OperationKind.CONFIGURATION, argument=str(number).encode()))

    def _append_own(self, operation: Operation) -> None:
        """A record of the leader's own: what is committed with it, or later, is so under this configuration."""
        self._log.append((operation,))
        self._configured_at = self._log.end.sequence

    @property
    def settled(self) -> int:
        """The number of the configuration whose quorum holds everything that is committed; 0: none does for sure."""
        log = self._log
        opened = self.serving and log.commit.epoch == self.epoch
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
        return self._lost(replica, now) + self._requests.look_for_room(now)

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
            effects += self._requests.retry(now)
            effects += self._requests.look_for_room(now)
        return effects

    def _choose(self, now: float) -> list[LeaderEffect]:
        """Take the log to go on with, if that can be said already, and open the epoch behind it."""
        chosen = self._attaching.choose(now)
        if not isinstance(chosen, ChosenLog):
            return self._end(Corrupt(f"acknowledged writes may be lost: {chosen.why}")) if chosen.lost else []
        self._log.go_on_from(chosen)
        self._append_own(Operation(OperationKind.EPOCH_START))
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
            if self.serving and member.damaged and member.takes_part and not member.emptied:
                others = [m for m in self._members.values() if m is not member and self._has_everything(m)]
                if self._quorum.reached([other.replica for other in others]):
                    effects.append(self._log.fill_anew(member, now))
                    self._lease.renew()
        return effects

    def _has_everything(self, member: Member) -> bool:
        return member.sound and member.matched.sequence >= self._log.commit.sequence

    # ---- rule 2: the guest's writes

    def submit(self, ticket: Hashable, operation: Operation, now: float) -> list[LeaderEffect]:
        """Queue one operation; answered by Completed or Sealed once it is committed, or by Failed."""
        if self._over is not None:
            return [Failed((ticket,), self._over)]
        return self._requests.submit(ticket, operation, now)

    @property
    def gathers_until(self) -> float | None:
        """When `send_gathered` is due; None: whatever waits goes out by itself."""
        return self._requests.gathers_until

    def send_gathered(self, now: float) -> list[LeaderEffect]:
        """The time is up for which a record waited for more writes."""
        return [] if self._over is not None else self._requests.send_gathered(now)

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
            effects += self._requests.look_for_room(now)
        if moved or member.whole != was_whole:
            effects += self._advance(now)
        effects += log.stream(member, now)
        if self._reads.await_lease and self._lease.held(now):
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
            effects += self._requests.complete(now)
            self._log.forget()
        effects += self._serve_if_due(now)
        effects += self._requests.send_queued(now)
        return effects

    def _serve_if_due(self, now: float) -> list[LeaderEffect]:
        """Serve once the epoch's first record is committed and every older lease has run out."""
        if self.serving or self._log.commit.epoch != self.epoch or not self._attaching.older_leases_are_over(now):
            return []
        return self._requests.serve(now)

    # ---- rule 4: reads

    def read(self, ticket: Hashable, start: BlockNumber, count: int, now: float) -> list[LeaderEffect]:
        """Read `count` blocks; answered by ReadDone for an attempt whose data has arrived, or by Failed."""
        if self._over is not None:
            return [Failed((ticket,), self._over)]
        return self._requests.read(ticket, start, count, now)

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

    # ---- rule 4: reads out of a member's tables, by who can open them

    def follow_writes(self) -> None:
        """From now on it is known what tables have to reflect for a read out of them."""
        if self._requests.recent is None:
            self._requests.recent = RecentWrites(self._log.end.sequence)

    def unfollow_writes(self) -> None:
        """Nobody reads tables any more."""
        self._requests.recent = None

    def may_use_tables_of(self, replica: ReplicaId, now: float) -> bool:
        """Whether there is any sense in having this member's tables open."""
        return self._reads.may_use_tables_of(replica, now)

    def must_reflect(self, replica: ReplicaId, start: BlockNumber, count: int, now: float) -> Position | None:
        """What this member's tables have to reflect at least, and in this epoch, to show these blocks as they are now.

        A write that is in the log and not committed counts as well, so no tables reflect it; one that still waits for
        its record was neither answered nor shown. None: its tables are not to be read now. What was read may be handed
        on if `may_hand_on` says so after it; else it is read again, by `read`.
        """
        recent = self._requests.recent
        if not self.serving or recent is None or not self._reads.may_use_tables_of(replica, now):
            return None
        return Position(self.epoch, Sequence(recent.newest(start, count)))

    def may_hand_on(self, now: float) -> bool:
        """Whether what was read out of tables before is still the truth."""
        return self._over is None and self._lease.held(now)

    def tables_reflect(self, position: Position) -> None:
        """The tables that are read do, and never less again."""
        if self._requests.recent is not None and position.epoch == self.epoch:
            self._requests.recent.reflected(position.sequence)

    # ---- rule 5, and time

    def tick(self, now: float) -> list[LeaderEffect]:
        """Heartbeats, leases, retry limits; at least every half heartbeat."""
        if self._over is not None:
            return []
        effects: list[LeaderEffect] = [*self._log.heartbeats(now)]
        effects += self._requests.expire(now)
        effects += self._requests.send_queued(now)
        effects += self._serve_if_due(now)
        effects += self._requests.retry(now)
        effects += self._have_filled_anew(now)
        effects += self._requests.look_for_room(now)
        if self._log.chosen is None and self._attaching.accept_loss:
            effects += self._choose(now)
        return effects + self._give_up_attach(now)

    def _give_up_attach(self, now: float) -> list[LeaderEffect]:
        chosen = self._log.chosen
        if self.serving or chosen is None or not self._attaching.is_stuck(chosen, now):
            return []
        return self._end(QuorumUnavailable(f"the attachment made no progress ({self._attaching.why}); attach again"))

    def _end(self, error: CairnError) -> list[LeaderEffect]:
        """Fail everything; nothing leaves this leader any more."""
        self._over = error
        return [*self._requests.end(error), Over(error)]

    # ---- for people

    def status(self) -> LeaderStatus:
        """A picture of now."""
        log, over = self._log, self._over
        why = str(over) if over is not None else self._attaching.why
        return LeaderStatus(
            serving=self.serving,
            epoch=self.epoch,
            end=log.end,
            commit=log.commit,
            generation=log.generation,
            over=over,
            why=why,
            members=tuple(member_status(member, log) for member in self._members.values()),
            settled=self.settled,
            held=self._requests.held_count,
            lacks_room=self._requests.lacks_room,
            waiting_bytes=self._requests.waiting_bytes,
            unleased=self._reads.unleased,
            commits=self._requests.commits,
        )
