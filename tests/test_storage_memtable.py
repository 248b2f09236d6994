"""A memtable's layer against a dict of blocks, whatever it keeps as runs and whatever block by block."""

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from blockstore.append_codec import decode_append, encode_append
from blockstore.record import Operation, OperationKind, block_checksum
from blockstore.replication.messages import Append
from blockstore.rpc import replica_pb2 as pb
from blockstore.storage.memtable import RUN_BLOCKS, Entry, Layer, Memtable
from blockstore.units import BLOCK_SIZE, BlockNumber, Epoch
from tests.storage_model import Log, block, fill, trim, write

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


def test_what_a_checkpoint_is_due_for_counts_a_quarter_of_scattered_blocks_and_all_else_whole() -> None:
    runs, scattered, fills, trims, log = Memtable(), Memtable(), Memtable(), Memtable(), Log()
    for number in range(0, 64, RUN_BLOCKS):
        runs.add(log.record(write(number, *map(block, range(RUN_BLOCKS)))))
    for number in range(64):
        scattered.add(log.record(write(3 * number, block(number))))
        fills.add(log.record(fill(1000 + number, block(number))))
        trims.add(log.record(trim(3 * number, 1)))
    for whole in (runs, fills, trims):
        assert whole.weight_bytes == whole.size_bytes
    assert scattered.weight_bytes == scattered.size_bytes - 64 * BLOCK_SIZE * 3 // 4
    assert Memtable(scattered.records).weight_bytes == scattered.weight_bytes, "as when a checkpoint failed"


def test_a_record_costs_what_it_takes_alone_in_its_message() -> None:
    """Small trims, one to a record, are what a bound on bytes of encoding would let through by the million."""
    log, table = Log(), Memtable()
    records = [log.record(trim(3 * number, 1)) for number in range(2_000)]
    messages = [
        b"".join(encode_append(Append(Epoch(1), 1, 1, each.previous, each.position, (each,)), lambda _: pb.Peer()))
        for each in records
    ]
    tracemalloc.start()
    try:
        while messages:
            arrived = bytes(bytearray(messages.pop()))
            table.add(decode_append(arrived).message.records[0])
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.6 < taken / table.size_bytes < 1.5
