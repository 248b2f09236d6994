"""Copying a replica's content to one that fills (docs/replication.md, catching up).

The source gives what its tables hold, each extent in one transaction with the applied position that
states it. The target lays that under what it has learnt since from its live stream: entry by entry,
what is newer here than the stated position stays, else the copy wins, absence included. What was
trimmed here after that position must not come back, so a filling replica keeps each trim as a
tombstone, a range of blocks; a copy stated at or above the trim reflects it and overrules it.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from blockstore.errors import Corrupt
from blockstore.storage.apply import put_present, put_sorted, raise_extent
from blockstore.storage.copies import CopiedBlock, ExtentCopy, MetaCopy
from blockstore.storage.extent_check import lost_entries
from blockstore.storage.keys import (
    EXTENT_KEY,
    HEAD_SIZE,
    ExtentRow,
    Key,
    Version,
    data_value,
    decode_bits,
    extent_key,
    number_key,
    parse_index_value,
    parse_version_key,
    raw_sequence,
    version_key,
    zero_value,
)
from blockstore.storage.meta import Meta, SealedGeneration, Tombstone
from blockstore.storage.ranges import RangeMap
from blockstore.storage.reads import BlockVersion, CorruptBlocks, TableReader
from blockstore.storage.tables import Reading, Tables, Writing
from blockstore.units import EXTENT_BLOCKS, FILL_GENERATION, MAX_GENERATION, BlockNumber, Generation, Sequence

#: Rows of `extents` looked at in one transaction, so that none lasts long.
_ROWS_A_CALL: Final = 5_000

# ---- the source


def extents_above(tables: Tables, since: Sequence) -> list[int]:
    """The extents whose highest sequence, in any generation, is above `since`; ascending. Raises Corrupt."""
    found: set[int] = set()
    start: bytes | None = b"\x00"
    while start is not None:
        with tables.reading() as transaction:
            start = _scan_extents(tables, transaction, start, since, found)
    return sorted(found)


def _scan_extents(tables: Tables, transaction: Reading, start: bytes, since: Sequence, found: set[int]) -> bytes | None:
    """Adds to `found`; returns the key to go on from, None at the end."""
    cursor = transaction.cursor(tables.extents)
    here = cursor.set_range(start)
    for _ in range(_ROWS_A_CALL):
        if not here:
            return None
        key, value = cursor.item()
        if ExtentRow.decode(key, value).sequence > since:
            found.add(EXTENT_KEY.unpack(key)[1])
        here = cursor.next()
    return bytes(cursor.key()) if here else None


def held_extents(tables: Tables) -> set[int]:
    """The extents of which there is anything, be it an entry that nothing else tells of. Raises Corrupt."""
    found = set(extents_above(tables, Sequence(-1)))
    with tables.reading() as transaction:
        found.update(int.from_bytes(key, "big") for key in transaction.cursor(tables.present).iternext(values=False))
        cursor = transaction.cursor(tables.index)
        here = cursor.first()
        while here:
            number, _ = parse_version_key(cursor.key())
            found.add(number // EXTENT_BLOCKS)
            here = cursor.set_range(version_key((number // EXTENT_BLOCKS + 1) * EXTENT_BLOCKS, MAX_GENERATION))
    return found


def read_meta(tables: Tables, transaction: Reading) -> MetaCopy:
    """What a copy starts with."""
    meta = Meta(tables, transaction)
    return MetaCopy(meta.applied(), meta.generation(), meta.source, meta.sealed(), meta.pins())


def read_extent(tables: Tables, transaction: Reading, extent: int) -> ExtentCopy:
    """An extent of a whole replica, in all generations; each block verified, and none missing. Raises CorruptBlocks."""
    meta = Meta(tables, transaction)
    entries = read_entries(tables, transaction, extent)
    rows = read_rows(tables, transaction, extent, all_generations(meta))
    reader = TableReader(tables, transaction)
    present = read_present(tables, transaction, extent)
    for number, _ in lost_entries(extent, entries, present, rows, visible_generations(meta)):
        reader.damaged.append(BlockVersion(BlockNumber(number), None, None))
    blocks = []
    for (number, generation), version in entries.items():
        found = reader.load(number, generation)
        if found is not None:
            blocks.append(CopiedBlock(number, generation, version.sequence, version.checksum, found.block))
    reader.raise_damage()
    return ExtentCopy(extent, meta.applied(), rows, blocks)


def read_present(tables: Tables, transaction: Reading | Writing, extent: int) -> int:
    """The bitmap of the blocks with any entry. Raises Corrupt."""
    key = number_key(extent)
    value = transaction.get(key, db=tables.present)
    return 0 if value is None else decode_bits(key, value)


def read_entries(tables: Tables, transaction: Reading | Writing, extent: int) -> dict[Key, Version]:
    """All index entries of an extent, in key order. Raises Corrupt, CorruptBlocks."""
    entries: dict[Key, Version] = {}
    cursor = transaction.cursor(tables.index)
    here = cursor.set_range(version_key(extent * EXTENT_BLOCKS, MAX_GENERATION))
    while here:
        number, generation = parse_version_key(cursor.key())
        if number >= (extent + 1) * EXTENT_BLOCKS:
            break
        version = parse_index_value(number, generation, cursor.value())
        if version is None:
            raise CorruptBlocks([BlockVersion(BlockNumber(number), generation, raw_sequence(cursor.value()))])
        entries[number, generation] = version
        here = cursor.next()
    return entries


def read_rows(
    tables: Tables, transaction: Reading | Writing, extent: int, generations: Iterable[Generation]
) -> dict[Generation, ExtentRow]:
    """The rows of an extent in these generations. Raises Corrupt."""
    rows = {}
    for generation in generations:
        key = extent_key(generation, extent)
        value = transaction.get(key, db=tables.extents)
        if value is not None:
            rows[generation] = ExtentRow.decode(key, value)
    return rows


def all_generations(meta: Meta) -> list[Generation]:
    """Every generation that can have rows in a whole replica, ascending; the first is that of fills."""
    return [FILL_GENERATION, *[sealed.generation for sealed in meta.sealed()], meta.generation()]


def visible_generations(meta: Meta) -> list[Generation]:
    """The generations that reads may ask for: those that are pinned, and the current one; ascending."""
    pinned = meta.pinned()
    return [*[sealed.generation for sealed in meta.sealed() if sealed.generation in pinned], meta.generation()]


def stored_generations(tables: Tables, transaction: Reading | Writing) -> list[Generation]:
    """Every generation that has rows, ascending; a seek for each."""
    generations: list[Generation] = []
    cursor = transaction.cursor(tables.extents)
    here = cursor.first()
    while here:
        generation, _ = EXTENT_KEY.unpack(cursor.key())
        generations.append(Generation(generation))
        here = generation < MAX_GENERATION and cursor.set_range(extent_key(generation + 1, 0))
    return generations


# ---- the target


class CopyWriter:
    """Lays copies under what a filling replica has, within one transaction."""

    def __init__(self, tables: Tables, transaction: Writing, stated: Sequence) -> None:
        """stated: no copy is of an earlier position, so no earlier trim can be undone."""
        self._tables = tables
        self._transaction = transaction
        self._meta = Meta(tables, transaction)
        self._trims: dict[Generation, RangeMap[Tombstone]] = defaultdict(RangeMap)
        for tombstone in self._meta.tombstones(stated):  # in the order of sequences
            self._trims[tombstone.generation].put(tombstone.start, tombstone.end, tombstone)
        self._generations = stored_generations(tables, transaction)
        self._has_source = bool(self._meta.source)

    def write_meta(self, copy: MetaCopy) -> None:
        """Pins as the peer has them, unless a later record here says otherwise; generations of both.

        Either side may have merged away what nobody pins, the other not: so that cannot be read here
        any more, and a merge removes what is left of it.
        """
        stated = copy.position.sequence
        newer = {(pin.generation, pin.holder) for pin in self._meta.pins() if pin.sequence > stated}
        for pin in self._meta.pins():
            if pin.sequence <= stated:
                self._meta.delete_pin(pin.generation, pin.holder)
        for pin in copy.pins:
            if (pin.generation, pin.holder) not in newer:
                self._meta.put_pin(pin)
        known = {sealed.generation: sealed for sealed in [*copy.sealed, *self._meta.sealed()]}
        for generation in self._generations:
            if FILL_GENERATION < generation < copy.generation and generation not in known:
                known[generation] = SealedGeneration(generation, stated, b"")
        pinned = self._meta.pinned()
        for generation, sealed in known.items():
            self._meta.put_sealed(sealed._replace(merging=generation not in pinned))
        self._write_source(copy)

    def _write_source(self, copy: MetaCopy) -> None:
        """The peer's, unless it ended here since. One that has ended there is over: it never comes back."""
        if not copy.source:
            self._meta.delete(b"source")
            self._has_source = False
        elif self._meta.get(b"hydrated") is None:
            self._meta.put(b"source", copy.source)
            if not self._has_source:
                self._has_source = True
                self._cover_source(copy.position.sequence)

    def _cover_source(self, stated: Sequence) -> None:
        """Trims after the stated position were applied before anybody knew of a source: absence meant zeroes.

        Only extents that the peer had anything of are copied, so each block gets its zero entry now.
        """
        for generation, trims in self._trims.items():
            for start, end, tombstone in trims:
                if tombstone.sequence > stated and not tombstone.discarded:
                    for number in range(start, end):
                        self._cover_block(number, generation, tombstone.sequence)

    def _cover_block(self, number: int, generation: Generation, sequence: Sequence) -> None:
        if self._transaction.get(version_key(number, generation), db=self._tables.index) is not None:
            return  # written again since
        extent, bit = number // EXTENT_BLOCKS, 1 << number % EXTENT_BLOCKS
        self._put_zero(number, generation, sequence)
        present = read_present(self._tables, self._transaction, extent)
        put_present(self._tables, self._transaction, extent, present | bit)
        raise_extent(self._tables, self._transaction, extent_key(generation, extent), ExtentRow(sequence, bit))

    def write_extent(self, copy: ExtentCopy) -> None:
        """Raises Corrupt where what is here is damaged."""
        local = read_entries(self._tables, self._transaction, copy.extent)
        rows = read_rows(self._tables, self._transaction, copy.extent, self._generations)
        stated = copy.position.sequence
        undone = self._undone(copy.extent, stated)
        kept = {key: version.sequence for key, version in local.items() if version.sequence > stated}
        copied = {(block.number, block.generation): block for block in copy.blocks}
        arriving = {key: block for key, block in copied.items() if key not in kept and key not in undone}
        zeroes = self._zeroes(undone, {*kept, *arriving})
        after = {*kept, *arriving, *zeroes}

        for key in local.keys() - after:
            self._delete(*key)
        self._put_blocks(local, arriving)
        for (number, generation), sequence in zeroes.items():
            self._put_zero(number, generation, sequence)
        bits = sum(1 << index for index in {number % EXTENT_BLOCKS for number, _ in after})
        put_present(self._tables, self._transaction, copy.extent, bits)
        self._put_rows(copy, rows)
        self._raise_undone(copy.extent, undone, {number for number, _ in {*local, *copied}})

    def _undone(self, extent: int, stated: Sequence) -> dict[Key, Tombstone]:
        """The blocks that a trim here took away after the stated position, with the last such trim."""
        first = extent * EXTENT_BLOCKS
        return {
            (number, generation): tombstone
            for generation, trims in self._trims.items()
            for start, end, tombstone in trims.between(first, first + EXTENT_BLOCKS)
            if tombstone.sequence > stated
            for number in range(start, end)
        }

    def _zeroes(self, undone: dict[Key, Tombstone], present: set[Key]) -> dict[Key, Sequence]:
        """Trims that need an entry, because something would show through."""
        oldest: dict[int, Generation] = {}
        for number, generation in present:
            oldest[number] = min(generation, oldest.get(number, generation))
        return {
            (number, generation): trim.sequence
            for (number, generation), trim in undone.items()
            if (number, generation) not in present
            and (self._covers_source(trim) or oldest.get(number, MAX_GENERATION) < generation)
        }

    def _covers_source(self, trim: Tombstone) -> bool:
        return self._has_source and not trim.discarded

    def _delete(self, number: int, generation: Generation) -> None:
        key = version_key(number, generation)
        self._transaction.delete(key, db=self._tables.index)
        self._transaction.delete(key, db=self._tables.data)

    def _put_blocks(self, local: dict[Key, Version], arriving: dict[Key, CopiedBlock]) -> None:
        index: list[tuple[bytes, bytes]] = []
        data: list[tuple[bytes, bytes | memoryview]] = []
        for (number, generation), copied in arriving.items():
            here = local.get((number, generation))
            if here is not None and (here.sequence, here.checksum) == (copied.sequence, copied.checksum):
                continue
            if copied.block is None:
                self._put_zero(number, generation, copied.sequence)
                continue
            key = version_key(number, generation)
            index.append((key, data_value(copied.sequence, copied.checksum, copied.block)))
            data.append((key, copied.block[:HEAD_SIZE]))
        put_sorted(self._transaction.cursor(self._tables.index), sorted(index))
        put_sorted(self._transaction.cursor(self._tables.data), sorted(data, key=lambda item: item[0]))

    def _put_zero(self, number: int, generation: Generation, sequence: int) -> None:
        key = version_key(number, generation)
        self._transaction.put(key, zero_value(number, generation, sequence), db=self._tables.index)
        self._transaction.delete(key, db=self._tables.data)

    def _put_rows(self, copy: ExtentCopy, local: dict[Generation, ExtentRow]) -> None:
        """The copy's rows, or-ed with those that changed here since."""
        for generation, row in local.items():
            if row.sequence <= copy.position.sequence and generation not in copy.rows:
                self._transaction.delete(extent_key(generation, copy.extent), db=self._tables.extents)
        for generation, row in copy.rows.items():
            here = local.get(generation)
            if here is not None and here.sequence > copy.position.sequence:
                row = ExtentRow(max(row.sequence, here.sequence), row.bits | here.bits)  # noqa: PLW2901
            if row != here:
                key = extent_key(generation, copy.extent)
                self._transaction.put(key, row.encode(key), db=self._tables.extents)

    def _raise_undone(self, extent: int, undone: dict[Key, Tombstone], existed: set[int]) -> None:
        """A trim that took something away is a change of its extent, also where it came before the copy."""
        for (number, generation), trim in undone.items():
            if number in existed or self._covers_source(trim):
                change = ExtentRow(trim.sequence, 1 << number % EXTENT_BLOCKS)
                raise_extent(self._tables, self._transaction, extent_key(generation, extent), change)


def lowest_stated(meta: MetaCopy | None, extents: list[ExtentCopy], stated: Sequence) -> Sequence:
    """The earliest position that any of the copies is of; `stated` without one.

    Raises Corrupt where one was stated above `stated`, with which it came: too early would be believed.
    """
    positions = [copy.position for copy in extents] + ([meta.position] if meta is not None else [])
    highest = max(positions, default=None, key=lambda position: position.sequence)
    if highest is not None and highest.sequence > stated:
        raise Corrupt(f"a copy was stated at {tuple(highest)}, above {stated} as which it came")
    return min([position.sequence for position in positions], default=stated)
