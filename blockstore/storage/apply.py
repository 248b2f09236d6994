"""Applies committed records to the tables, inside the one transaction of a checkpoint.

Layer by layer from the oldest generation, each in the order of its blocks. A block that is zeroed or
trimmed keeps a zero entry only where something shows through otherwise: an older version, or a
source; a discarded one, which the source does not map, only over an older version. Ranges of zeroes
are met with `present`, so they cost what exists in them and not what they span. A run of blocks that one
operation wrote becomes rows as a whole. Every change sets its bits in `extents` and raises the row's
sequence, also where it deletes.
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from itertools import chain, groupby
from operator import attrgetter, itemgetter
from typing import Final, NamedTuple

from blockstore.record import ZEROING, OperationKind, Record
from blockstore.storage.keys import (
    HEAD_SIZE,
    NUMBER_SIZE,
    ExtentRow,
    bits_between,
    blocks_of,
    data_value,
    data_values,
    decode_bits,
    encode_bits,
    extent_key,
    heads,
    number_key,
    version_key,
    version_keys,
    zero_value,
)
from blockstore.storage.memtable import Entry, Layer, Memtable, WriteRun
from blockstore.storage.meta import MAX_PIN_ID, Meta, Pin, SealedGeneration, Tombstone
from blockstore.storage.reads import BlockVersion, CorruptBlocks
from blockstore.storage.tables import Tables, WriteCursor, Writing
from blockstore.units import EXTENT_BLOCKS, FILL_GENERATION, MAX_GENERATION, BlockNumber, Generation, Sequence

#: Entries that wait to be put in one go: what a trim of a whole restored volume holds in memory.
_PUTS_AT_ONCE: Final = 65_536


Put = tuple[bytes, bytes | memoryview]
"""Key and value."""


class Touched(NamedTuple):
    """What a layer does to one extent: entries by block, and runs inside it; either in order, none overlaps another."""

    extent: int
    entries: list[tuple[int, Entry]]
    runs: list[WriteRun]


class Applier:
    """Applies memtables within one transaction."""

    def __init__(self, tables: Tables, transaction: Writing) -> None:
        self._tables = tables
        self._transaction = transaction
        self._meta = Meta(tables, transaction)
        self._has_source = bool(self._meta.source)
        self._cursor = transaction.cursor(tables.index)
        self._index_puts: list[Put] = []
        self._data_puts: list[Put] = []

    def apply(self, memtable: Memtable, *, filling: bool) -> None:
        """All of it. filling: keep what a copy stated earlier must not undo."""
        for generation, layer in memtable.layers.items():
            self._apply_layer(generation, layer)
        for record in memtable.with_controls:
            self._apply_controls(record, filling)
        if filling:
            for record in memtable.records:
                self._meta.put_tombstones(_tombstones(record))

    def _apply_layer(self, generation: Generation, layer: Layer) -> None:
        for touched in _by_extent(self._entries(layer), layer):
            new = self._never_filled(touched) if generation == FILL_GENERATION else touched
            if new.entries or new.runs:
                self._apply_extent(generation, new)
            if len(self._index_puts) >= _PUTS_AT_ONCE:
                self._flush()
        self._flush()

    def _flush(self) -> None:
        put_sorted(self._transaction.cursor(self._tables.index), self._index_puts)
        put_sorted(self._transaction.cursor(self._tables.data), self._data_puts)
        self._index_puts, self._data_puts = [], []

    def _entries(self, layer: Layer) -> Iterable[tuple[int, Entry]]:
        """The layer's blocks, and those that matter under its ranges of zeroes, in order; never all at once."""
        blocks = sorted(layer.blocks.items(), key=itemgetter(0))
        return heapq.merge(blocks, self._zeroed(layer), key=itemgetter(0)) if layer.zeroes else blocks

    def _zeroed(self, layer: Layer) -> Iterator[tuple[int, Entry]]:
        for start, end, zero in layer.zeroes:
            numbers = range(start, end) if self._covers_source(zero) else self._existing(start, end)
            for number in numbers:
                if not layer.covers(number):
                    yield number, zero

    def _covers_source(self, zero: Entry) -> bool:
        """Whether absence would mean something else: what the source has."""
        return self._has_source and not zero.discarded

    def _existing(self, start: int, end: int) -> Iterator[int]:
        """The blocks of [start, end) that have an entry; `present` may change meanwhile, in extents before the next."""
        cursor = self._transaction.cursor(self._tables.present)
        found = cursor.set_range(number_key(start // EXTENT_BLOCKS))
        while found:
            key, value = cursor.item()
            extent = int.from_bytes(key, "big")
            if extent * EXTENT_BLOCKS >= end:
                return
            yield from blocks_of(extent, decode_bits(key, value) & bits_between(start, end, extent))
            found = cursor.set_range(number_key(extent + 1))

    def _never_filled(self, touched: Touched) -> Touched:
        """Of fills, those of blocks that no fill is noted of: what an earlier one left is there, or went for good.

        A copy may be ahead of this log: it reflects a fill that is applied here only now, and may come from after
        the end of the source, when a merge took both the fill and the zero entry away that a trim had left over it.
        """
        key = extent_key(FILL_GENERATION, touched.extent)
        stored = self._transaction.get(key, db=self._tables.extents)
        if stored is None:
            return touched
        filled = ExtentRow.decode(key, stored).bits
        new = [run for run in touched.runs if not filled & _bits_of(run)]
        others = chain.from_iterable(run.entries() for run in touched.runs if filled & _bits_of(run))
        entries = [item for item in (*touched.entries, *others) if not filled >> item[0] % EXTENT_BLOCKS & 1]
        return Touched(touched.extent, sorted(entries, key=itemgetter(0)), new)

    def _apply_extent(self, generation: Generation, touched: Touched) -> None:
        key = number_key(touched.extent)
        stored = self._transaction.get(key, db=self._tables.present)
        before = decode_bits(key, stored) if stored is not None else 0
        present, changed = before, 0
        highest = max([run.sequence for run in touched.runs] + [entry.sequence for _, entry in touched.entries])
        index_from, data_from = len(self._index_puts), len(self._data_puts)
        for run in touched.runs:
            self._put_run(generation, run)
            changed |= _bits_of(run)
        present |= changed
        for number, entry in touched.entries:
            sequence, block, checksum, _ = entry
            bit = 1 << number % EXTENT_BLOCKS
            changed |= bit
            if block is not None:
                version = version_key(number, generation)
                self._index_puts.append((version, data_value(sequence, checksum, block)))
                self._data_puts.append((version, block[:HEAD_SIZE]))
                present |= bit
            elif self._put_zero(number, generation, entry, exists=bool(before & bit)):
                present |= bit
            else:
                present &= ~bit
        if touched.runs and touched.entries:  # what is put has to be in the order of keys
            self._index_puts[index_from:] = sorted(self._index_puts[index_from:], key=itemgetter(0))
            self._data_puts[data_from:] = sorted(self._data_puts[data_from:], key=itemgetter(0))
        if present != before:
            put_present(self._tables, self._transaction, touched.extent, present)
        key = extent_key(generation, touched.extent)
        raise_extent(self._tables, self._transaction, key, ExtentRow(Sequence(highest), changed))

    def _put_run(self, generation: Generation, run: WriteRun) -> None:
        """Its rows, by a few calls over all of its blocks: one by one they took most of a checkpoint's time."""
        keys = version_keys(run.start, run.end, generation)
        self._index_puts += zip(keys, data_values(run.sequence, run.checksums, run.data), strict=True)
        self._data_puts += zip(keys, heads(run.data), strict=True)

    def _put_zero(self, number: int, generation: Generation, zero: Entry, *, exists: bool) -> bool:
        """Make a block read as zeroes in a generation; whether it has any entry then."""
        newer, here, older = self._versions(number, generation) if exists else (False, False, False)
        key = version_key(number, generation)
        if here:
            self._transaction.delete(key, db=self._tables.data)
        if older or self._covers_source(zero):
            self._index_puts.append((key, zero_value(number, generation, zero.sequence)))
            return True
        if here:
            self._transaction.delete(key, db=self._tables.index)
        return newer

    def _versions(self, number: int, generation: Generation) -> tuple[bool, bool, bool]:
        """Whether a block has versions newer than, in, and older than a generation."""
        cursor, prefix, key = self._cursor, number_key(number), version_key(number, generation)
        first = cursor.key() if cursor.set_range(version_key(number, MAX_GENERATION)) else b""
        if first[:NUMBER_SIZE] != prefix:
            raise CorruptBlocks([BlockVersion(BlockNumber(number), None, None)])
        newer = first < key
        found = cursor.set_range(key) if newer else True
        here = found and cursor.key() == key
        if here:
            found = cursor.next()
        older = found and cursor.key()[:NUMBER_SIZE] == prefix
        return newer, here, older

    def _apply_controls(self, record: Record, filling: bool) -> None:
        for operation in record.operations:
            holder = operation.argument[:MAX_PIN_ID]
            match operation.kind:
                case OperationKind.SEAL:
                    self._meta.put_sealed(SealedGeneration(record.generation, record.sequence, operation.argument))
                    if holder:
                        self._meta.put_pin(Pin(record.generation, holder, record.sequence, held=True))
                case OperationKind.PIN:
                    self._meta.put_pin(Pin(Generation(operation.start), holder, record.sequence, held=True))
                case OperationKind.UNPIN if filling:
                    self._meta.put_pin(Pin(Generation(operation.start), holder, record.sequence, held=False))
                case OperationKind.UNPIN:
                    self._meta.delete_pin(Generation(operation.start), holder)
                case OperationKind.HYDRATED:
                    self._meta.delete(b"source")
                    if filling:  # or a copy of meta would bring the source back
                        self._meta.put(b"hydrated", b"")


def put_present(tables: Tables, transaction: Writing, extent: int, bits: int) -> None:
    """Set the row of an extent in `present`, or delete it where no bit is left."""
    key = number_key(extent)
    if bits:
        transaction.put(key, encode_bits(key, bits), db=tables.present)
    else:
        transaction.delete(key, db=tables.present)


def raise_extent(tables: Tables, transaction: Writing, key: bytes, change: ExtentRow) -> None:
    """Note a change in `extents`: the row's bits are or-ed, its sequence is the highest."""
    stored = transaction.get(key, db=tables.extents)
    if stored is not None:
        row = ExtentRow.decode(key, stored)
        change = ExtentRow(max(change.sequence, row.sequence), change.bits | row.bits)
    transaction.put(key, change.encode(key), db=tables.extents)


def put_sorted(cursor: WriteCursor, items: Seq[Put]) -> None:
    """Put items that are in key order; those behind the table's end are appended, which fills pages whole."""
    if not items:
        return
    last = cursor.key() if cursor.last() else b""
    split = bisect_right(items, last, key=lambda item: item[0])
    cursor.putmulti(items[:split])
    consumed, added = cursor.putmulti(items[split:], append=True)
    assert consumed == added, "items behind the end of a table were not in order"


def _by_extent(entries: Iterable[tuple[int, Entry]], layer: Layer) -> Iterator[Touched]:
    """These entries of a layer and its runs, extent by extent."""
    alone = (
        Touched(extent, list(group), []) for extent, group in groupby(entries, lambda each: each[0] // EXTENT_BLOCKS)
    )
    if not layer.runs:
        return alone
    pieces = (piece for first, last, run in layer.runs for piece in _inside_extents(run.part(first, last)))
    runs = (
        Touched(extent, [], list(group)) for extent, group in groupby(pieces, lambda each: each.start // EXTENT_BLOCKS)
    )
    either = groupby(heapq.merge(alone, runs, key=attrgetter("extent")), attrgetter("extent"))
    return (_together(list(of_one)) for _, of_one in either)


def _together(parts: list[Touched]) -> Touched:
    """What there is of one extent: entries, runs, or both."""
    return Touched(
        parts[0].extent,
        [entry for part in parts for entry in part.entries],
        [run for part in parts for run in part.runs],
    )


def _inside_extents(run: WriteRun) -> Iterator[WriteRun]:
    """A run in pieces that cross no boundary of extents."""
    at = run.start
    while at < run.end:
        end = min(run.end, (at // EXTENT_BLOCKS + 1) * EXTENT_BLOCKS)
        yield run.part(at, end)
        at = end


def _bits_of(run: WriteRun) -> int:
    """In the bitmap of the extent that it lies in."""
    return bits_between(run.start, run.end, run.start // EXTENT_BLOCKS)


def _tombstones(record: Record) -> Iterator[Tombstone]:
    for operation in record.operations:
        if operation.kind in ZEROING:
            discarded = operation.kind is OperationKind.DISCARD
            yield Tombstone(operation.start, operation.end, record.generation, record.sequence, discarded)
