"""Single versions of blocks that peers give each other: a good one in the place of one that is damaged.

The peer's block passed the checksum that the peer keeps. Here, what is left of the entry must agree:
its sequence, and either its checksum or its stored bytes. So one flipped bit anywhere in the entry or
in the block is mended, and a block that belongs to something else is never written.
"""

from blockstore.errors import InvalidRequest
from blockstore.record import block_checksum
from blockstore.storage.keys import (
    HEAD_SIZE,
    INDEX_VALUE,
    TAIL_SIZE,
    data_value,
    raw_checksum,
    raw_sequence,
    version_key,
    zero_value,
)
from blockstore.storage.reads import ZERO_BLOCK, BlockVersion, TableReader
from blockstore.storage.tables import Tables, Writing
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, BlockNumber, Generation, Sequence


class Repairs:
    """Of one replica; blocking. mended: the extents of what was mended, for a compaction, which empties it."""

    def __init__(self, tables: Tables) -> None:
        self.mended: set[int] = set()
        self._tables = tables

    def version(self, number: int, generation: Generation, sequence: Sequence) -> bytes | None:
        """A good copy of exactly that version, for a peer whose own is damaged; None without one."""
        with self._tables.reading() as transaction:
            found = TableReader(self._tables, transaction).load(number, generation)
            if found is None or found.sequence != sequence:
                return None
            return found.block or ZERO_BLOCK

    def mend(self, number: int, generation: Generation, sequence: Sequence, block: bytes) -> bool:
        """Put a peer's copy of a damaged version in its place; False where it is not damaged (any more).

        Only over an entry with that very number, generation and sequence, and only a block that the
        entry's checksum or its stored bytes agree with.
        """
        if len(block) != BLOCK_SIZE:
            raise InvalidRequest(f"a block of {len(block)} bytes, expected {BLOCK_SIZE}")

        def write(transaction: Writing) -> bool:
            mended = _mend(self._tables, transaction, BlockVersion(BlockNumber(number), generation, sequence), block)
            if mended:
                self.mended.add(number // EXTENT_BLOCKS)
            return mended

        if self.version(number, generation, sequence) is not None:
            return False
        return self._tables.change(write)


def _mend(tables: Tables, transaction: Writing, version: BlockVersion, block: bytes) -> bool:
    """Whether `block` stands in the tables now as the content of `version`."""
    number, generation, sequence = version
    if generation is None or sequence is None:
        return False
    key = version_key(number, generation)
    stored = transaction.get(key, db=tables.index)
    if stored is None or raw_sequence(stored) != sequence:
        return False
    if _is_the_zero(stored, version, block):
        transaction.put(key, zero_value(number, generation, sequence), db=tables.index)
        return True
    checksum = block_checksum(block, number, generation, sequence)
    head = transaction.get(key, b"", db=tables.data)
    if raw_checksum(stored) != checksum and head + stored[-TAIL_SIZE:] != block:
        return False
    transaction.put(key, data_value(sequence, checksum, block), db=tables.index)
    transaction.put(key, block[:HEAD_SIZE], db=tables.data)
    return True


def _is_the_zero(stored: bytes, version: BlockVersion, block: bytes) -> bool:
    """Whether the entry was a zero entry, which has no stored bytes to compare with."""
    number, generation, sequence = version
    assert generation is not None
    assert sequence is not None
    wanted = zero_value(number, generation, sequence)
    agrees = raw_checksum(stored) == raw_checksum(wanted) or stored[-1:] == wanted[-1:]
    return len(stored) == INDEX_VALUE.size and block == ZERO_BLOCK and agrees
