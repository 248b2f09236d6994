"""What sealed generations show, and which blocks changed in them: for snapshots.

All of it is of the applied, committed state: what is committed and not in the tables yet counts for nothing here.
"""

from collections.abc import Sequence as Seq

from blockstore.storage.changes import ChangedExtent, changed_extents, hidden_changes
from blockstore.storage.copies import MetaCopy
from blockstore.storage.delta import read_meta
from blockstore.storage.meta import Meta
from blockstore.storage.reads import TableReader, check_range
from blockstore.storage.tables import Tables
from blockstore.units import MAX_GENERATION, Generation


class SealedReader:
    """Of one replica; each call is one transaction, and blocking."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def read(self, generation: Generation, start: int, count: int) -> bytes:
        """As read_ranges, of one range."""
        return self.read_ranges(generation, [(start, count)])

    def read_ranges(self, generation: Generation, ranges: Seq[tuple[int, int]]) -> bytes:
        """What a sealed generation shows of these (start, count), out of the applied state: one seek a block.

        Zeroes for what has no entry. Raises NotFound where it was not sealed (the seal may not be applied yet)
        or was merged away, QuorumUnavailable while filling, OutOfRange, CorruptBlocks.
        """
        for start, count in ranges:
            check_range(start, count)
        with self._tables.reading() as transaction:
            meta = Meta(self._tables, transaction)
            meta.check_whole()
            meta.check_readable(generation)
            before = meta.pinned_below(generation)
            reader = TableReader(self._tables, transaction, before)
            pieces = [piece for start, count in ranges for piece in reader.read(start, start + count, generation)]
            content = b"".join(pieces)
            if reader.old:
                newer = meta.sealed_between(before, generation)
                reader.damaged += hidden_changes(self._tables, transaction, newer, reader.old)
            reader.raise_damage()
            return content

    def describe(self) -> MetaCopy:
        """Generations, pins and source as of the applied position. Raises QuorumUnavailable while filling, Corrupt."""
        with self._tables.reading() as transaction:
            Meta(self._tables, transaction).check_whole()
            return read_meta(self._tables, transaction)

    def changes(self, lowest: int, highest: int, first: int, limit: int) -> list[ChangedExtent]:
        """The first `limit` extents from `first` on with the bits of what changed in the generations lowest..highest.

        highest: a sealed generation, or MAX_GENERATION for all that there is, the current one included. Never less
        than what changed, but more where generations were merged. One transaction; blocking. Raises NotFound where
        `highest` is not readable, QuorumUnavailable while filling, Corrupt.
        """
        with self._tables.reading() as transaction:
            meta = Meta(self._tables, transaction)
            meta.check_whole()
            if highest != MAX_GENERATION:
                meta.check_readable(highest)
            return changed_extents(self._tables, transaction, range(lowest, highest + 1), first, limit)
