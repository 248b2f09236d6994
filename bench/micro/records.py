"""The records that the figures are taken with."""

import random
from collections.abc import Iterator

from blockstore.domain import Position
from blockstore.record import Operation, OperationKind, Record, encode_record
from blockstore.units import BLOCK_SIZE, FIRST_GENERATION, BlockNumber, Epoch, Generation, Sequence

EPOCH = Epoch(1)
_PAYLOAD = random.Random(1).randbytes(256 * BLOCK_SIZE)


def write(start: int, count: int = 1) -> Operation:
    """A WRITE of `count` blocks."""
    return Operation(OperationKind.WRITE, BlockNumber(start), count, _PAYLOAD[: count * BLOCK_SIZE])


def record(sequence: int, operations: list[Operation], generation: Generation = FIRST_GENERATION) -> Record:
    """A record of epoch 1 behind that of the sequence before."""
    at = Position(EPOCH, Sequence(sequence))
    previous = Position(EPOCH, Sequence(sequence - 1)) if sequence > 1 else Position(Epoch(0), Sequence(0))
    return encode_record(at, previous, generation, 1, operations)


def random_records(blocks: int, batch: int, seed: int = 1, first: int = 1) -> Iterator[Record]:
    """Records of `batch` single blocks each, in random order, until each of `blocks` blocks is written once."""
    numbers = list(range(blocks))
    random.Random(seed).shuffle(numbers)
    for index in range(0, blocks, batch):
        yield record(first + index // batch, [write(number) for number in numbers[index : index + batch]])
