"""A leader whose members are answered for by hand: a test says who is sealed, who acks, and what the time is."""

from collections.abc import Iterable
from typing import TypeVar

from blockstore.domain import ORIGIN, Position, ReplicaId
from blockstore.replication.leader import Leader, LeaderSettings
from blockstore.replication.messages import (
    AckedPositions,
    Append,
    AppendAnswer,
    LeaderEffect,
    ReadFrom,
    SealAnswer,
    SealEpoch,
    Send,
)
from blockstore.units import Epoch, Generation
from tests.replication_parts import CONFIGURATION, A, B, C, at

K = TypeVar("K")
EPOCH = Epoch(5)
SETTINGS = LeaderSettings(retry_limit_s=10.0)


class Group:
    """now: the leader's clock. sent: by member, the Appends since `forget`. effects: everything, in order."""

    def __init__(
        self, settings: LeaderSettings = SETTINGS, *, accept_loss: bool = False, loss_epochs: tuple[Epoch, ...] = ()
    ) -> None:
        self.now = 100.0
        self.leader = Leader(EPOCH, CONFIGURATION, settings, self.now, accept_loss=accept_loss, loss_epochs=loss_epochs)
        self.effects: list[LeaderEffect] = []
        self.sent: dict[ReplicaId, list[Append]] = {A: [], B: [], C: []}
        self.seals: dict[ReplicaId, list[SealEpoch]] = {A: [], B: [], C: []}
        self.requests = {A: 0, B: 0, C: 0}

    def keep(self, effects: list[LeaderEffect]) -> list[LeaderEffect]:
        self.effects += effects
        for effect in effects:
            if isinstance(effect, Send):
                if isinstance(effect.message, Append):
                    self.sent[effect.replica].append(effect.message)
                    self.requests[effect.replica] = effect.message.request
                else:
                    self.seals[effect.replica].append(effect.message)
        return effects

    def forget(self) -> None:
        self.effects.clear()
        for sent in self.sent.values():
            sent.clear()

    def connect(self, *members: ReplicaId) -> None:
        for member in members:
            self.keep(self.leader.connected(member, self.now))

    def seal(
        self,
        member: ReplicaId,
        end: Position = ORIGIN,
        *,
        commit: Position = ORIGIN,
        floor: Position | None = None,
        generation: int = 1,
        full: bool = False,
        known: AckedPositions = (),
        complete: bool = True,
        damaged: bool = False,
    ) -> list[LeaderEffect]:
        """The member connects and answers its seal."""
        self.connect(member)
        whole, floor = floor is None, floor or ORIGIN
        layer = Generation(generation)
        answer = SealAnswer(EPOCH, 1, end, commit, ORIGIN, whole, floor, layer, full, known, complete, damaged)
        return self.keep(self.leader.answered(member, answer, self.now))

    def ack(
        self,
        member: ReplicaId,
        sequence: int | None = None,
        *,
        whole: bool = True,
        full: bool = False,
        behind: bool = False,
        matched: Position | None = None,
        damaged: bool = False,
    ) -> list[LeaderEffect]:
        """The member answers its newest request: durable up to this sequence, or up to all that was sent."""
        if matched is None:
            last = self.leader.status().end.sequence if sequence is None else sequence
            matched = at(EPOCH, last)
        answer = AppendAnswer(
            EPOCH, self.requests[member], matched, ORIGIN, matched, whole, full, behind, damaged=damaged
        )
        return self.keep(self.leader.answered(member, answer, self.now))

    def pass_time(self, seconds: float) -> list[LeaderEffect]:
        self.now += seconds
        return self.keep(self.leader.tick(self.now))

    def serve(self) -> "Group":
        """Every member answers; the record that opens the epoch is on all of them, at (5, 1)."""
        for member in (A, B, C):
            self.seal(member)
        for member in (A, B, C):
            self.ack(member, 1)
        assert self.leader.serving
        self.forget()
        return self

    def all_ack(self) -> list[LeaderEffect]:
        return [effect for member in (A, B, C) for effect in self.ack(member)]


def of(kind: type[K], effects: Iterable[object]) -> list[K]:
    return [effect for effect in effects if isinstance(effect, kind)]


def reads(effects: Iterable[object]) -> list[ReadFrom]:
    return of(ReadFrom, effects)


def records_sent(group: Group, member: ReplicaId) -> list[int]:
    """The sequences of the records that the member was sent since `forget`."""
    return [record.sequence for message in group.sent[member] for record in message.records]
