"""Reads blocks out of the tables: the newest version at or below a generation, verified.

One seek finds a version, however long the chain of generations is. A run of blocks that have one
version each is read by walking `index` and `data` side by side; the first sign of anything else falls
back to a seek a block. Every byte that leaves here has passed the checksum of its version: what
fails, and a block that is absent though `present` says it has an entry, is reported with all others
of the call as CorruptBlocks, so that the caller can fetch those very versions from a peer.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Final, NamedTuple

from blockstore.errors import Corrupt
from blockstore.record import block_checksum, block_checksums
from blockstore.storage.keys import (
    DATA_FLAG,
    DATA_VALUE,
    MAX_GENERATION,
    NUMBER_SIZE,
    VERSION_KEY,
    decode_bits,
    number_key,
    parse_index_value,
    raw_sequence,
    version_key,
)
from blockstore.storage.tables import Reading, Tables
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, BlockNumber, Generation, Sequence

ZERO_BLOCK: Final = bytes(BLOCK_SIZE)
#: Below this a seek a block is as fast as setting up two walks.
_RUN: Final = 4


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


class Found(NamedTuple):
    """A block's content as the tables have it. block is None for a zero entry."""

    number: int
    generation: Generation
    sequence: Sequence
    block: bytes | None


class TableReader:
    """Reads within one transaction; collects what is damaged."""

    def __init__(self, tables: Tables, transaction: Reading) -> None:
        self._tables = tables
        self._transaction = transaction
        self._index = transaction.cursor(tables.index)
        self.damaged: list[BlockVersion] = []

    def read(self, start: int, end: int, generation: int = MAX_GENERATION) -> list[bytes]:
        """Content of the blocks [start, end), in pieces: ZERO_BLOCK or parts of blocks, which add up."""
        if end - start >= _RUN:
            run = self._read_run(start, end, generation)
            if run is not None:
                return run
        pieces, at = [], start
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

    def _read_run(self, start: int, end: int, generation: int) -> list[bytes] | None:
        """All of [start, end) in one piece where each block has one version, a good one, with data."""
        if not self._index.set_range(version_key(start, generation)):
            return None
        rows = list(islice(self._index.iternext(), end - start))
        keys = b"".join([key for key, _ in rows])
        values = b"".join([value for _, value in rows])
        if len(keys) != (end - start) * VERSION_KEY.size or len(values) != (end - start) * DATA_VALUE.size:
            return None
        numbers, inverted = zip(*VERSION_KEY.iter_unpack(keys), strict=True)
        sequences, checksums, flags, tails = zip(*DATA_VALUE.iter_unpack(values), strict=True)
        plain = numbers == tuple(range(start, end)) and min(inverted) >= MAX_GENERATION - generation
        heads = self._transaction.cursor(self._tables.data)
        if not plain or set(flags) != {DATA_FLAG} or not heads.set_range(rows[0][0]):
            return None
        # A head that is missing or in the wrong place makes checksums fail, so its key need not be looked at.
        halves = zip(heads.iternext(keys=False), tails, strict=False)
        content = b"".join([half for pair in halves for half in pair])
        if len(content) != (end - start) * BLOCK_SIZE:
            return None
        versions = zip(numbers, [MAX_GENERATION - value for value in inverted], sequences, strict=True)
        return [content] if block_checksums(memoryview(content), versions) == list(checksums) else None

    def _check_absent(self, start: int, end: int) -> None:
        """Blocks that show no version must have no entry, or only newer ones."""
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
