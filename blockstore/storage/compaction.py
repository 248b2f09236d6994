"""Compaction: the tables anew in a file without free pages, while reads, commits and checkpoints go on.

LMDB keeps the pages that it freed, so a file never shrinks by itself. A compacted copy is made from
one read transaction; then the extents that checkpoints changed meanwhile are carried over, in rounds
that get shorter, by the same list that copies between replicas use: the rows of `extents` whose
sequence is above what the copy reflects. The last round holds changes up, and the new file takes
the old one's name in one atomic step. A crash at any point leaves the old file or the new one.

What changes tables without raising a sequence is kept out for as long (merges) or carried over by name
(repairs); a copy from a peer makes the compaction void.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from blockstore.errors import Corrupt
from blockstore.storage.apply import put_sorted
from blockstore.storage.delta import all_generations, extents_above
from blockstore.storage.keys import extent_key, number_key
from blockstore.storage.meta import Meta
from blockstore.storage.tables import ReadCursor, Reading, Tables, WriteCursor, Writing, lock_of, replacement_of
from blockstore.units import EXTENT_BLOCKS

#: Carried over in one transaction: 16 MiB at most, for each generation.
_EXTENTS_A_CALL: Final = 16
#: Rounds without holding changes up. With fewer changed extents than one call takes, the last one begins.
_MAX_ROUNDS: Final = 8


def compact(tables: Tables, repaired: Callable[[], Iterable[int]], is_void: Callable[[], bool]) -> bool:
    """Replace the tables' file by a compacted one; False where it became void. Blocking.

    repaired: the extents that were repaired since the start. is_void: whether a copy from a peer was
    written since the start, or the tables are to be closed. Raises NoSpace (nothing changed), StorageFailed.
    """
    target = replacement_of(tables.path)
    remove_leftovers(tables.path)
    try:
        tables.copy_compacted(target)
        fresh = Tables(target, create=False)
        try:
            if not is_void():
                _catch_up(tables, fresh)
            with tables.exclusive():
                if is_void():
                    return False
                applied = _applied(tables)
                _carry(tables, fresh, {*_changed(tables, fresh), *repaired()}, applied)
                _carry_rest(tables, fresh)
                tables.replace_by(fresh)
                return True
        finally:
            fresh.close()
    finally:
        remove_leftovers(tables.path)


def remove_leftovers(path: Path) -> None:
    """What the making of such a file left behind."""
    target = replacement_of(path)
    for leftover in (target, lock_of(target)):
        leftover.unlink(missing_ok=True)


def _catch_up(tables: Tables, fresh: Tables) -> None:
    for _ in range(_MAX_ROUNDS):
        applied = _applied(tables)  # before the list: what a checkpoint adds after it is in the next one
        changed = _changed(tables, fresh)
        _carry(tables, fresh, changed, applied)
        if len(changed) < _EXTENTS_A_CALL:
            return


def _changed(tables: Tables, fresh: Tables) -> list[int]:
    with fresh.reading() as transaction:
        since = Meta(fresh, transaction).applied().sequence
    return extents_above(tables, since)


def _applied(tables: Tables) -> bytes:
    """The row of `meta` that says what the tables reflect, as it is stored."""
    with tables.reading() as transaction:
        return bytes(_must(transaction.get(b"applied", db=tables.meta)))


def _carry(tables: Tables, fresh: Tables, extents: Iterable[int], applied: bytes) -> None:
    """Make these extents in `fresh` what they are in `tables`.

    applied: `fresh` reflects that afterwards, so it was noted before the extents were listed.
    """
    wanted = sorted(extents)
    for at in range(0, len(wanted), _EXTENTS_A_CALL):
        chunk = wanted[at : at + _EXTENTS_A_CALL]
        with tables.reading() as transaction:
            contents = [_Content(tables, transaction, extent) for extent in chunk]
        fresh.change(partial(_put_all, fresh, contents))
    fresh.change(lambda transaction: transaction.put(b"applied", applied, db=fresh.meta))


class _Content:
    """All rows of one extent, as they are stored."""

    def __init__(self, tables: Tables, transaction: Reading, extent: int) -> None:
        self.extent = extent
        self.index = dict(_range(transaction.cursor(tables.index), extent))
        self.data = dict(_range(transaction.cursor(tables.data), extent))
        self.present = _copied(transaction.get(number_key(extent), db=tables.present))
        keys = [extent_key(generation, extent) for generation in all_generations(Meta(tables, transaction))]
        rows = [(key, _copied(transaction.get(key, db=tables.extents))) for key in keys]
        self.rows = [(key, row) for key, row in rows if row is not None]

    def put(self, fresh: Tables, transaction: Writing) -> None:
        for table, items in ((fresh.index, self.index), (fresh.data, self.data)):
            for key, _ in list(_range(transaction.cursor(table), self.extent)):
                if key not in items:
                    transaction.delete(key, db=table)
            put_sorted(transaction.cursor(table), list(items.items()))
        for key, row in self.rows:
            transaction.put(key, row, db=fresh.extents)
        if self.present is None:
            transaction.delete(number_key(self.extent), db=fresh.present)
        else:
            transaction.put(number_key(self.extent), self.present, db=fresh.present)


def _put_all(fresh: Tables, contents: list[_Content], transaction: Writing) -> None:
    for content in contents:
        content.put(fresh, transaction)


def _carry_rest(tables: Tables, fresh: Tables) -> None:
    """The small tables, whole."""
    with tables.reading() as transaction:
        meta = [(bytes(key), bytes(value)) for key, value in transaction.cursor(tables.meta)]
        tail = [(bytes(key), bytes(value)) for key, value in transaction.cursor(tables.tail)]

    def replace(transaction: Writing) -> None:
        for table, rows in ((fresh.meta, meta), (fresh.tail, tail)):
            transaction.drop(table, delete=False)
            put_sorted(transaction.cursor(table), rows)

    fresh.change(replace)


def _range(cursor: ReadCursor | WriteCursor, extent: int) -> Iterator[tuple[bytes, bytes]]:
    """The rows of `index` or `data` that belong to an extent."""
    end = number_key((extent + 1) * EXTENT_BLOCKS)
    here = cursor.set_range(number_key(extent * EXTENT_BLOCKS))
    while here:
        key = bytes(cursor.key())
        if key >= end:
            return
        yield key, bytes(cursor.value())
        here = cursor.next()


def _copied(value: memoryview | None) -> bytes | None:
    return None if value is None else bytes(value)


def _must(value: memoryview | None) -> memoryview:
    if value is None:
        raise Corrupt("the meta table has no applied position")
    return value
