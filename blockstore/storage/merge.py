"""Merging: deleting the versions that no pinned generation, and not the current one, can see.

No data moves. A generation that nobody pins any more is first marked, so that nobody reads it while
it goes; then, some extents at a time, its blocks lose the versions that no other generation shows,
and its row of `extents` folds into the next generation that stays: bits or-ed, highest sequence kept.
Those bits are what makes the row the list of blocks to look at, the next time as well. A zero entry
with nothing below it goes too, unless absence means something: while a source remains. A filling
replica does not merge: what it has is still to be compared with what is copied.
"""

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from blockstore.errors import Corrupt
from blockstore.storage.apply import put_present, raise_extent
from blockstore.storage.delta import read_entries, read_rows
from blockstore.storage.keys import (
    EXTENT_KEY,
    Version,
    blocks_of,
    decode_bits,
    extent_key,
    number_key,
    version_key,
)
from blockstore.storage.meta import Meta
from blockstore.storage.tables import Tables, Writing
from blockstore.units import EXTENT_BLOCKS, Generation

#: Extents in one transaction: a checkpoint that comes meanwhile waits for no more than these.
EXTENTS_A_CALL: Final = 64


class _Plan(NamedTuple):
    """merging: generations that go, oldest first. visible: those that reads may ask for, oldest first."""

    merging: list[Generation]
    visible: list[Generation]

    def heir(self, generation: Generation) -> Generation:
        """The generation that takes over the rows of one that goes."""
        return next(other for other in self.visible if other > generation)


def merge(tables: Tables, is_over: Callable[[], bool] = lambda: False) -> bool:
    """Delete what nobody can see; whether anything was there to merge. Blocking. Raises NoSpace, Corrupt.

    is_over: asked between transactions whether to leave the rest for another time.
    """
    merged = False
    while not is_over() and tables.change(lambda transaction: _merge_some(tables, transaction)):
        merged = True
    return merged


def _merge_some(tables: Tables, transaction: Writing) -> bool:
    """One transaction's worth; whether there may be more."""
    meta = Meta(tables, transaction)
    if meta.get(b"filling") is not None:
        return False
    plan = _plan(meta)
    if not plan.merging:
        return False
    oldest = plan.merging[0]
    extents = _extents_of(tables, transaction, oldest)
    for extent in extents:
        _merge_extent(tables, transaction, meta, plan, extent)
    if not extents:
        meta.delete_sealed(oldest)
    return True


def _plan(meta: Meta) -> _Plan:
    """Also marks what goes, so that it is not read any more from this transaction on."""
    pinned = meta.pinned()
    sealed = meta.sealed()
    for generation in sealed:
        if generation.generation not in pinned and not generation.merging:
            meta.put_sealed(generation._replace(merging=True))
    merging = [generation.generation for generation in sealed if generation.generation not in pinned]
    visible = [generation.generation for generation in sealed if generation.generation in pinned]
    return _Plan(merging, [*visible, meta.generation()])


def _extents_of(tables: Tables, transaction: Writing, generation: Generation) -> list[int]:
    """The first extents that have a row in a generation."""
    extents: list[int] = []
    cursor = transaction.cursor(tables.extents)
    here = cursor.set_range(extent_key(generation, 0))
    while here and len(extents) < EXTENTS_A_CALL:
        found, extent = EXTENT_KEY.unpack(cursor.key())
        if found != generation:
            break
        extents.append(extent)
        here = cursor.next()
    return extents


def _merge_extent(tables: Tables, transaction: Writing, meta: Meta, plan: _Plan, extent: int) -> None:
    rows = read_rows(tables, transaction, extent, plan.merging)
    bits = 0
    for generation in plan.merging:
        if generation in rows:
            bits |= rows[generation].bits
            heir = extent_key(plan.heir(generation), extent)
            raise_extent(tables, transaction, heir, rows[generation])
            transaction.delete(extent_key(generation, extent), db=tables.extents)
    versions: dict[int, dict[Generation, Version]] = {number: {} for number in blocks_of(extent, bits)}
    for (number, generation), version in read_entries(tables, transaction, extent).items():
        if number in versions:
            versions[number][generation] = version
    keep_zeroes = bool(meta.source)
    gone = 0
    for number, found in versions.items():
        kept = _kept(found, plan.visible, keep_zeroes=keep_zeroes)
        for generation in found.keys() - kept:
            key = version_key(number, generation)
            transaction.delete(key, db=tables.index)
            transaction.delete(key, db=tables.data)
        if found and not kept:
            gone |= 1 << number % EXTENT_BLOCKS
    if gone:
        _clear_present(tables, transaction, extent, gone)


def _kept(found: dict[Generation, Version], visible: Iterable[Generation], *, keep_zeroes: bool) -> set[Generation]:
    """The versions of one block that some visible generation shows."""
    shown = {max((g for g in found if g <= generation), default=None) for generation in visible}
    kept = sorted(generation for generation in shown if generation is not None)
    while kept and found[kept[0]].tail is None and not keep_zeroes:
        del kept[0]
    return set(kept)


def _clear_present(tables: Tables, transaction: Writing, extent: int, gone: int) -> None:
    key = number_key(extent)
    stored = transaction.get(key, db=tables.present)
    if stored is None:
        raise Corrupt(f"extent {extent} has entries, but no row in present")
    put_present(tables, transaction, extent, decode_bits(key, stored) & ~gone)
