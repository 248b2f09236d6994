"""Reads blocks out of the tables: the newest version at or below a generation, verified.

One seek finds a version, however long the chain of generations is. A run of blocks is found by walking
`index`, or by a seek a block where there are many versions, and then read and verified as a whole;
where anything is wrong with it, block by block, to say what. Every byte that leaves here has passed
the checksum of its version: what fails, and a block that is absent though `present` says it has an
entry, is reported with all others of the call as CorruptBlocks, so that the caller can fetch those
very versions from a peer.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, islice, repeat
from typing import Any, Final, NamedTuple

from blockstore.errors import Corrupt, OutOfRange
from blockstore.record import block_checksum, block_checksums, run_checksums
from blockstore.storage.keys import (
    DATA_FLAG,
    DATA_VALUE,
    NUMBER_SIZE,
    VERSION_KEY,
    decode_bits,
    number_key,
    parse_index_value,
    parse_version_key,
    raw_sequence,
    version_key,
)
from blockstore.storage.tables import Handles, Reading
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, MAX_BLOCKS, MAX_GENERATION, BlockNumber, Generation, Sequence

ZERO_BLOCK: Final = bytes(BLOCK_SIZE)
#: Below this a seek a block is as fast as setting up two walks.
_RUN: Final = 4
#: Versions a block up to which walking over all of them is faster than a seek for each block.
_WALKED_VERSIONS: Final = 3

Row = tuple[memoryview, memoryview]
"""Key and value, as LMDB shows them."""


class BlockVersion(NamedTuple):
    """Names one version of one block; generation and sequence are None where the entry itself is lost."""

    number: BlockNumber
    generation: Generation | None
    sequence: Sequence | None


class CorruptBlocks(Corrupt):
    """Blocks of a read fail their checksum or are missing. versions: which; a peer may have them whole."""

    def __init__(self, versions: Iterable[BlockVersion]) -> None:
        self.versions = tuple(versions)
        names = ", ".join(str(tuple(version)) for version in self.versions[:4])
        more = f" and {len(self.versions) - 4} more" if len(self.versions) > 4 else ""
        super().__init__(f"stored blocks are damaged (number, generation, sequence): {names}{more}")


def check_range(start: int, count: int) -> None:
    """Raises OutOfRange unless [start, start + count) are blocks that a segment can have."""
    if start < 0 or count < 1 or start + count > MAX_BLOCKS:
        raise OutOfRange(
            f"{count} blocks from {start}: a segment has the blocks 0 to {MAX_BLOCKS - 1}, and one is read at least"
        )


class Found(NamedTuple):
    """A block's content as the tables have it. block is None for a zero entry."""

    number: int
    generation: Generation
    sequence: Sequence
    block: bytes | None


class TableReader:
    """Reads within one transaction; collects what is damaged, and the gaps: [start, end) that show no version.

    old: a generation; the blocks that show a version of it, or of one before, are collected as well.
    """

    def __init__(self, tables: Handles, transaction: Reading, old: int = -1) -> None:
        self._tables = tables
        self._transaction = transaction
        self._index = transaction.cursor(tables.index)
        self.damaged: list[BlockVersion] = []
        self.gaps: list[tuple[int, int]] = []
        self.old: set[int] = set()
        self._old_from = MAX_GENERATION - old

    def read(self, start: int, end: int, generation: int = MAX_GENERATION) -> list[bytes | memoryview]:
        """Content of the blocks [start, end), in pieces: ZERO_BLOCK or parts of blocks, which add up."""
        if end - start >= _RUN:
            layer = self._read_layer(start, end, generation)
            if layer is not None:
                return [layer]
            run = self._read_run(start, end, generation)
            if run is not None:
                return run
        pieces: list[bytes | memoryview] = []
        at = start
        for found in self.versions(start, end, generation):
            pieces += [ZERO_BLOCK] * (found.number - at)
            pieces.append(found.block if found.block is not None else ZERO_BLOCK)
            at = found.number + 1
        return pieces + [ZERO_BLOCK] * (end - at)

    def versions(self, start: int, end: int, generation: int = MAX_GENERATION) -> list[Found]:
        """The version that shows in `generation` of each block of [start, end) that has one, in order."""
        found: list[Found] = []
        cursor, at = self._index, start
        here = cursor.set_range(version_key(start, generation))
        while here:
            number, inverted = VERSION_KEY.unpack(cursor.key())
            if number >= end:
                break
            if inverted < MAX_GENERATION - generation:
                here = cursor.set_range(version_key(number, generation))
                continue
            if number > at:
                self._check_absent(at, number)
            if inverted >= self._old_from:
                self.old.add(number)
            version = self._load(number, Generation(MAX_GENERATION - inverted), cursor.value())
            if version is not None:
                found.append(version)
            at = number + 1
            here = cursor.next()
            if here and number == int.from_bytes(cursor.key()[:NUMBER_SIZE], "big"):
                here = cursor.set_range(version_key(at, generation))
        if at < end:
            self._check_absent(at, end)
        return found

    def load(self, number: int, generation: Generation) -> Found | None:
        """Exactly that version; None where there is none or it is damaged."""
        value = self._transaction.get(version_key(number, generation), db=self._tables.index)
        return None if value is None else self._load(number, generation, value)

    def raise_damage(self) -> None:
        if self.damaged:
            raise CorruptBlocks(self.damaged)

    def _load(self, number: int, generation: Generation, value: memoryview) -> Found | None:
        version = parse_index_value(number, generation, value)
        if version is None:
            self.damaged.append(BlockVersion(BlockNumber(number), generation, raw_sequence(value)))
            return None
        if version.tail is None:
            return Found(number, generation, version.sequence, None)
        head = self._transaction.get(version_key(number, generation), b"", db=self._tables.data)
        block = b"".join((head, version.tail))
        if len(block) != BLOCK_SIZE or version.checksum != block_checksum(block, number, generation, version.sequence):
            self.damaged.append(BlockVersion(BlockNumber(number), generation, version.sequence))
            return None
        return Found(number, generation, version.sequence, block)

    def _read_layer(self, start: int, end: int, generation: int) -> bytes | None:
        """Blocks that all show the generation that the first one shows; None where they do not, or are damaged.

        No key is looked at but the first two and the last one: a block's checksum is seeded with number and generation,
        so rows that are not the ones in question fail it. A key between that is damaged, and still in its place, is for
        scrub to find: the block is what it should be.
        """
        cursor, count = self._index, end - start
        if not cursor.set_range(version_key(start, generation)) or len(cursor.key()) != VERSION_KEY.size:
            return None
        first, inverted = VERSION_KEY.unpack(cursor.key())
        if first != start or inverted >= self._old_from:
            return None
        found = Generation(MAX_GENERATION - inverted)
        head = cursor.value()
        if not cursor.next() or cursor.key() != version_key(start + 1, found):
            return None  # before the walk: where a block has several versions, it would mostly be for nothing
        values = [head, *islice(cursor.iternext(keys=False), count - 1)]
        joined = b"".join(values)
        if len(joined) != count * DATA_VALUE.size or cursor.key() != version_key(end - 1, found):
            return None
        sequences, checksums, flags, tails = _columns(DATA_VALUE.iter_unpack(joined), 4)
        data = self._transaction.cursor(self._tables.data)
        heads = data.iternext(keys=False) if data.set_range(version_key(start, found)) else ()
        content = b"".join(chain.from_iterable(zip(islice(heads, count), tails, strict=False)))
        if len(content) != count * BLOCK_SIZE or flags.count(DATA_FLAG) != count:
            return None
        return content if _checksums_of(content, start, found, sequences) == checksums else None

    def _read_run(self, start: int, end: int, generation: int) -> list[bytes | memoryview] | None:
        """As read; None where anything is damaged, which `versions` then tells one by one."""
        rows, alone = self._newest_rows(start, end, generation)
        data = [row for row in rows if len(row[1]) == DATA_VALUE.size]
        if len(data) < len(rows) and not _are_zeroes(row for row in rows if len(row[1]) != DATA_VALUE.size):
            return None
        values = b"".join([value for _, value in data])
        numbers, inverted = _columns(VERSION_KEY.iter_unpack(b"".join([key for key, _ in data])), 2)
        sequences, checksums, flags, tails = _columns(DATA_VALUE.iter_unpack(values), 4)
        # A head that is missing or in the wrong place makes checksums fail, so its key need not be looked at.
        heads = self._heads([key for key, _ in data], alone=alone)
        content = b"".join([half for pair in zip(heads, tails, strict=False) for half in pair])
        if len(content) != len(data) * BLOCK_SIZE or any(flag != DATA_FLAG for flag in flags):
            return None
        versions = zip(numbers, [MAX_GENERATION - value for value in inverted], sequences, strict=True)
        if block_checksums(memoryview(content), versions) != checksums:
            return None
        if len(data) == end - start:
            return [content]
        return self._with_zeroes(start, end, numbers, content, {VERSION_KEY.unpack(key)[0] for key, _ in rows})

    def _newest_rows(self, start: int, end: int, generation: int) -> tuple[list[Row], bool]:
        """The index rows that show, one a block; and whether there are no others between them.

        Where the blocks have few versions each, all rows are walked; where they have many, a seek
        for each block passes over the others.
        """
        walked, ended = self._walk(start, end, generation)
        keys = b"".join([key for key, _ in walked])
        if len(keys) != len(walked) * VERSION_KEY.size:
            raise Corrupt("index has a key of a wrong size")
        rows: list[Row] = []
        last, newest = -1, MAX_GENERATION - generation
        for seen, (number, inverted) in enumerate(VERSION_KEY.iter_unpack(keys)):
            if number >= end:
                return rows, seen == len(rows)
            if number != last and inverted >= newest:
                rows.append(walked[seen])
                last = number
                if inverted >= self._old_from:
                    self.old.add(number)
        if ended:
            return rows, len(walked) == len(rows)
        return self._seek_rows(rows, last + 1, end, generation), False

    def _walk(self, start: int, end: int, generation: int) -> tuple[list[Row], bool]:
        """The index rows from a block on: past `end`, or to the table's end (then True), or as many as is sensible."""
        if not self._index.set_range(version_key(start, generation)):
            return [], True
        rows = self._index.iternext()
        count = end - start + 1
        walked = list(islice(rows, count))
        if len(walked) == count and bytes(walked[-1][0]) < number_key(end):
            count *= _WALKED_VERSIONS
            walked += islice(rows, count - len(walked))
        return walked, len(walked) < count

    def _seek_rows(self, rows: list[Row], at: int, end: int, generation: int) -> list[Row]:
        """`rows`, and those from block `at` on that show."""
        cursor = self._index
        here = cursor.set_range(version_key(at, generation))
        while here:
            row = cursor.item()
            number, inverted = VERSION_KEY.unpack(row[0])
            if number >= end:
                break
            if inverted < MAX_GENERATION - generation:
                here = cursor.set_range(version_key(number, generation))
                continue
            rows.append(row)
            if inverted >= self._old_from:
                self.old.add(number)
            here = cursor.set_range(version_key(number + 1, generation))
        return rows

    def _heads(self, keys: list[memoryview], *, alone: bool) -> Iterable[memoryview]:
        """The rows of `data` with these keys; one after the other where no others lie between."""
        cursor = self._transaction.cursor(self._tables.data)
        if not alone:
            return [head for _, head in cursor.getmulti(keys)]
        return islice(cursor.iternext(keys=False), len(keys)) if keys and cursor.set_range(keys[0]) else ()

    def _with_zeroes(
        self, start: int, end: int, numbers: tuple[int, ...], content: bytes, known: set[int]
    ) -> list[bytes | memoryview]:
        """The blocks `numbers`, whose content is given, and zeroes between them; known: blocks with a version."""
        view = memoryview(content)
        blocks = {number: view[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] for i, number in enumerate(numbers)}
        for first, last in _runs(number for number in range(start, end) if number not in known):
            self._check_absent(first, last)
        return [blocks.get(number, ZERO_BLOCK) for number in range(start, end)]

    def _check_absent(self, start: int, end: int) -> None:
        """Blocks that show no version must have no entry, or only newer ones."""
        self.gaps.append((start, end))
        for extent in range(start // EXTENT_BLOCKS, (end - 1) // EXTENT_BLOCKS + 1):
            key = number_key(extent)
            value = self._transaction.get(key, db=self._tables.present)
            bits = decode_bits(key, value) if value is not None else 0
            if bits:
                first = max(start, extent * EXTENT_BLOCKS)
                for number in range(first, min(end, (extent + 1) * EXTENT_BLOCKS)):
                    if bits >> number % EXTENT_BLOCKS & 1 and not self._has_entry(number):
                        self.damaged.append(BlockVersion(BlockNumber(number), None, None))

    def _has_entry(self, number: int) -> bool:
        cursor = self._transaction.cursor(self._tables.index)
        return cursor.set_range(number_key(number)) and cursor.key()[:NUMBER_SIZE] == number_key(number)


def _checksums_of(content: bytes, start: int, generation: Generation, sequences: tuple[int, ...]) -> tuple[int, ...]:
    """Of consecutive blocks of one generation."""
    view = memoryview(content)
    if sequences.count(sequences[0]) == len(sequences):
        return run_checksums(view, start, generation, sequences[0])
    numbers = range(start, start + len(sequences))
    return block_checksums(view, zip(numbers, repeat(generation), sequences, strict=False))


def _are_zeroes(rows: Iterable[Row]) -> bool:
    return all(parse_index_value(*parse_version_key(key), value) is not None for key, value in rows)


def _columns(rows: Iterable[tuple[Any, ...]], count: int) -> tuple[tuple[Any, ...], ...]:
    """`count` columns out of rows of that many, also where there are no rows."""
    return tuple(zip(*rows, strict=True)) or ((),) * count


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges without gaps."""
    first = last = -1
    for number in numbers:
        if number != last:
            if first >= 0:
                yield first, last
            first = number
        last = number + 1
    if first >= 0:
        yield first, last
