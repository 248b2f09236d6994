"""A record's bytes: what is decoded is what was encoded, whatever it is made of, and no changed bit goes unnoticed."""

import random
import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from blockstore import record as records
from blockstore.domain import Position
from blockstore.errors import Corrupt
from blockstore.record import HEADER_SIZE, WITH_PAYLOAD, Operation, OperationKind, Record, decode_record, encode_record
from blockstore.units import BLOCK_SIZE, MAX_BLOCKS, BlockNumber, Epoch, Generation, Sequence

AT, BEFORE = Position(Epoch(3), Sequence(9)), Position(Epoch(2), Sequence(8))


def content(blocks: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(blocks * BLOCK_SIZE)


@st.composite
def operations(draw: st.DrawFn) -> list[Operation]:
    """Up to six, none over another; most often writes of one block, as guests send them."""
    made, start = [], draw(st.integers(0, 5))
    for seed in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from([OperationKind.WRITE] * 4 + list(OperationKind)))
        count = draw(st.sampled_from([1, 1, 1, 2, 9]))
        if kind in WITH_PAYLOAD:
            made.append(Operation(kind, BlockNumber(start), count, content(count, seed)))
        elif kind in records.ZEROING:
            made.append(Operation(kind, BlockNumber(start), count))
        else:
            made.append(Operation(kind, BlockNumber(start), argument=b"x" * draw(st.sampled_from([0, 8, 24]))))
        start += count + draw(st.integers(0, 3))
    return made


def encoded(given_operations: list[Operation]) -> Record:
    return encode_record(AT, BEFORE, Generation(4), 1, given_operations)


@given(operations())
def test_a_record_comes_back_as_it_was(made: list[Operation]) -> None:
    record = encoded(made)
    assert decode_record(record.encoded) == record
    assert [(each.kind, each.start, each.data, each.argument) for each in record.operations] == [
        (each.kind, each.start, each.data, each.argument) for each in made
    ]


def test_a_table_that_is_as_long_as_one_of_single_writes_is_still_read_as_it_is() -> None:
    """A write of two blocks and a trim take as many bytes as two writes of one block, payload included."""
    made = [
        Operation(OperationKind.WRITE, BlockNumber(7), 2, content(2, 1)),
        Operation(OperationKind.TRIM, BlockNumber(20), 3),
    ]
    assert len(encoded(made).encoded) == HEADER_SIZE + 2 * 24 + 2 * BLOCK_SIZE
    assert decode_record(encoded(made).encoded) == encoded(made)
    fills = [Operation(OperationKind.FILL, BlockNumber(number), 1, content(1, number)) for number in range(3)]
    assert decode_record(encoded(fills).encoded) == encoded(fills)


@pytest.mark.parametrize("singles", [1, 3])
def test_any_flipped_bit_is_noticed(singles: int) -> None:
    made = [Operation(OperationKind.WRITE, BlockNumber(2 * n), 1, content(1, n)) for n in range(singles)]
    whole, flips = bytes(encoded(made).encoded), random.Random(1)
    head = len(whole) - singles * BLOCK_SIZE
    for byte in [*range(head), *(flips.randrange(head, len(whole)) for _ in range(200))]:
        changed = bytearray(whole)
        changed[byte] ^= 1 << flips.randrange(8)
        with pytest.raises(Corrupt):
            decode_record(bytes(changed))


@given(st.binary(max_size=3 * HEADER_SIZE))
def test_nonsense_is_corrupt(nonsense: bytes) -> None:
    with pytest.raises(Corrupt):
        decode_record(nonsense)


def forged(entries: list[tuple[int, int, int, int]], payload: bytes) -> bytes:
    """A record whose header vouches for a table of such entries: kind, amount, start, checksum."""
    table = b"".join(struct.pack("<B3xIQQ", *entry) for entry in entries)
    header = struct.pack("<4sHHIIQQQQII", b"CRec", 1, len(entries), len(table), len(payload), *AT, *BEFORE, 4, 1)
    return header + struct.pack("<Q", xxhash.xxh3_64_intdigest(header + table)) + table + payload


@pytest.mark.parametrize(
    "entry", [(0, 1, 5, 0), (200, 1, 5, 0), (1, 0, 5, 0), (1, 1, MAX_BLOCKS, 0), (1, 1, 1 << 60, 0), (1, 2, 5, 0)]
)
def test_bounds_are_checked_where_checksums_are_right(entry: tuple[int, int, int, int]) -> None:
    good = records.block_checksum(bytes(BLOCK_SIZE), 1, 4, AT.sequence)
    assert decode_record(forged([(1, 1, 1, good)], bytes(BLOCK_SIZE)))
    with pytest.raises(Corrupt):
        decode_record(forged([(1, 1, 1, good), entry], bytes(2 * BLOCK_SIZE)))


def test_a_record_without_operations_is_corrupt() -> None:
    with pytest.raises(Corrupt, match="without operations"):
        decode_record(forged([], b""))


def test_a_block_that_belongs_elsewhere_fails_its_checksum() -> None:
    """Its seed has the block's number, the layer and the sequence in it."""
    block = content(1, 1)
    good = encoded([Operation(OperationKind.WRITE, BlockNumber(5), 1, block)]).operations[0].checksums[0]
    assert good == records.block_checksum(block, 5, 4, AT.sequence)
    for number, generation, sequence in ((6, 4, 9), (5, 3, 9), (5, 4, 8)):
        assert good != records.block_checksum(block, number, generation, sequence)
    (fill,) = encoded([Operation(OperationKind.FILL, BlockNumber(5), 1, block)]).operations
    assert fill.checksums[0] == records.block_checksum(block, 5, 0, AT.sequence)
