"""Committed records that no checkpoint has applied yet, in a form that reads can use.

A memtable has one layer for each generation that its records write to: a seal among them begins the
next one, and fills have their own, generation 0, below the guest's. A layer maps blocks to their
content, and ranges to zeroes; a block that a range of zeroes covers after it was written stays as
an entry of its own, because "written, then trimmed" is a change that its extent's row must show.
Blocks are views of the records' own bytes: nothing is copied. What a large operation wrote stays in one
piece, a run: 256 entries would cost as much as all else that a node does with a record of 1 MiB in memory.

Invariant: of the blocks that a layer wrote, each is either in its `blocks` or in one of its `runs`.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from itertools import repeat
from typing import Final, NamedTuple

from blockstore.record import RECORD_OVERHEAD_BYTES, ZEROING, Operation, OperationKind, Record
from blockstore.storage.ranges import RangeMap
from blockstore.units import BLOCK_SIZE, Generation, Sequence

#: What an operation costs in memory besides its payload: entries, views, ranges. Counted as
#: unapplied bytes, so that many small trims are bounded like writes.
OPERATION_OVERHEAD_BYTES: Final = 256
#: Blocks of one operation from which on a run costs less than its entries.
RUN_BLOCKS: Final = 8
#: Scattered blocks cost a checkpoint the less each, the more there are: several share a page of the index.
_SCATTERED_WEIGHT: Final = 1 / 4


class Entry(NamedTuple):
    """A block's content by one record; block is None for zeroes.

    discarded: zeroes that a DISCARD left, which mean the same as no entry where nothing older shows.
    """

    sequence: int
    block: memoryview | None
    checksum: int
    discarded: bool = False


class WriteRun(NamedTuple):
    """Consecutive blocks as one operation wrote them.

    start: the first one. data: their content, BLOCK_SIZE bytes each. checksums: one for each.
    """

    start: int
    sequence: int
    data: memoryview
    checksums: tuple[int, ...]

    @property
    def end(self) -> int:
        """The block after the last."""
        return self.start + len(self.checksums)

    def part(self, start: int, end: int) -> "WriteRun":
        """Its blocks [start, end)."""
        first, last = start - self.start, end - self.start
        data = self.data[first * BLOCK_SIZE : last * BLOCK_SIZE]
        return WriteRun(start, self.sequence, data, self.checksums[first:last])

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """Its blocks one by one, in order."""
        views = [self.data[at : at + BLOCK_SIZE] for at in range(0, len(self.data), BLOCK_SIZE)]
        return enumerate(map(Entry._make, zip(repeat(self.sequence), views, self.checksums, repeat(False))), self.start)


class Layer:
    """What one generation's records leave of each block they touched."""

    __slots__ = ("blocks", "runs", "zeroes")

    def __init__(self) -> None:
        self.blocks: dict[int, Entry] = {}
        self.runs: RangeMap[WriteRun] = RangeMap()
        self.zeroes: RangeMap[Entry] = RangeMap()

    def write(self, operation: Operation, sequence: int) -> None:
        if operation.count >= RUN_BLOCKS:
            self._put_run(WriteRun(operation.start, sequence, memoryview(operation.data), operation.checksums))
            return
        if self.runs:
            self.runs.cut(operation.start, operation.end)
        data, checksums = memoryview(operation.data), operation.checksums
        if len(checksums) == 1:
            self.blocks[operation.start] = Entry(sequence, data, checksums[0])
        else:
            self.blocks.update(WriteRun(operation.start, sequence, data, checksums).entries())

    def _put_run(self, run: WriteRun) -> None:
        if self.blocks:
            for number in range(run.start, run.end):
                self.blocks.pop(number, None)
        self.runs.put(run.start, run.end, run)

    def zero(self, start: int, end: int, zero: Entry) -> None:
        """O(blocks in the range or blocks in the layer, whichever is less)."""
        inside: Iterable[int] = range(start, end)
        if end - start > len(self.blocks):
            inside = [number for number in self.blocks if start <= number < end]
        for number in inside:
            if number in self.blocks:
                self.blocks[number] = zero
        if self.runs:
            for first, last, _ in self.runs.between(start, end):
                self.blocks.update(zip(range(first, last), repeat(zero)))
            self.runs.cut(start, end)
        self.zeroes.put(start, end, zero)

    def covers(self, number: int) -> bool:
        """Whether a write touched this block, be it zeroed since or not."""
        return number in self.blocks or self.runs.find(number) is not None

    def between(self, start: int, end: int) -> Iterator[tuple[int, Entry]]:
        """What it says of the blocks [start, end); a block may come twice, the later one counts."""
        if self.zeroes:
            for first, last, zero in self.zeroes.between(start, end):
                for number in range(first, last):
                    yield number, zero
        for first, last, run in self.runs.between(start, end):
            yield from run.part(first, last).entries()
        if blocks := self.blocks:
            for number in range(start, end):
                if number in blocks:
                    yield number, blocks[number]


class Memtable:
    """Records in order, and the layers that they make up; oldest generation first.

    with_controls: those that have operations which are not on blocks. hydrated: one of the records ends the source.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.records: list[Record] = []
        self.with_controls: list[Record] = []
        self.layers: dict[Generation, Layer] = {}
        self.size_bytes = 0
        self._scattered_bytes = 0
        self.hydrated = False
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """The next record in order."""
        sequence, generation = record.sequence, record.generation
        controls = False
        for operation in record.operations:
            kind = operation.kind
            if kind is OperationKind.WRITE:
                self._layer(generation).write(operation, sequence)
                if operation.count < RUN_BLOCKS:
                    self._scattered_bytes += len(operation.data)
            elif kind is OperationKind.FILL:
                self._layer(record.generation_of(operation)).write(operation, sequence)
            elif kind in ZEROING:
                zero = Entry(sequence, None, 0, kind is OperationKind.DISCARD)
                self._layer(generation).zero(operation.start, operation.end, zero)
            else:
                controls = True
                self.hydrated = self.hydrated or kind is OperationKind.HYDRATED
        self.records.append(record)
        if controls:
            self.with_controls.append(record)
        self.size_bytes += cost_bytes(record)

    @property
    def weight_bytes(self) -> int:
        """How much a checkpoint of it is due for: all its bytes, but of scattered writes a quarter."""
        return self.size_bytes - int(self._scattered_bytes * (1 - _SCATTERED_WEIGHT))

    def first(self) -> Sequence:
        """The sequence of the first record, 0 without any."""
        return self.records[0].sequence if self.records else Sequence(0)

    def last(self) -> Sequence:
        """The sequence of the last record, 0 without any."""
        return self.records[-1].sequence if self.records else Sequence(0)

    def _layer(self, generation: Generation) -> Layer:
        layer = self.layers.get(generation)
        if layer is None:
            layer = Layer()
            self.layers = dict(sorted([*self.layers.items(), (generation, layer)]))
        return layer


def cost_bytes(record: Record) -> int:
    """What a record takes in memory while it is not applied, rounded up."""
    return len(record.encoded) + RECORD_OVERHEAD_BYTES + OPERATION_OVERHEAD_BYTES * len(record.operations)


def overlay(memtables: Seq[Memtable], start: int, end: int) -> dict[int, tuple[Generation, Entry]]:
    """The newest content of the blocks [start, end) in memory, with its generation, in no order.

    memtables: the older first. Generations count before age: fills lie below everything else.
    """
    layers = [item for memtable in memtables for item in memtable.layers.items()]
    layers.sort(key=lambda item: item[0])
    found: dict[int, tuple[Generation, Entry]] = {}
    for generation, layer in layers:
        for number, entry in layer.between(start, end):
            found[number] = generation, entry
    return found
