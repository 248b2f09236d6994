"""A memtable's layer against a dict of blocks, whatever it keeps as runs and whatever block by block."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.record import Operation, OperationKind, block_checksum
from blockstore.storage.memtable import RUN_BLOCKS, Entry, Layer, Memtable
from blockstore.units import BLOCK_SIZE, BlockNumber
from tests.storage_model import Log, block, write

LENGTH = 40
RANGES = st.tuples(st.integers(0, LENGTH - 1), st.sampled_from([1, 2, RUN_BLOCKS - 1, RUN_BLOCKS, 20])).map(
    lambda r: (r[0], min(r[0] + r[1], LENGTH))
)


def write_of(start: int, end: int, sequence: int) -> tuple[Operation, dict[int, Entry]]:
    """The operation, and the entries that it stands for."""
    blocks = {number: block(100 * sequence + number) for number in range(start, end)}
    entries = {
        number: Entry(sequence, memoryview(content), block_checksum(content, number, 1, sequence))
        for number, content in blocks.items()
    }
    checksums = tuple(entry.checksum for entry in entries.values())
    data = b"".join(blocks.values())
    return Operation(OperationKind.WRITE, BlockNumber(start), end - start, data, checksums), entries


@given(st.lists(st.tuples(RANGES, st.booleans()), max_size=12), RANGES)
def test_a_layer_says_what_the_last_operation_left(
    operations: list[tuple[tuple[int, int], bool]], window: tuple[int, int]
) -> None:
    layer, model, written = Layer(), dict[int, Entry](), set[int]()
    for sequence, ((start, end), is_write) in enumerate(operations, 1):
        if is_write:
            operation, entries = write_of(start, end, sequence)
            layer.write(operation, sequence)
            model |= entries
            written |= entries.keys()
        else:
            zero = Entry(sequence, None, 0)
            layer.zero(start, end, zero)
            model.update(dict.fromkeys(range(start, end), zero))
    shown = dict(layer.between(*window))
    assert shown == {number: entry for number, entry in model.items() if window[0] <= number < window[1]}
    assert {number for number in range(LENGTH) if layer.covers(number)} == written
    in_runs = [number for start, end, _ in layer.runs for number in range(start, end)]
    assert sorted([*layer.blocks, *in_runs]) == sorted(written)


def test_a_large_write_is_one_piece_until_something_falls_into_it() -> None:
    layer = Layer()
    operation, _ = write_of(0, LENGTH, 1)
    layer.write(operation, 1)
    assert (len(layer.runs), len(layer.blocks)) == (1, 0)
    small, _ = write_of(5, 6, 2)
    layer.write(small, 2)
    pieces = [(start, end, bytes(run.part(start, end).data[:BLOCK_SIZE])) for start, end, run in layer.runs]
    assert pieces == [(0, 5, block(100)), (6, LENGTH, block(106))]
    assert list(layer.blocks) == [5]


def test_small_writes_weigh_a_quarter_in_what_a_checkpoint_is_due_for() -> None:
    runs, scattered, log = Memtable(), Memtable(), Log()
    for number in range(0, 64, RUN_BLOCKS):
        runs.add(log.record(write(number, *map(block, range(RUN_BLOCKS)))))
    for number in range(64):
        scattered.add(log.record(write(3 * number, block(number))))
    assert runs.weight_bytes == pytest.approx(64 * BLOCK_SIZE, rel=0.02)
    assert scattered.weight_bytes == scattered.size_bytes // 4
    assert Memtable(runs.records).weight_bytes == runs.weight_bytes, "as when a checkpoint failed"
