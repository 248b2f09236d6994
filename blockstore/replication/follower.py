"""One replica's side of the conversation: seals, records, reads.

Pure: messages and the journal's confirmations in, effects out. The upmost of three layers (replica_log,
filling, this). Source: docs/replication.md (the numbers of the rules are those of that page); Raft,
sections 5.3 and 5.4. Invariants:
- an ack, or the answer to a seal, never rests on anything that is not durable here;
- after a seal was accepted, nothing of an older epoch or configuration is acked;
- content that stands here is given up only on the word of a leader, that rests on its newest seal.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace

from blockstore.domain import ORIGIN, Position, ReplicaId
from blockstore.errors import Conflict, Fenced, QuorumUnavailable
from blockstore.log import UNKNOWN_FLOOR, LogEntry, LogImage, SealEntry
from blockstore.replication.filling import FillingReplica
from blockstore.replication.messages import (
    Answer,
    Append,
    FencedBy,
    FollowerEffect,
    Persist,
    SealAnswer,
    SealEpoch,
)
from blockstore.replication.record_run import earlier
from blockstore.replication.replay import copies, replay
from blockstore.replication.replica_log import Pending
from blockstore.units import Epoch


class Follower(FillingReplica):
    """The replica `replica`; see the module. One event at a time, effects carried out in order."""

    def __init__(self, replica: ReplicaId, image: LogImage) -> None:
        super().__init__(replica, image)
        #: Sealed since this object was made: appends of streams from before its restart are refused.
        self._sealed = False
        #: Of the newest seal of this epoch: what rests on an earlier one orders nothing any more.
        self._connection = 0

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
        if unfinished and image.filling is not None:
            # What ended it may be older than the image, and what began it again may be lost.
            known = state.filling.floor if state.filling is not None else image.filling.floor
            state.filling = replace(image.filling, floor=max(image.filling.floor, known))
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

    # ---- rule 1: seals

    def seal(self, origin: Hashable, message: SealEpoch) -> list[FollowerEffect]:
        """Accept nothing older from here on; answered when all that was accepted before is durable."""
        if self._fences(message.epoch, message.configuration):
            return [Answer(origin, FencedBy(self.epoch, self.configuration))]
        effects: list[FollowerEffect] = []
        if (message.epoch, message.configuration) != (self.epoch, self.configuration):
            effects.append(self._enter(message))
        self._sealed = True
        self._connection = max(self._connection, message.connection)
        effects += self.know_acked(message.known)
        if self._pending:
            self._pending.append(Pending(self._number, self._run.end, seal=message, origin=origin))
        else:
            effects.append(self._seal_answer(origin, message))
        return effects

    def _enter(self, message: SealEpoch | Append) -> Persist:
        """Its epoch and configuration are accepted: nothing older is from here on."""
        if message.epoch != self.epoch:
            self._connection = 0
        self._promise(message.epoch, message.configuration)
        return self._persist(SealEntry(message.epoch, message.configuration))

    def _seal_answer(self, origin: Hashable, message: SealEpoch) -> Answer:
        if (message.epoch, message.configuration) != (self.epoch, self.configuration):
            return Answer(origin, FencedBy(self.epoch, self.configuration))
        commit = max(self.commit, self._copied) if self.filling else self.commit
        floor = self.filling.floor if self.filling else ORIGIN
        end = self.durable_end
        self._note_acked()
        return Answer(
            origin,
            SealAnswer(
                self.epoch,
                self.configuration,
                end,
                commit,
                self._applied,
                self.whole,
                floor,
                self.generation,
                self.full,
                self._known,
                not self._needs_delta,
                self.damaged,
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
        if not self._sealed or message.epoch != self.epoch:
            raise Conflict(f"{self.replica}: epoch {message.epoch} was not sealed since it started; seal it again")
        effects: list[FollowerEffect] = []
        if message.configuration != self.configuration:
            # Rule 7: the leader of this epoch goes on under a newer one.
            effects.append(self._enter(message))
        self._stream = (origin, message.request)
        entries, follows = self._take(message.records)
        if message.records:
            self._behind = not follows
            if follows:
                self._match(message.records[-1].position)
        self._learn(message)
        self._note_known(message.acked)
        if self.damaged and 0 < message.fill_anew == self._connection:
            effects += self.content_lost()
        effects += self._advance_commit()
        effects.append(self._persist(*entries, acks=self.epoch) if entries else self._ack())
        if self.filling and self.filling.floor == UNKNOWN_FLOOR and message.end.epoch == self.epoch:
            effects.append(self._persist(*self._fill_above(message.end), acks=self.epoch))
        if message.catch_up is not None:
            effects += self._catch_up_by(message.catch_up)
        return effects + self._go_on_filling()

    def _learn(self, message: Append) -> None:
        """Where the leader's log ends and what it has committed; both may show that this log matches."""
        if self._matched != self._run.end:
            self._match_below(message.end)
            self._match_below(message.commit)
        self._told_commit = max(self._told_commit, message.commit)

    def persisted(self, number: int) -> list[FollowerEffect]:
        """The journal holds all entries up to this number: acks may leave."""
        effects: list[FollowerEffect] = []
        ack = False
        for pending in self._confirmed(number):
            if pending.number == self._whole_number:
                self.filling = self._whole_number = None
                ack = True
            if pending.seal is not None:
                effects.append(self._seal_answer(pending.origin, pending.seal))
            ack = ack or pending.acks == self.epoch
        effects += self._advance_commit()
        if ack and self._stream is not None:
            effects.append(self._ack())
        return effects + self._go_on_filling()

    # ---- rule 4: reads

    def read(self, epoch: Epoch, configuration: int, commit: Position) -> list[FollowerEffect]:
        """Whether a read that carries this commit may be answered; effects to carry out before it is.

        One leader sends all reads of an epoch, whatever its configuration was when each left.
        Raises Fenced where the reader is of an older epoch, QuorumUnavailable where this replica lacks
        something that is committed.
        """
        if epoch < self.epoch:
            raise Fenced(f"{self.replica}: epoch {epoch} is over, {self.epoch} was sealed; attach again")
        if epoch != self.epoch:
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
