"""A replica's tables as a dumb model: what blockstore/storage/replica_store.py keeps in LMDB.

Blocks carry a number instead of 4 KiB; 0 is a zero entry. Extents have four blocks, so that a small
volume has several. Applying, copying, generations and tombstones follow docs/replication.md, rule 6.
A transaction happens at one instant: a crash is before or after it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from blockstore.domain import Position
from blockstore.log import LogImage
from blockstore.record import Operation, OperationKind, Record
from blockstore.units import BLOCK_SIZE, Sequence

EXTENT_BLOCKS: Final = 4

Version = tuple[int, int]
"""Sequence and value."""


def values_of(operation: Operation) -> list[int]:
    """The number in each block of a WRITE."""
    data = operation.data
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, operation.count * BLOCK_SIZE, BLOCK_SIZE)]


def block_of(value: int) -> bytes:
    return value.to_bytes(8, "little") + bytes(BLOCK_SIZE - 8)


@dataclass(frozen=True, slots=True)
class ExtentCopy:
    """One extent as a peer had it: its versions by (block, generation), its rows by generation."""

    extent: int
    versions: dict[tuple[int, int], Version]
    rows: dict[int, int]


@dataclass(slots=True)
class Tables:
    """What is on disk: versions, rows of extents, sealed generations, the image and its journal mark."""

    image: LogImage
    mark: int = 0
    versions: dict[tuple[int, int], Version] = field(default_factory=dict)
    rows: dict[tuple[int, int], int] = field(default_factory=dict)
    sealed: dict[int, int] = field(default_factory=dict)
    """The sequence of the record that sealed a generation."""
    lost: set[int] = field(default_factory=set)
    """Blocks that have lost their entries: `present` tells, until their extent is copied."""

    def checkpoint(self, image: LogImage, mark: int, records: Iterable[Record]) -> None:
        """One transaction: the records up to image.applied, and the image."""
        for record in records:
            self._apply(record, image.filling is not None)
        self.image, self.mark = image, mark

    def write_copy(
        self, sealed: dict[int, int] | None, extents: Iterable[ExtentCopy], stated: Position, image: LogImage
    ) -> None:
        """One transaction: a peer's content as of `stated`, under what is newer here; absence included."""
        if sealed is not None:
            newer = {generation: at for generation, at in self.sealed.items() if at > stated.sequence}
            self.sealed = {**sealed, **newer}
        for copy in extents:
            self._write_extent(copy, stated.sequence)
        self.image = replace(image, copied=max(image.copied, stated))

    def extents_held(self) -> set[int]:
        """Where there is anything."""
        return {block // EXTENT_BLOCKS for block in (*self.lost, *(block for block, _ in self.versions))}

    def delta_extents(self, since: Sequence) -> list[int]:
        """The extents whose highest sequence is above `since`, in any generation."""
        return sorted({extent for (_, extent), highest in self.rows.items() if highest > since})

    def copy_extent(self, extent: int) -> ExtentCopy:
        blocks = range(extent * EXTENT_BLOCKS, (extent + 1) * EXTENT_BLOCKS)
        versions = {key: version for key, version in self.versions.items() if key[0] in blocks}
        rows = {generation: highest for (generation, at), highest in self.rows.items() if at == extent}
        return ExtentCopy(extent, versions, rows)

    def show(self, block: int, generation: int | None) -> int:
        """The block's value as of a generation; None: the newest."""
        layers = [g for b, g in self.versions if b == block and (generation is None or g <= generation)]
        return self.versions[block, max(layers)][1] if layers else 0

    def copy(self) -> "Tables":
        return Tables(self.image, self.mark, dict(self.versions), dict(self.rows), dict(self.sealed), set(self.lost))

    def _apply(self, record: Record, filling: bool) -> None:
        for operation in record.operations:
            if operation.kind is OperationKind.SEAL:
                self.sealed[record.generation] = record.sequence
            elif operation.on_blocks:
                self._apply_blocks(record, operation, filling)

    def _apply_blocks(self, record: Record, operation: Operation, filling: bool) -> None:
        generation, sequence = int(record.generation), int(record.sequence)
        values = values_of(operation) if operation.kind is OperationKind.WRITE else [0] * operation.count
        for block, value in zip(range(operation.start, operation.end), values, strict=True):
            if operation.kind is OperationKind.WRITE:
                self.versions[block, generation] = (sequence, value)
            elif not self._zero(block, generation, sequence, filling):
                continue
            row = generation, block // EXTENT_BLOCKS
            self.rows[row] = max(self.rows.get(row, 0), sequence)

    def _zero(self, block: int, generation: int, sequence: int, filling: bool) -> bool:
        """Whether the extent's row rises: not where the block has no entry."""
        layers = [g for b, g in self.versions if b == block]
        if filling or any(layer < generation for layer in layers):
            self.versions[block, generation] = (sequence, 0)
        else:
            self.versions.pop((block, generation), None)
        return filling or bool(layers) or block in self.lost

    def lose(self, block: int) -> None:
        """Its entries are gone, as after a flipped bit in a page of the tables."""
        for key in [key for key in self.versions if key[0] == block]:
            del self.versions[key]
        self.lost.add(block)

    def has_lost(self, start: int, count: int) -> bool:
        return not self.lost.isdisjoint(range(start, start + count))

    def _write_extent(self, copy: ExtentCopy, stated: int) -> None:
        blocks = range(copy.extent * EXTENT_BLOCKS, (copy.extent + 1) * EXTENT_BLOCKS)
        for key in [key for key in self.versions if key[0] in blocks]:
            if self.stays(self.versions[key], stated):
                continue
            del self.versions[key]
        self.lost -= set(blocks)
        for key, version in copy.versions.items():
            if key not in self.versions:
                self.versions[key] = version
        for generation, highest in copy.rows.items():
            row = generation, copy.extent
            self.rows[row] = max(self.rows.get(row, 0), highest)

    @staticmethod
    def stays(local: Version, stated: int) -> bool:
        """Whether a local version is newer than what was copied."""
        return local[0] > stated


class Store:
    """The tables and the memtable over them: committed records that no checkpoint has applied."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.memtable: list[Record] = []
        self._overlay: dict[int, int] = {}

    def commit(self, records: Iterable[Record]) -> None:
        for record in records:
            self.memtable.append(record)
            self._lay_over(record)

    def checkpoint(self, image: LogImage, mark: int) -> None:
        due = [record for record in self.memtable if record.sequence <= image.applied.sequence]
        self.tables.checkpoint(image, mark, due)
        self.memtable = self.memtable[len(due) :]
        self._overlay.clear()
        for record in self.memtable:
            self._lay_over(record)

    def reset(self) -> None:
        """Forget committed records that no checkpoint has applied."""
        self.memtable.clear()
        self._overlay.clear()

    def read(self, start: int, count: int) -> list[int]:
        """The newest content."""
        overlay, tables = self._overlay, self.tables
        return [overlay[b] if b in overlay else tables.show(b, None) for b in range(start, start + count)]

    def _lay_over(self, record: Record) -> None:
        for operation in record.operations:
            if operation.kind is OperationKind.WRITE:
                self._overlay.update(zip(range(operation.start, operation.end), values_of(operation), strict=True))
            elif operation.on_blocks:
                self._overlay.update(dict.fromkeys(range(operation.start, operation.end), 0))
