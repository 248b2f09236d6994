"""The record: one batch of operations with one sequence, and its encoding.

The front-end encodes a record once; those bytes cross the network, lie in the journals and are
resent as they are. Layout, little-endian:

    header   64 bytes: magic, version, operation count, table and payload sizes, position, the
             predecessor's position, generation, configuration number, checksum
    table    one entry of 16 bytes for each operation, followed by its block checksums (8 bytes
             each) or its argument
    payload  the blocks of the WRITE and FILL operations, in the table's order

The header's checksum covers header and table; the table's block checksums cover the payload. A
block's checksum is seeded with its number, generation and sequence, so that a block in the wrong
place fails it. Invariants: operations of one record do not overlap; a payload has at most
MAX_RECORD_PAYLOAD bytes; `previous` is the position of the record with the sequence before.
"""

import struct
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from enum import IntEnum
from typing import Final

import xxhash

from blockstore.domain import Position
from blockstore.errors import Corrupt, InvalidRequest
from blockstore.units import (
    BLOCK_SIZE,
    FILL_GENERATION,
    MAX_BLOCKS,
    MAX_RECORD_PAYLOAD,
    BlockNumber,
    Epoch,
    Generation,
    Sequence,
)
from blockstore.values import value

_HEADER: Final = struct.Struct("<4sHHIIQQQQII")
_CHECKSUM: Final = struct.Struct("<Q")
_ENTRY: Final = struct.Struct("<B3xIQ")
#: The entry of an operation on one block, with its checksum.
_ENTRY_OF_ONE: Final = struct.Struct("<B3xIQQ")
_MAGIC: Final = b"CRec"
_VERSION: Final = 1
HEADER_SIZE: Final = _HEADER.size + _CHECKSUM.size
MAX_OPERATIONS: Final = 4096
#: Of one operation, 16 TiB less one block: the table of a record has 32 bits for it.
MAX_OPERATION_BLOCKS: Final = (1 << 32) - 1
MAX_ARGUMENT: Final = 64 * 1024
MAX_TABLE: Final = MAX_OPERATIONS * _ENTRY.size + MAX_RECORD_PAYLOAD // BLOCK_SIZE * 8 + MAX_ARGUMENT
MAX_RECORD_SIZE: Final = HEADER_SIZE + MAX_TABLE + MAX_RECORD_PAYLOAD
#: What a record takes in memory besides its encoding and its operations, where it came alone in its message.
RECORD_OVERHEAD_BYTES: Final = 768
_MASK: Final = (1 << 64) - 1
_NUMBER_SEED: Final = 0x9E3779B97F4A7C15
_GENERATION_SEED: Final = 0xC2B2AE3D27D4EB4F
_SEQUENCE_SEED: Final = 0x165667B19E3779F9


class OperationKind(IntEnum):
    """What an operation does. The numbers are part of the stored format."""

    WRITE = 1
    ZERO = 2
    TRIM = 3
    FILL = 4
    SEAL = 5
    PIN = 6
    UNPIN = 7
    HYDRATED = 8
    CONFIGURATION = 9
    EPOCH_START = 10
    #: A TRIM of blocks that the volume's source does not map: it deletes as if there were no source.
    DISCARD = 11


#: To look a number up here takes a fifth of what OperationKind(number) does.
_KINDS: Final = {int(kind): kind for kind in OperationKind}
#: What carries blocks.
WITH_PAYLOAD: Final = frozenset({OperationKind.WRITE, OperationKind.FILL})
#: What leaves zeroes behind.
ZEROING: Final = frozenset({OperationKind.ZERO, OperationKind.TRIM, OperationKind.DISCARD})
_ON_BLOCKS: Final = WITH_PAYLOAD | ZEROING


@value
class Operation:
    """One operation of a record.

    On blocks (WRITE, ZERO, TRIM, DISCARD, FILL): start is the first block, count their number; WRITE and
    FILL carry data (count * BLOCK_SIZE bytes) and, once in a record, checksums (count of them).
    Others: argument; start is the generation for PIN and UNPIN, else 0, and count is 0.
    """

    kind: OperationKind
    start: BlockNumber = BlockNumber(0)
    count: int = 0
    data: memoryview | bytes = b""
    checksums: tuple[int, ...] = ()
    argument: bytes = b""

    @property
    def on_blocks(self) -> bool:
        return self.kind in _ON_BLOCKS

    @property
    def end(self) -> int:
        """The block after the last."""
        return self.start + self.count


@value
class Record:
    """A decoded record; `encoded` holds the bytes that it was decoded from or encoded to.

    They may be part of a message that is kept as long: its records are applied, and let go, together.
    """

    position: Position
    previous: Position
    generation: Generation
    configuration: int
    operations: tuple[Operation, ...]
    encoded: bytes | memoryview

    @property
    def sequence(self) -> Sequence:
        return self.position.sequence

    def generation_of(self, operation: Operation) -> Generation:
        """The layer that the operation's blocks belong to: fills lie below every guest's write."""
        return FILL_GENERATION if operation.kind is OperationKind.FILL else self.generation


def block_checksum(block: bytes | memoryview, number: int, generation: int, sequence: int) -> int:
    """xxh3-64 of one block's BLOCK_SIZE bytes, seeded with where it belongs."""
    seed = (number * _NUMBER_SEED ^ generation * _GENERATION_SEED ^ sequence * _SEQUENCE_SEED) & _MASK
    return xxhash.xxh3_64_intdigest(block, seed)


def block_checksums(blocks: memoryview, versions: Iterable[tuple[int, int, int]]) -> tuple[int, ...]:
    """block_checksum of each block in `blocks`, by its (number, generation, sequence); for runs of them."""
    digest = xxhash.xxh3_64_intdigest
    seeds = [(n * _NUMBER_SEED ^ g * _GENERATION_SEED ^ s * _SEQUENCE_SEED) & _MASK for n, g, s in versions]
    offsets = range(0, len(blocks), BLOCK_SIZE)
    return tuple([digest(blocks[at : at + BLOCK_SIZE], seed) for at, seed in zip(offsets, seeds, strict=True)])


def run_checksums(blocks: memoryview, start: int, generation: int, sequence: int) -> tuple[int, ...]:
    """block_checksum of each block in `blocks`: those from `start` on, all of one generation and sequence."""
    return _checksums(blocks, start, len(blocks) // BLOCK_SIZE, _layer_seed(generation, sequence))


def encode_record(
    position: Position,
    previous: Position,
    generation: Generation,
    configuration: int,
    operations: Iterable[Operation],
) -> Record:
    """The record with its encoding; computes the checksum of every block.

    Raises InvalidRequest where an operation or the whole breaks a limit.
    """
    seeds = _layer_seeds(generation, position.sequence)
    table: list[bytes] = []
    payload: list[bytes | memoryview] = []
    done: list[Operation] = []
    for given in operations:
        operation = given
        _check_operation(operation)
        entry = _ENTRY.pack(operation.kind, operation.count or len(operation.argument), operation.start)
        if operation.kind in WITH_PAYLOAD:
            checksums = _checksums(operation.data, operation.start, operation.count, seeds[operation.kind])
            operation = Operation(operation.kind, operation.start, operation.count, operation.data, checksums)
            table.append(entry + _layout_of(operation.count).pack(*checksums))
            payload.append(operation.data)
        else:
            table.append(entry + operation.argument)
        done.append(operation)
    table_bytes = b"".join(table)
    payload_size = sum(map(len, payload))
    if payload_size > MAX_RECORD_PAYLOAD or len(table_bytes) > MAX_TABLE or not 0 < len(done) <= MAX_OPERATIONS:
        raise InvalidRequest(
            f"a record of {len(done)} operations and {payload_size} bytes exceeds its limits "
            f"({MAX_OPERATIONS}, {MAX_RECORD_PAYLOAD})"
        )
    header = _HEADER.pack(
        _MAGIC, _VERSION, len(done), len(table_bytes), payload_size, *position, *previous, generation, configuration
    )
    checksum = _CHECKSUM.pack(xxhash.xxh3_64_intdigest(header + table_bytes))
    encoded = b"".join((header, checksum, table_bytes, *payload))
    return Record(position, previous, generation, configuration, tuple(done), encoded)


def decode_record(encoded: bytes | memoryview, *, verify_blocks: bool = True) -> Record:
    """The record that `encoded` holds, whole and nothing behind it.

    verify_blocks: also check every block of the payload; False only for bytes that were checked
    since they came from outside this process. Raises Corrupt where a checksum or a bound fails.
    """
    if not HEADER_SIZE <= len(encoded) <= MAX_RECORD_SIZE:
        raise Corrupt(f"a record of {len(encoded)} bytes is outside {HEADER_SIZE} to {MAX_RECORD_SIZE}")
    magic, version, count, table_size, payload_size, e, s, pe, ps, generation, configuration = _HEADER.unpack_from(
        encoded
    )
    if magic != _MAGIC or version != _VERSION:
        raise Corrupt(f"not a record of version {_VERSION}: magic {magic!r}, version {version}")
    if not count:
        raise Corrupt("a record without operations")
    if HEADER_SIZE + table_size + payload_size != len(encoded) or payload_size > MAX_RECORD_PAYLOAD:
        raise Corrupt(f"a record's sizes do not add up: {table_size} + {payload_size} in {len(encoded)} bytes")
    view = memoryview(encoded)
    table = view[HEADER_SIZE : HEADER_SIZE + table_size]
    (checksum,) = _CHECKSUM.unpack_from(encoded, _HEADER.size)
    digest = xxhash.xxh3_64(encoded[: _HEADER.size])
    digest.update(table)
    if digest.intdigest() != checksum:
        raise Corrupt(f"the header of record ({e}, {s}) fails its checksum")
    payload = view[HEADER_SIZE + table_size :]
    operations = _single_writes(table, count, payload) or tuple(_operations(table, count, payload))
    record = Record(
        Position(Epoch(e), Sequence(s)), Position(Epoch(pe), Sequence(ps)), Generation(generation), configuration,
        operations, encoded,
    )  # fmt: skip
    if verify_blocks:
        verify_record(record)
    return record


def verify_record(record: Record) -> None:
    """Check every block of the payload against its checksum. Raises Corrupt at the first that fails."""
    seeds = _layer_seeds(record.generation, record.sequence)
    for operation in record.operations:
        if operation.kind in WITH_PAYLOAD:
            found = _checksums(operation.data, operation.start, operation.count, seeds[operation.kind])
            if found != operation.checksums:
                raise Corrupt(f"a block of record {tuple(record.position)} fails its checksum")


def overlapping(operations: Seq[Operation], start: int, end: int) -> bool:
    """Whether any of the operations touches a block of [start, end)."""
    return any(o.on_blocks and o.start < end and start < o.start + o.count for o in operations)


def _layer_seeds(generation: int, sequence: int) -> dict[OperationKind, int]:
    """_layer_seed of what a record writes, and of what it fills."""
    return {
        OperationKind.WRITE: _layer_seed(generation, sequence),
        OperationKind.FILL: _layer_seed(FILL_GENERATION, sequence),
    }


def _layer_seed(generation: int, sequence: int) -> int:
    """What the seeds of all blocks of one generation and sequence have in common."""
    return (generation * _GENERATION_SEED ^ sequence * _SEQUENCE_SEED) & _MASK


def _checksums(data: bytes | memoryview, start: int, count: int, layer_seed: int) -> tuple[int, ...]:
    """block_checksum of each block in `data`, which lie from `start` on in one layer."""
    digest = xxhash.xxh3_64_intdigest
    if count == 1:
        return (digest(data, start * _NUMBER_SEED & _MASK ^ layer_seed),)
    view = memoryview(data)
    numbers = zip(range(start, start + count), range(0, count * BLOCK_SIZE, BLOCK_SIZE), strict=True)
    return tuple(
        [digest(view[at : at + BLOCK_SIZE], number * _NUMBER_SEED & _MASK ^ layer_seed) for number, at in numbers]
    )


def _layout_of(count: int) -> struct.Struct:
    """Of so many checksums. Most operations have one block: to make a format for it would cost more than all else."""
    return _CHECKSUM if count == 1 else struct.Struct(f"<{count}Q")


def _check_operation(operation: Operation) -> None:
    if operation.on_blocks:
        if operation.count < 1 or operation.start < 0 or operation.end > MAX_BLOCKS:
            raise InvalidRequest(f"blocks {operation.start} to {operation.end} are outside 0 to {MAX_BLOCKS}")
        if operation.count > MAX_OPERATION_BLOCKS:
            raise InvalidRequest(f"{operation.count} blocks in one operation, {MAX_OPERATION_BLOCKS} at most")
        wanted = operation.count * BLOCK_SIZE if operation.kind in WITH_PAYLOAD else 0
        if len(operation.data) != wanted:
            raise InvalidRequest(
                f"{operation.kind.name} of {operation.count} blocks carries {len(operation.data)} bytes"
            )
    elif operation.count or len(operation.data) or len(operation.argument) > MAX_ARGUMENT:
        raise InvalidRequest(
            f"{operation.kind.name} takes an argument of at most {MAX_ARGUMENT} bytes and nothing else"
        )


def _single_writes(table: memoryview, count: int, payload: memoryview) -> tuple[Operation, ...]:
    """_operations of a table that has nothing but writes of one block each, in half the time; of any other, none.

    That is what the small writes of a busy guest become.
    """
    if len(table) != count * _ENTRY_OF_ONE.size or len(payload) != count * BLOCK_SIZE:
        return ()
    entries = list(_ENTRY_OF_ONE.iter_unpack(table))
    if any(kind != OperationKind.WRITE or amount != 1 or start >= MAX_BLOCKS for kind, amount, start, _ in entries):
        return ()
    write, places = OperationKind.WRITE, range(0, len(payload), BLOCK_SIZE)
    return tuple(
        [
            Operation(write, start, 1, payload[at : at + BLOCK_SIZE], (checksum,))
            for at, (_, _, start, checksum) in zip(places, entries, strict=True)
        ]
    )


def _operations(table: memoryview, count: int, payload: memoryview) -> Iterator[Operation]:
    """The operations of a table; every bound is checked before it is used. Raises Corrupt."""
    at = offset = 0
    for _ in range(count):
        if at + _ENTRY.size > len(table):
            raise Corrupt(f"a record's table ends at {len(table)}, inside an entry")
        number, amount, start = _ENTRY.unpack_from(table, at)
        at += _ENTRY.size
        kind = _KINDS.get(number)
        if kind is None:
            raise Corrupt(f"a record has an operation of unknown kind {number}")
        if kind not in _ON_BLOCKS:
            if at + amount > len(table):
                raise Corrupt(f"an argument of {amount} bytes does not fit a record's table")
            yield Operation(kind, BlockNumber(start), argument=bytes(table[at : at + amount]))
            at += amount
            continue
        if amount < 1 or start + amount > MAX_BLOCKS:
            raise Corrupt(f"a record names blocks {start} to {start + amount}, beyond {MAX_BLOCKS}")
        if kind not in WITH_PAYLOAD:
            yield Operation(kind, BlockNumber(start), amount)
            continue
        end, checksums_end = offset + amount * BLOCK_SIZE, at + amount * 8
        if checksums_end > len(table) or end > len(payload):
            raise Corrupt(f"a record's {kind.name} of {amount} blocks does not fit it")
        checksums = _layout_of(amount).unpack_from(table, at)
        yield Operation(kind, BlockNumber(start), amount, payload[offset:end], checksums)
        at, offset = checksums_end, end
    if at != len(table) or offset != len(payload):
        raise Corrupt(f"a record has {len(table) - at} and {len(payload) - offset} bytes behind its operations")
