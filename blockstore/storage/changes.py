"""Which blocks changed in a range of generations: the rows of `extents`, one list in the order of extents.

A row says what was written, zeroed, trimmed or (in generation 0) filled, whether or not an entry is left
of it. A merge folds the row of a generation that goes into the next one that stays, in one transaction,
and the highest one of a range that is asked for stays: so each transaction finds every change of the
range in it, perhaps with older ones, never less. Cost: the rows, not the volume.

Each generation's rows are walked one after the other, and the one behind them is looked at as well: a row
whose key was damaged fails its check there, instead of being passed over.
"""

import heapq
from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import groupby
from operator import or_

from blockstore.storage.delta import read_rows
from blockstore.storage.keys import EXTENT_KEY, ExtentRow, extent_key
from blockstore.storage.reads import BlockVersion
from blockstore.storage.tables import Reading, Tables
from blockstore.units import EXTENT_BLOCKS, MAX_BLOCKS, BlockNumber, Generation

ChangedExtent = tuple[int, int]
"""An extent, and the bits of the blocks that changed in it."""


def changed_extents(
    tables: Tables, transaction: Reading, generations: range, first: int, limit: int
) -> list[ChangedExtent]:
    """The first `limit` extents from `first` on that changed in these generations. Raises Corrupt."""
    walks = [_walk(tables, transaction, each, first) for each in _with_rows(tables, transaction, generations)]
    found: list[ChangedExtent] = []
    for extent, rows in groupby(heapq.merge(*walks), key=lambda row: row[0]):
        if len(found) == limit:
            break
        bits = 0
        for _, changed in rows:
            bits |= changed
        found.append((extent, bits))
    return found


def hidden_changes(
    tables: Tables, transaction: Reading, generations: Iterable[Generation], shown: Iterable[int]
) -> list[BlockVersion]:
    """Those of the blocks `shown`, which show a version from before `generations`, that changed in these.

    An entry is lost there. For readers who keep what they get: a snapshot that was shipped with the older content is
    never looked at again.
    """
    found: list[BlockVersion] = []
    for extent, blocks in groupby(sorted(shown), key=lambda number: number // EXTENT_BLOCKS):
        rows = read_rows(tables, transaction, extent, generations)
        changed = reduce(or_, (row.bits for row in rows.values()), 0)
        hidden = (number for number in blocks if changed >> number % EXTENT_BLOCKS & 1)
        found += [BlockVersion(BlockNumber(number), None, None) for number in hidden]
    return found


def _with_rows(tables: Tables, transaction: Reading, generations: range) -> list[Generation]:
    """Those of them that have rows; a seek for each."""
    found: list[Generation] = []
    cursor = transaction.cursor(tables.extents)
    here = cursor.set_range(extent_key(generations.start, 0))
    while here:
        generation, _ = EXTENT_KEY.unpack(cursor.key())
        if generation not in generations:
            break
        found.append(Generation(generation))
        here = cursor.set_range(extent_key(generation, MAX_BLOCKS))
    return found


def _walk(tables: Tables, transaction: Reading, generation: Generation, first: int) -> Iterator[ChangedExtent]:
    """The rows of one generation from an extent on."""
    cursor = transaction.cursor(tables.extents)
    here = cursor.set_range(extent_key(generation, first))
    while here:
        key, value = cursor.item()
        row = ExtentRow.decode(key, value)
        found, extent = EXTENT_KEY.unpack(key)
        if found != generation:
            return
        yield extent, row.bits
        here = cursor.next()
