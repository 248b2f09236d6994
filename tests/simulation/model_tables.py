"""A replica's tables as a dumb model: what blockstore/storage/replica_store.py keeps in LMDB.

Blocks carry a number instead of 4 KiB; 0 is a zero entry. Extents have four blocks, so that a small
volume has several. Applying, copying, generations and tombstones follow docs/replication.md, rule 6;
fills, pins and merging docs/storage.md. A transaction happens at one instant: a crash is before or after it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from blockstore.domain import Position
from blockstore.log import LogImage
from blockstore.record import Operation, OperationKind, Record
from blockstore.units import BLOCK_SIZE, FILL_GENERATION, Sequence

EXTENT_BLOCKS: Final = 4

Version = tuple[int, int]
"""Sequence and value."""
Pin = tuple[int, bytes]
"""Generation and holder."""
_WITH_VALUES: Final = frozenset({OperationKind.WRITE, OperationKind.FILL})


def values_of(operation: Operation) -> list[int]:
    """The number in each block of a WRITE or FILL; 0 for what zeroes."""
    if operation.kind not in _WITH_VALUES:
        return [0] * operation.count
    data = operation.data
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, operation.count * BLOCK_SIZE, BLOCK_SIZE)]


def block_of(value: int, ticket: int = 0) -> bytes:
    """ticket: of a FILL, whose value is the source's."""
    return value.to_bytes(8, "little") + ticket.to_bytes(8, "little") + bytes(BLOCK_SIZE - 16)


def ticket_in(data: bytes | memoryview) -> int:
    return int.from_bytes(data[8:16], "little")


@dataclass(frozen=True, slots=True)
class ExtentCopy:
    """One extent as a peer had it: its versions by (block, generation), its rows by generation."""

    extent: int
    versions: dict[tuple[int, int], Version]
    rows: dict[int, int]


@dataclass(frozen=True, slots=True)
class MetaCopy:
    """What a peer knew of generations: sealed ones, pins with the records that set them, whether there is a source."""

    sealed: dict[int, int]
    pins: dict[Pin, int]
    source: bool


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
    pins: dict[Pin, int] = field(default_factory=dict)
    source: bool = False
    unpinned: dict[Pin, int] = field(default_factory=dict)
    """While filling: what was taken away here, with the record that did."""
    hydrated: bool = False
    """While filling: the source was ended here."""

    def checkpoint(self, image: LogImage, mark: int, records: Iterable[Record]) -> None:
        """One transaction: the records up to image.applied, and the image."""
        for record in records:
            self._apply(record, image.filling is not None)
        self.image, self.mark = image, mark
        if image.filling is None:
            self.unpinned, self.hydrated = {}, False

    def write_copy(
        self, meta: MetaCopy | None, extents: Iterable[ExtentCopy], stated: Position, image: LogImage
    ) -> None:
        """One transaction: a peer's content as of `stated`, under what is newer here; absence included."""
        if meta is not None:
            self._write_meta(meta, stated.sequence)
        for copy in extents:
            self._write_extent(copy, stated.sequence)
        self.image = replace(image, copied=max(image.copied, stated))

    def extents_held(self) -> set[int]:
        """Where there is anything."""
        return {block // EXTENT_BLOCKS for block in (*self.lost, *(block for block, _ in self.versions))}

    def delta_extents(self, since: Sequence) -> list[int]:
        """The extents whose highest sequence is above `since`, in any generation."""
        return sorted({extent for (_, extent), highest in self.rows.items() if highest > since})

    def copy_meta(self) -> MetaCopy:
        return MetaCopy(dict(self.sealed), dict(self.pins), self.source)

    def copy_extent(self, extent: int) -> ExtentCopy:
        blocks = range(extent * EXTENT_BLOCKS, (extent + 1) * EXTENT_BLOCKS)
        versions = {key: version for key, version in self.versions.items() if key[0] in blocks}
        rows = {generation: highest for (generation, at), highest in self.rows.items() if at == extent}
        return ExtentCopy(extent, versions, rows)

    def show(self, block: int, generation: int | None) -> int | None:
        """The block's value as of a generation, None: the newest; None where it has no entry."""
        layers = [g for b, g in self.versions if b == block and (generation is None or g <= generation)]
        return self.versions[block, max(layers)][1] if layers else None

    def copy(self) -> "Tables":
        return Tables(
            self.image, self.mark, dict(self.versions), dict(self.rows), dict(self.sealed), set(self.lost),
            dict(self.pins), self.source, dict(self.unpinned), self.hydrated,
        )  # fmt: skip

    def merge(self) -> bool:
        """Delete what no pinned generation and not the current one shows; whether any generation went."""
        pinned = {generation for generation, _ in self.pins}
        going = [generation for generation in self.sealed if generation not in pinned]
        if self.image.filling is not None or not going:
            return False
        visible = [*sorted(pinned), int(self.image.generation)]
        for block in {block for block, _ in self.versions}:
            layers = sorted(g for b, g in self.versions if b == block)
            shown = sorted({max((g for g in layers if g <= limit), default=-1) for limit in visible} - {-1})
            while shown and self.versions[block, shown[0]][1] == 0 and not self.source:
                del shown[0]
            for generation in set(layers) - set(shown):
                del self.versions[block, generation]
        for generation in going:
            self._fold(generation, next(other for other in visible if other > generation))
            del self.sealed[generation]
        return True

    def _fold(self, generation: int, heir: int) -> None:
        for row in [row for row in self.rows if row[0] == generation]:
            highest = self.rows.pop(row)
            self.rows[heir, row[1]] = max(highest, self.rows.get((heir, row[1]), 0))

    def _write_meta(self, meta: MetaCopy, stated: int) -> None:
        self.sealed = {**meta.sealed, **{generation: at for generation, at in self.sealed.items() if at > stated}}
        arriving = {pin: at for pin, at in meta.pins.items() if self.unpinned.get(pin, 0) <= stated}
        self.pins = {**arriving, **{pin: at for pin, at in self.pins.items() if at > stated}}
        self.source = meta.source and not self.hydrated

    def _apply(self, record: Record, filling: bool) -> None:
        for operation in record.operations:
            pin = int(operation.start), operation.argument
            match operation.kind:
                case OperationKind.SEAL:
                    self.sealed[record.generation] = record.sequence
                    self.pins[int(record.generation), operation.argument] = record.sequence
                case OperationKind.PIN:
                    self.pins[pin] = record.sequence
                case OperationKind.UNPIN:
                    self.pins.pop(pin, None)
                    if filling:
                        self.unpinned[pin] = record.sequence
                case OperationKind.HYDRATED:
                    self.source, self.hydrated = False, filling
                case _ if operation.on_blocks:
                    self._apply_blocks(record, operation, filling)

    def _apply_blocks(self, record: Record, operation: Operation, filling: bool) -> None:
        generation, sequence = int(record.generation_of(operation)), int(record.sequence)
        covers = self.covers(operation.kind, filling=filling, source=self.source)
        for block, value in zip(range(operation.start, operation.end), values_of(operation), strict=True):
            if operation.kind in _WITH_VALUES:
                self.versions[block, generation] = (sequence, value)
            elif not self._zero(block, generation, sequence, covers):
                continue
            row = generation, block // EXTENT_BLOCKS
            self.rows[row] = max(self.rows.get(row, 0), sequence)

    @staticmethod
    def covers(kind: OperationKind, *, filling: bool, source: bool) -> bool:
        """Whether absence would say something else than zeroes, or let a copy bring back what was there."""
        return filling or (source and kind is not OperationKind.DISCARD)

    def _zero(self, block: int, generation: int, sequence: int, covers: bool) -> bool:
        """Whether the extent's row rises: not where the block has no entry, and needs none.

        covers: absence would mean something else, or undo a copy.
        """
        layers = [g for b, g in self.versions if b == block]
        if covers or any(layer < generation for layer in layers):
            self.versions[block, generation] = (sequence, 0)
        else:
            self.versions.pop((block, generation), None)
        return covers or bool(layers) or block in self.lost

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
        self._fills: dict[int, int] = {}
        self._hydrated = False

    @property
    def has_source(self) -> bool:
        """Whether absent blocks are the source's, as of all that is committed."""
        return self.tables.source and not self._hydrated

    def commit(self, records: Iterable[Record]) -> None:
        for record in records:
            self.memtable.append(record)
            self._lay_over(record)

    def checkpoint(self, image: LogImage, mark: int) -> None:
        due = [record for record in self.memtable if record.sequence <= image.applied.sequence]
        self.tables.checkpoint(image, mark, due)
        self._keep(self.memtable[len(due) :])

    def reset(self) -> None:
        """Forget committed records that no checkpoint has applied."""
        self._keep([])

    def read(self, start: int, count: int) -> list[int | None]:
        """The newest content; None for a block without an entry."""
        return [self._read(block) for block in range(start, start + count)]

    def _read(self, block: int) -> int | None:
        if block in self._overlay:
            return self._overlay[block]
        guest = any(b == block and g > FILL_GENERATION for b, g in self.tables.versions)
        return self._fills[block] if block in self._fills and not guest else self.tables.show(block, None)

    def _keep(self, records: list[Record]) -> None:
        self.memtable = records
        self._overlay, self._fills, self._hydrated = {}, {}, False
        for record in records:
            self._lay_over(record)

    def _lay_over(self, record: Record) -> None:
        for operation in record.operations:
            if operation.kind is OperationKind.HYDRATED:
                self._hydrated = True
            elif operation.on_blocks:
                layer = self._fills if operation.kind is OperationKind.FILL else self._overlay
                layer.update(zip(range(operation.start, operation.end), values_of(operation), strict=True))
