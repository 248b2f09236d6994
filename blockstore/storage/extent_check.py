"""What the tables must agree on within one extent: the check of a stopped node, and of every copy and scrub.

An entry that is lost (one flipped key bit is enough) shows in two ways: its bit in `present` has no
entry, or, where older versions are left that would show instead, its bit in the row of `extents` of a
generation that reads may ask for has none.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Seq

from blockstore.storage.keys import ExtentRow, Key, Version, blocks_of
from blockstore.units import EXTENT_BLOCKS, FILL_GENERATION, Generation, Sequence


def lost_entries(
    extent: int,
    entries: Mapping[Key, Version],
    present: int,
    rows: Mapping[Generation, ExtentRow],
    visible: Seq[Generation],
) -> Iterator[tuple[int, str]]:
    """Block number and what is wrong, of each block whose entries cannot be all, or that has one too many.

    visible: the generations that reads may ask for (pinned ones and the current), ascending. Only for a
    whole replica.
    """
    expected, found = set(blocks_of(extent, present)), {number for number, _ in entries}
    for number in sorted(expected - found):
        yield number, f"block {number} has no entry, yet its bit in present is set"
    for number in sorted(found - expected):
        yield number, f"block {number} has an entry, yet its bit in present is clear"
    before = FILL_GENERATION
    for generation in visible:
        if generation in rows:
            yield from _hidden(extent, entries, rows[generation], before, generation)
        before = generation


def uncovered_entries(
    extent: int,
    entries: Mapping[Key, Sequence],
    rows: Mapping[Generation, ExtentRow],
    generations: Seq[Generation],
    pinned: Collection[Generation],
) -> Iterator[tuple[int, str]]:
    """Block number and what is wrong, of each entry (given with its sequence) that no row of `extents` tells of.

    An entry is covered by its own generation's row, or by those that took it over when that one was merged away.
    generations: all that can have rows, ascending. Only for a whole replica.
    """
    covering: dict[Generation, list[ExtentRow]] = {}
    for (number, generation), sequence in entries.items():
        if generation not in covering:
            covering[generation] = list(_heirs(generation, rows, generations, pinned))
        name = f"block {number} of generation {generation}"
        sequences = [row.sequence for row in covering[generation] if row.bits >> number % EXTENT_BLOCKS & 1]
        if not sequences:
            yield number, f"{name} is in no row of extents"
        elif max(sequences) < sequence:
            yield number, f"{name} has sequence {sequence}, above that of its row of extents"


def _heirs(
    generation: Generation,
    rows: Mapping[Generation, ExtentRow],
    generations: Seq[Generation],
    pinned: Collection[Generation],
) -> Iterator[ExtentRow]:
    """The rows that may have taken over those of a generation: its own, up to the next that is pinned."""
    for heir in generations[bisect_left(generations, generation) :]:
        if heir in rows:
            yield rows[heir]
        if heir in pinned:
            return


def _hidden(
    extent: int, entries: Mapping[Key, Version], row: ExtentRow, before: Generation, generation: Generation
) -> Iterator[tuple[int, str]]:
    """A change over an older version leaves an entry, or the older one would show through."""
    here = {number for number, found in entries if before < found <= generation}
    older = {number for number, found in entries if found <= before}
    for number in blocks_of(extent, row.bits) if older else ():
        if number in older and number not in here:
            yield number, f"block {number} changed in generation {generation}, yet has only older entries"
