"""A replica as a dict, and records made by hand: what the tests of storage compare with."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockstore.domain import ORIGIN, Position, ReplicaAddress, ReplicaId, SegmentNumber, VolumeId
from blockstore.log import LogImage
from blockstore.record import ZEROING, Operation, OperationKind, Record, decode_record, encode_record
from blockstore.storage.replica_store import ReplicaStore
from blockstore.units import BLOCK_SIZE, FIRST_GENERATION, BlockNumber, Epoch, Generation
from blockstore.units import Sequence as SequenceNumber

EPOCH = Epoch(1)
ZERO = bytes(BLOCK_SIZE)


def address(digit: int = 1) -> ReplicaAddress:
    return ReplicaAddress(VolumeId("vol-" + "1" * 17), SegmentNumber(0), ReplicaId("rep-" + f"{digit:017x}"))


def position(sequence: int) -> Position:
    return Position(EPOCH, SequenceNumber(sequence)) if sequence else ORIGIN


def block(seed: int) -> bytes:
    return random.Random(seed).randbytes(64) * (BLOCK_SIZE // 64)


def write(start: int, *blocks: bytes) -> Operation:
    return Operation(OperationKind.WRITE, BlockNumber(start), len(blocks), b"".join(blocks))


def trim(start: int, count: int) -> Operation:
    return Operation(OperationKind.TRIM, BlockNumber(start), count)


def zero(start: int, count: int) -> Operation:
    return Operation(OperationKind.ZERO, BlockNumber(start), count)


def discard(start: int, count: int) -> Operation:
    return Operation(OperationKind.DISCARD, BlockNumber(start), count)


def hydrated() -> Operation:
    return Operation(OperationKind.HYDRATED)


def fill(start: int, *blocks: bytes) -> Operation:
    return Operation(OperationKind.FILL, BlockNumber(start), len(blocks), b"".join(blocks))


def seal(snapshot: bytes = b"") -> Operation:
    return Operation(OperationKind.SEAL, argument=snapshot)


def pin(generation: int, holder: bytes) -> Operation:
    return Operation(OperationKind.PIN, BlockNumber(generation), argument=holder)


def unpin(generation: int, holder: bytes) -> Operation:
    return Operation(OperationKind.UNPIN, BlockNumber(generation), argument=holder)


@dataclass
class Log:
    """Makes records as a front-end would, and keeps what they amount to.

    blocks: the content that is not zeroes, by generation, as it was when the generation was sealed;
    that of the current one as it is now. pins: holders by generation. source: what blocks that nobody
    wrote have; in `blocks` then, one that was trimmed is ZERO. filled: by which record such a block came from there.
    """

    sequence: int = 0
    generation: Generation = FIRST_GENERATION
    records: list[Record] = field(default_factory=list)
    blocks: dict[int, dict[int, bytes]] = field(default_factory=lambda: {FIRST_GENERATION: {}})
    pins: dict[int, set[bytes]] = field(default_factory=dict)
    source: dict[int, bytes] = field(default_factory=dict)
    filled: dict[int, int] = field(default_factory=dict)
    hydrated: bool = False

    def record(self, *operations: Operation) -> Record:
        before, self.sequence = self.sequence, self.sequence + 1
        made = encode_record(position(self.sequence), position(before), self.generation, 1, operations)
        record = decode_record(made.encoded)
        self.records.append(record)
        for operation in operations:
            self._follow(operation)
        return record

    def _follow(self, operation: Operation) -> None:
        current = self.blocks[self.generation]
        if operation.kind is OperationKind.WRITE:
            data = bytes(operation.data)
            for i in range(operation.count):
                current[operation.start + i] = data[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
        elif operation.kind is OperationKind.HYDRATED:
            self.hydrated = True
        elif operation.kind is OperationKind.FILL:
            for number in range(operation.start, operation.end):
                self.filled.setdefault(number, self.sequence)
        elif operation.kind in ZEROING:
            self._follow_zero(operation)
        elif operation.kind is OperationKind.SEAL:
            if operation.argument:
                self.pins.setdefault(self.generation, set()).add(operation.argument)
            self.generation = Generation(self.generation + 1)
            self.blocks[self.generation] = dict(current)
        elif operation.kind is OperationKind.PIN:
            self.pins.setdefault(operation.start, set()).add(operation.argument)
        elif operation.kind is OperationKind.UNPIN:
            self.pins.get(operation.start, set()).discard(operation.argument)

    def _follow_zero(self, operation: Operation) -> None:
        current = self.blocks[self.generation]
        for number in [n for n in current if operation.start <= n < operation.end]:
            del current[number]
        for number in self.source:
            if operation.start <= number < operation.end:
                current[number] = ZERO

    def image(self, up_to: int | None = None) -> LogImage:
        """As of a record that was given out last; the current one by default."""
        sequence = self.sequence if up_to is None else up_to
        generation = FIRST_GENERATION
        for record in self.records[:sequence]:
            sealed = any(operation.kind is OperationKind.SEAL for operation in record.operations)
            generation = Generation(record.generation + sealed)
        return LogImage(applied=position(sequence), epoch=EPOCH, configuration=1, generation=generation)

    def content(self, start: int, count: int, generation: int | None = None, applied: int | None = None) -> bytes:
        """applied: fills count up to that sequence only; all by default."""
        limit = self.sequence if applied is None else applied
        filled = {
            number: self.source[number] for number, at in self.filled.items() if at <= limit and number in self.source
        }
        blocks = {**filled, **self.blocks[self.generation if generation is None else generation]}
        return b"".join(blocks.get(number, ZERO) for number in range(start, start + count))

    def absent(self, start: int, count: int) -> set[int]:
        """The blocks that the source alone has."""
        known = {*self.filled, *self.blocks[self.generation]}
        return {number for number in range(start, start + count) if number in self.source and number not in known}


def new_store(directory: Path, digit: int = 1, source: bytes = b"") -> ReplicaStore:
    return ReplicaStore.create(directory, address(digit), LogImage(), source=source)


def apply(store: ReplicaStore, log: Log, records: Iterable[Record] | Sequence[Record]) -> None:
    """Commit the records and checkpoint right behind the last."""
    committed = list(records)
    store.commit(committed)
    store.checkpoint(log.image(committed[-1].sequence), 0)
