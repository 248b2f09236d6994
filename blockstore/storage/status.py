"""What the blocks of a range are, as runs, without reading them: who shows an entry, of which layer, data or zeroes.

The tables say it by `index`, the newest entry of each block; `present` has to agree with it, so that a lost entry is
Corrupt here as it is in a read, and never a hole. Rows are walked some hundred at a time, and a page ends after a
number of them: its cost is that of the entries, not of the range. What is committed and not applied yet lies over
that, layer by layer.

Invariant: each block is told as it was at some moment of the call. Memory is looked at first, and the tables then: what
a checkpoint carries from one to the other meanwhile is seen twice, the other way round it would be seen in neither.
"""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from enum import IntEnum
from itertools import islice
from typing import Final, NamedTuple

from blockstore.errors import Corrupt
from blockstore.storage.changes import changed_extents
from blockstore.storage.keys import (
    DATA_VALUE,
    NUMBER_KEY,
    VERSION_KEY,
    bits_between,
    blocks_of,
    decode_bits,
    number_key,
    parse_index_value,
    raw_sequence,
    version_key,
)
from blockstore.storage.memtable import Entry, Layer, Memtable
from blockstore.storage.meta import Meta
from blockstore.storage.reads import BlockVersion, CorruptBlocks
from blockstore.storage.tables import ReadCursor, Reading, Tables
from blockstore.storage.unapplied import Unapplied
from blockstore.units import (
    EXTENT_BLOCKS,
    FILL_GENERATION,
    MAX_GENERATION,
    BlockNumber,
    Generation,
)

#: Of one page: 256 MiB of data, some 30 ms.
PAGE_ENTRIES: Final = 65_536
#: Rows of `index` that are looked at as one.
_WALKED: Final = 512
#: Of one page of changes: 65,536 runs where every other block of them changed.
_CHANGED_EXTENTS: Final = 512


class Kind(IntEnum):
    """What a block is; part of the RPC."""

    ABSENT = 0
    """It has no entry: zeroes, or the source's content where there is a source."""
    DATA = 1
    ZERO = 2
    """It has an entry that says zeroes."""


class Run(NamedTuple):
    """Blocks [start, end). kind: a Kind; of changes, whether they changed. generation: of the entry that shows."""

    start: int
    end: int
    kind: int
    generation: int = 0


class Page(NamedTuple):
    """runs: that cover the range from its first block on, as far as the page goes, and at least one.

    pinned: the generations that somebody keeps, ascending. has_source: what is ABSENT is the source's.
    """

    runs: list[Run]
    pinned: list[Generation]
    has_source: bool


class StatusReader:
    """Of one replica. Its calls are blocking, and may run beside everything else."""

    def __init__(self, tables: Tables, unapplied: Unapplied) -> None:
        self._tables = tables
        self._unapplied = unapplied

    def _memory(self, start: int, end: int, above: int) -> tuple[list["_LayerRuns"], bool]:
        """What is committed and not applied, of generations above that; and whether there is a source."""
        with self._unapplied.lock:
            return _layers(self._unapplied.memtables, start, end, above), self._unapplied.has_source

    def shown(self, start: int, end: int, limit: int = PAGE_ENTRIES) -> Page:
        """What each of the blocks [start, end) shows; limit: of entries. Raises QuorumUnavailable, Corrupt."""
        layers, has_source = self._memory(start, end, above=-1)
        with self._tables.reading() as transaction:
            meta = Meta(self._tables, transaction)
            meta.check_whole()
            runs = _shown_in_tables(self._tables, transaction, start, end, limit)
            pinned = sorted(meta.pinned())
        for layer in layers:
            rule = _below if layer.generation == FILL_GENERATION else _above(has_source)
            runs = _lay(_lay(runs, layer.zeroes, rule), layer.written, rule)
        return Page(runs, pinned, has_source)

    def changed(self, since: int, start: int, end: int) -> Page:
        """Whether each of the blocks changed in a generation above `since`: never less, but more where generations
        were merged. Raises QuorumUnavailable, Corrupt.
        """
        layers, has_source = self._memory(start, end, above=since)
        with self._tables.reading() as transaction:
            meta = Meta(self._tables, transaction)
            meta.check_whole()
            runs = _changed_in_tables(self._tables, transaction, since, start, end)
        for layer in layers:
            for over in (layer.zeroes, layer.written):
                runs = _lay(runs, [Run(run.start, run.end, True) for run in over], lambda _, top: top)
        return Page(runs, [], has_source)


# ---- tables


def _shown_in_tables(tables: Tables, transaction: Reading, start: int, end: int, limit: int) -> list[Run]:
    """Runs that cover [start, end), or less after `limit` entries. Raises Corrupt."""
    cursor = transaction.cursor(tables.index)
    runs: list[Run] = []
    at = start
    while at < end and limit > 0:
        found, covered = _newest(cursor, at, end)
        _check_present(tables, transaction, at, covered, [run.start for run in found])
        for run in found:
            if at < run.start:
                _add(runs, Run(at, run.start, Kind.ABSENT))
            _add(runs, run)
            at = run.end
        if at < covered:
            _add(runs, Run(at, covered, Kind.ABSENT))
        at = covered
        limit -= len(found)
    return runs


def _changed_in_tables(tables: Tables, transaction: Reading, since: int, start: int, end: int) -> list[Run]:
    """Runs that cover [start, end), or less where much changed. Raises Corrupt."""
    generations = range(since + 1, MAX_GENERATION + 1)
    extents = changed_extents(tables, transaction, generations, start // EXTENT_BLOCKS, _CHANGED_EXTENTS)
    stop = min(end, (extents[-1][0] + 1) * EXTENT_BLOCKS) if len(extents) == _CHANGED_EXTENTS else end
    runs: list[Run] = []
    at = start
    for low, high in _changed_ranges(extents, start, stop):
        if at < low:
            _add(runs, Run(at, low, False))
        _add(runs, Run(low, high, True))
        at = high
    if at < stop:
        _add(runs, Run(at, stop, False))
    return runs


def _newest(cursor: ReadCursor, start: int, end: int) -> tuple[list[Run], int]:
    """The newest entry of each block, as runs of one, of some rows from `start` on; and where these end."""
    if not cursor.set_range(version_key(start, MAX_GENERATION)):
        return [], end
    rows = list(islice(cursor.iternext(), _WALKED))
    keys = b"".join([key for key, _ in rows])
    if len(keys) != len(rows) * VERSION_KEY.size:
        raise Corrupt("index has a key of a wrong size")
    found: list[Run] = []
    last = -1
    for (number, inverted), (_, value) in zip(VERSION_KEY.iter_unpack(keys), rows, strict=True):
        if number >= end:
            return found, end
        if number != last:
            last = number
            found.append(_entry(number, Generation(MAX_GENERATION - inverted), value))
    return found, last + 1 if len(rows) == _WALKED else end


def _entry(number: int, generation: Generation, value: memoryview) -> Run:
    """Raises CorruptBlocks. Data is not looked at: who reads it does that, and it is told as data."""
    if len(value) == DATA_VALUE.size:
        return Run(number, number + 1, Kind.DATA, generation)
    if parse_index_value(number, generation, value) is None:
        raise CorruptBlocks([BlockVersion(BlockNumber(number), generation, raw_sequence(value))])
    return Run(number, number + 1, Kind.ZERO, generation)


def _check_present(tables: Tables, transaction: Reading, start: int, end: int, numbers: list[int]) -> None:
    """Blocks without an entry must not be `present`. Raises CorruptBlocks."""
    if start >= end:
        return
    found: dict[int, int] = {}
    for number in numbers:
        extent = number // EXTENT_BLOCKS
        found[extent] = found.get(extent, 0) | 1 << number % EXTENT_BLOCKS
    cursor = transaction.cursor(tables.present)
    here = cursor.set_range(number_key(start // EXTENT_BLOCKS))
    while here:
        key, value = cursor.item()
        if len(key) != NUMBER_KEY.size:
            raise Corrupt("present has a key of a wrong size")
        extent = NUMBER_KEY.unpack(key)[0]
        if extent * EXTENT_BLOCKS >= end:
            return
        lost = decode_bits(key, value) & bits_between(start, end, extent) & ~found.get(extent, 0)
        if lost:
            raise CorruptBlocks(BlockVersion(BlockNumber(number), None, None) for number in blocks_of(extent, lost))
        here = cursor.next()


def _changed_ranges(extents: Iterable[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The changed blocks of [start, end), as ranges in order."""
    for extent, changed in extents:
        bits = changed & bits_between(start, end, extent)
        at = extent * EXTENT_BLOCKS
        while bits:
            skipped = (bits & -bits).bit_length() - 1
            bits >>= skipped
            count = (~bits & (bits + 1)).bit_length() - 1
            yield at + skipped, at + skipped + count
            at += skipped + count
            bits >>= count


# ---- memory


class _LayerRuns(NamedTuple):
    """What one layer says of a range: zeroes, and over them the blocks with an entry of their own."""

    generation: Generation
    zeroes: list[Run]
    written: list[Run]


def _layers(memtables: Seq[Memtable], start: int, end: int, above: int) -> list[_LayerRuns]:
    """Of the generations above that; a generation's older part first, and fills before all others."""
    items = [item for memtable in memtables for item in memtable.layers.items() if item[0] > above]
    items.sort(key=lambda item: item[0])
    return [_LayerRuns(generation, *_runs_of(layer, start, end, generation)) for generation, layer in items]


def _runs_of(layer: Layer, start: int, end: int, generation: Generation) -> tuple[list[Run], list[Run]]:
    zeroes = [Run(first, last, Kind.ZERO, generation) for first, last, _ in layer.zeroes.between(start, end)]
    pieces = [Run(first, last, Kind.DATA, generation) for first, last, _ in layer.runs.between(start, end)]
    for number in (number for number in layer.blocks if start <= number < end):
        pieces.append(Run(number, number + 1, _kind_of(layer.blocks[number]), generation))
    written: list[Run] = []
    for piece in sorted(pieces):
        _add(written, piece)
    return zeroes, written


def _kind_of(entry: Entry) -> Kind:
    return Kind.ZERO if entry.block is None else Kind.DATA


def _below(under: Run, top: Run) -> Run:
    """A fill shows only where the guest has nothing."""
    return top if under.kind == Kind.ABSENT else under


def _above(has_source: bool) -> Callable[[Run, Run], Run]:
    def above(under: Run, top: Run) -> Run:
        """Zeroes over nothing leave nothing, unless a source would show."""
        if top.kind == Kind.ZERO and under.kind == Kind.ABSENT and not has_source:
            return under
        return top

    return above


def _lay(under: list[Run], over: list[Run], rule: Callable[[Run, Run], Run]) -> list[Run]:
    """`under`, with what `rule` says where both have a run; `over` lies inside it. Both in order. O(runs)."""
    if not over:
        return under
    laid: list[Run] = []
    turn = 0
    for run in under:
        at = run.start
        while turn < len(over) and over[turn].start < run.end:
            top = over[turn]
            low, high = max(at, top.start), min(run.end, top.end)
            if at < low:
                _add(laid, run._replace(start=at, end=low))
            _add(laid, rule(run, top)._replace(start=low, end=high))
            at = high
            if top.end > run.end:
                break
            turn += 1
        if at < run.end:
            _add(laid, run._replace(start=at))
    return laid


def _add(runs: list[Run], run: Run) -> None:
    """Behind the last one, or as a part of it."""
    if runs and runs[-1].kind == run.kind and runs[-1].generation == run.generation and runs[-1].end == run.start:
        runs[-1] = runs[-1]._replace(end=run.end)
    else:
        runs.append(run)
