"""Short ways of writing down positions, records and logs, and of stepping a follower by hand."""

from collections.abc import Iterable
from typing import TypeVar

from blockstore.domain import ORIGIN, Configuration, Member, NodeId, Position, ReplicaId
from blockstore.log import LogEntry, LogImage
from blockstore.record import Operation, OperationKind, Record, encode_record
from blockstore.replication.follower import Follower
from blockstore.replication.messages import (
    Answer,
    Append,
    AppendAnswer,
    CatchUp,
    FencedBy,
    FollowerEffect,
    Persist,
    SealAnswer,
    SealEpoch,
)
from blockstore.units import BLOCK_SIZE, FIRST_GENERATION, BlockNumber, Epoch, Generation, Sequence

E = TypeVar("E")
A, B, C = (ReplicaId(f"rep-{index:017x}") for index in (1, 2, 3))
CONFIGURATION = Configuration(1, tuple(Member(r, NodeId("node-" + r[4:])) for r in (A, B, C)))


def at(epoch: int, sequence: int) -> Position:
    return Position(Epoch(epoch), Sequence(sequence))


def write(block: int, fill: int = 1, count: int = 1) -> Operation:
    return Operation(OperationKind.WRITE, BlockNumber(block), count, bytes([fill]) * (BLOCK_SIZE * count))


def trim(block: int, count: int = 1) -> Operation:
    return Operation(OperationKind.TRIM, BlockNumber(block), count)


def read_all_of(records: Iterable[Record]) -> list[Position]:
    return [record.position for record in records]


def record(
    position: Position, previous: Position, *operations: Operation, generation: Generation = FIRST_GENERATION
) -> Record:
    return encode_record(position, previous, generation, 1, operations or (write(position.sequence),))


def chain(previous: Position, *positions: Position) -> tuple[Record, ...]:
    """Records at these positions, one behind the other."""
    records: list[Record] = []
    for position in positions:
        records.append(record(position, previous))
        previous = position
    return tuple(records)


def run_of(epoch: int, first: int, last: int, previous: Position | None = None) -> tuple[Record, ...]:
    """The records of one epoch from one sequence to another, both included."""
    before = previous if previous is not None else at(epoch, first - 1) if first > 1 else ORIGIN
    return chain(before, *(at(epoch, sequence) for sequence in range(first, last + 1)))


class Replica:
    """A follower and its journal. What is sent to it stays in memory until `sync`; `crash` forgets the rest."""

    def __init__(
        self, image: LogImage | None = None, *, replica: ReplicaId = A, entries: Iterable[LogEntry] = ()
    ) -> None:
        self.name = replica
        self.image = image or LogImage()
        self.journal: list[LogEntry] = list(entries)
        self.start(damage=None)

    def start(self, damage: Position | None) -> list[FollowerEffect]:
        self.waiting: list[Persist] = []
        self.effects: list[FollowerEffect] = []
        self.request = 0
        self.follower, effects = Follower.restore(self.name, self.image, self.journal, damage=damage)
        self.keep(effects)
        return effects

    def crash(self, damage: Position | None = None) -> list[FollowerEffect]:
        """What was not synced is gone."""
        return self.start(damage)

    def keep(self, effects: list[FollowerEffect]) -> list[FollowerEffect]:
        self.waiting += [effect for effect in effects if isinstance(effect, Persist)]
        self.effects += effects
        return effects

    def sync(self) -> list[FollowerEffect]:
        """The journal writes what waits; the effects that follow."""
        effects: list[FollowerEffect] = []
        while self.waiting:
            batch, self.waiting = self.waiting, []
            self.journal += [entry for persist in batch for entry in persist.entries]
            effects += self.keep(self.follower.persisted(batch[-1].number))
        return effects

    def seal(self, epoch: int, known: Position = ORIGIN) -> list[FollowerEffect]:
        return self.keep(self.follower.seal("seal", SealEpoch(Epoch(epoch), 1, known)))

    def sealed(self, epoch: int, known: Position = ORIGIN) -> SealAnswer:
        """Seal and sync; the answer."""
        answer = answers(self.seal(epoch, known) + self.sync())[-1]
        assert isinstance(answer, SealAnswer)
        return answer

    def append(
        self,
        epoch: int,
        *records: Record,
        commit: Position = ORIGIN,
        end: Position | None = None,
        catch_up: CatchUp | None = None,
    ) -> list[FollowerEffect]:
        self.request += 1
        last = end or (records[-1].position if records else ORIGIN)
        message = Append(Epoch(epoch), 1, self.request, commit, last, records, catch_up)
        return self.keep(self.follower.append("stream", message))

    def appended(self, epoch: int, *records: Record, commit: Position = ORIGIN) -> AppendAnswer:
        """Append and sync; the last answer."""
        answer = answers(self.append(epoch, *records, commit=commit) + self.sync())[-1]
        assert isinstance(answer, AppendAnswer)
        return answer

    def checkpoint(self) -> list[FollowerEffect]:
        """Everything committed goes into the tables, and the journal below is given up."""
        self.image = self.follower.image()
        self.journal = []
        return self.keep(self.follower.checkpointed(self.image))


def answers(effects: Iterable[FollowerEffect]) -> list[SealAnswer | AppendAnswer | FencedBy]:
    return [effect.message for effect in effects if isinstance(effect, Answer)]


def only(kind: type[E], effects: Iterable[object]) -> E:
    """The one effect of that kind."""
    found = [effect for effect in effects if isinstance(effect, kind)]
    assert len(found) == 1, found
    return found[0]


def none_of(kind: type, effects: Iterable[object]) -> bool:
    return not any(isinstance(effect, kind) for effect in effects)
