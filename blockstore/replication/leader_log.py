"""The leader's log: the records that a member may still need, and what each member is sent of them (rules 2, 3, 6).

Invariants:
- it is empty, and nothing is sent, until the log to go on from is known (rule 1);
- a member gets records in order and within its window, and only behind a position that its log is certain to share;
  below what is retained here it is told where to find them instead;
- the commit position never falls, and counting acks moves it only to a record of this epoch (Raft, section 5.4.2);
- the last committed record is always retained: a base for who catches up has a record behind it.
Source: docs/replication.md; Raft, section 5.3.
"""

from collections.abc import Iterable
from dataclasses import replace

from blockstore.domain import ORIGIN, Position
from blockstore.record import Operation, OperationKind, Record, encode_record
from blockstore.replication.member import Member
from blockstore.replication.messages import AckedPositions, Append, CatchUp, SealAnswer, Send
from blockstore.replication.record_run import RecordRun
from blockstore.replication.recovery import ChosenLog, missed_loss
from blockstore.replication.settings import LeaderSettings
from blockstore.units import FIRST_GENERATION, Epoch, Generation, Sequence


class LeaderLog:
    """The log of one epoch, under one configuration at a time.

    chosen: what it goes on from; None until that is known. commit: up to here everything is on a quorum.
    generation: the layer that the next write belongs to.
    """

    def __init__(
        self,
        epoch: Epoch,
        configuration: int,
        members: tuple[Member, ...],
        settings: LeaderSettings,
        loss_epochs: tuple[Epoch, ...],
    ) -> None:
        self.chosen: ChosenLog | None = None
        self.commit: Position = ORIGIN
        self.generation: Generation = FIRST_GENERATION
        self._epoch = epoch
        self._configuration = configuration
        self._members = members
        self._settings = settings
        self._loss_epochs = loss_epochs
        self._run = RecordRun(ORIGIN)

    def send_to(self, members: tuple[Member, ...], configuration: int) -> None:
        """These are sent the log from now on, under this configuration."""
        self._members, self._configuration = members, configuration

    def go_on_from(self, chosen: ChosenLog) -> None:
        """The log of this epoch begins behind that one."""
        assert self.chosen is None
        self.chosen = chosen
        self.commit, self.generation = chosen.committed, chosen.generation
        self._run = RecordRun(chosen.end)

    # ---- records

    @property
    def start(self) -> Position:
        """The records behind this position are retained."""
        return self._run.start

    @property
    def end(self) -> Position:
        """The position of the last record."""
        return self._run.end

    @property
    def uncommitted(self) -> int:
        """How many records are not known to be committed."""
        return self._run.end.sequence - self.commit.sequence

    def append(self, operations: Iterable[Operation]) -> Record:
        """The next record; a SEAL in it is the last of them."""
        end = self._run.end
        position = Position(self._epoch, Sequence(end.sequence + 1))
        record = encode_record(position, end, self.generation, self._configuration, operations)
        self._run.append(record)
        if record.operations[-1].kind is OperationKind.SEAL:
            self.generation = Generation(self.generation + 1)
        return record

    def commit_up_to(self, sequence: int) -> bool:
        """A quorum has that much on disk: whether this moves the commit position, to a record of this epoch."""
        assert self.chosen is not None
        if sequence <= self.commit.sequence or sequence <= self.chosen.end.sequence:
            return False
        position = self._run.position_at(min(sequence, self._run.end.sequence))
        assert position is not None
        assert position.epoch == self._epoch
        self.commit = position
        return True

    def forget(self) -> None:
        """Retain what a member may still need, up to the limit, and always the last committed record."""
        needed = min(member.matched.sequence for member in self._members)
        last = self.commit.sequence
        unneeded = self._run.position_at(min(needed, last - 1))
        if unneeded is not None and unneeded.sequence > self._run.start.sequence:
            self._run.forget(unneeded)
        self._run.shrink(self._settings.retained_bytes, last)

    def lag(self, member: Member) -> tuple[int, int | None]:
        """What it has not acked: records, and their bytes; None where not all of them are retained."""
        matched = member.matched.sequence
        return max(0, self._run.end.sequence - matched), self._run.size_after(matched)

    # ---- what a member is sent

    def stream(self, member: Member, now: float) -> list[Send]:
        """The records that this member may be sent now, within its window."""
        if not member.sealed or member.catching_up or self.chosen is None:
            return []
        run, settings = self._run, self._settings
        sends: list[Send] = []
        while member.next <= run.end.sequence and member.window_bytes < settings.window_bytes:
            if member.next <= run.start.sequence:
                member.fall_back()
                sends.append(self._heartbeat(member, now))
                break
            records = run.chunk(member.next, settings.max_record_bytes)
            request = member.sending(now, records[-1].sequence, sum(len(record.encoded) for record in records))
            sends.append(Send(member.replica, self._append(member, request, now, records)))
        return sends

    def stream_to_all(self, now: float) -> list[Send]:
        """To each member the records that it may be sent now."""
        return [send for member in self._members for send in self.stream(member, now)]

    def tell_commit(self, now: float) -> list[Send]:
        """To all that take part, at once and not with the next record."""
        return [self._heartbeat(member, now) for member in self._members if member.takes_part]

    def heartbeats(self, now: float) -> list[Send]:
        """To each member that takes part and was sent nothing for as long as that."""
        if self.chosen is None:
            return []
        idle_s = self._settings.heartbeat_s
        return [
            self._heartbeat(member, now)
            for member in self._members
            if now - member.sent_at >= idle_s and member.takes_part
        ]

    def fill_anew(self, member: Member, now: float) -> Send:
        """Tell a damaged member to give its word up; from here on it counts as filling."""
        request = member.sending(now)
        member.empty(request)
        message = self._append(member, request, now, catch_up=self._catch_up(member))
        return Send(member.replica, replace(message, fill_anew=member.connection))

    def _heartbeat(self, member: Member, now: float) -> Send:
        """Without records; tells a member that is not whole, or behind, where to find what it lacks."""
        request = member.sending(now)
        catch_up = self._catch_up(member) if member.catching_up or not member.whole else None
        return Send(member.replica, self._append(member, request, now, catch_up=catch_up))

    def _append(
        self,
        member: Member,
        request: int,
        now: float,
        records: tuple[Record, ...] = (),
        catch_up: CatchUp | None = None,
    ) -> Append:
        acked = self._acked_by_others(member, now)
        return Append(self._epoch, self._configuration, request, self.commit, self._run.end, records, catch_up, acked)

    def _acked_by_others(self, member: Member, now: float) -> AckedPositions:
        """For a member to remember (rule 10); empty where it was told less than a heartbeat ago."""
        if now - member.told_at < self._settings.heartbeat_s:
            return ()
        member.told_at = now
        return tuple((other.replica, other.acked) for other in self._members if other is not member)

    # ---- a member that lacks something

    def rejoin(self, member: Member, now: float) -> list[Send]:
        """Go on with a member from what its seal's answer says that it holds."""
        answer, chosen = member.answer, self.chosen
        assert answer is not None
        assert chosen is not None
        member.foreign = self._has_what_was_given_up(answer, chosen)
        if member.foreign:
            member.whole = False
            member.fall_back()
            return []
        if self.commit < answer.commit <= chosen.end:
            self.commit = answer.commit  # committed in an older epoch; only this member had heard of it
        certain = answer.end
        if not self._holds(answer.end, chosen):
            certain = answer.commit if answer.whole else ORIGIN
        member.matched = certain
        if certain.sequence < self._run.start.sequence:
            member.fall_back()
            return [self._heartbeat(member, now)]
        member.stream_from(certain.sequence + 1)
        return self.stream(member, now) or [self._heartbeat(member, now)]

    def _has_what_was_given_up(self, answer: SealAnswer, chosen: ChosenLog) -> bool:
        """Or may have: with a loss accepted, a position that was committed may be none of the log any more."""
        if answer.commit.epoch != self._epoch and answer.commit > chosen.end:
            return True
        return missed_loss(answer, chosen.end, self._loss_epochs)

    def _holds(self, position: Position, chosen: ChosenLog) -> bool:
        """Whether this log is certain to hold it: one leader wrote all records of an epoch."""
        if position.epoch == self._epoch:
            return True
        return position.epoch == chosen.end.epoch and position.sequence <= chosen.end.sequence

    def go_on_with(self, member: Member, now: float, *, moved: bool) -> list[Send]:
        """It is catching up, and has answered: streams again where it holds enough of the log by now.

        moved: it got further, or lost track; then it is told where to find the rest.
        """
        if member.matched.sequence >= self._run.start.sequence:
            member.stream_from(member.matched.sequence + 1)
            return []
        return [self._heartbeat(member, now)] if moved else []

    def _catch_up(self, member: Member) -> CatchUp:
        """Reach the start of what is retained here, or start anew at a committed base that a record follows."""
        target = self._run.start
        base = self._run.position_at(self.commit.sequence - 1) or self.commit
        sources = [
            other
            for other in self._members
            if other is not member and other.whole and other.matched.sequence >= target.sequence
        ]
        sources.sort(key=lambda other: (not other.sealed, other.damaged, -other.matched.sequence))
        return CatchUp(target, base, tuple(source.replica for source in sources))
