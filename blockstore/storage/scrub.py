"""What scrub reads of the tables: every row of an extent, checked, and what the extent shows as one digest.

A digest is over content and block numbers only, generation by generation as reads would show them: so merges, zero
entries where another replica has none, tombstones and tails make no difference. What absence means while there is a
source only the source knows, so absence and zeroes are one.

Two digests are of *one* committed sequence although each replica applies at its own pace: a view says at which
position it was read, and the highest sequence of any record that changed the extent. Where the later view's highest
sequence is not above the earlier view's position, no record in between touched the extent here, and the later view
is also that of the earlier position. That holds because each record that changes what an extent shows raises a row
of `extents` to its sequence, in the transaction that applies it, and merges keep the highest (docs/storage.md,
invariants); entries are looked at as well, for a row that was lost.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import xxhash

from blockstore.domain import Position
from blockstore.errors import Corrupt
from blockstore.storage.changes import changed_extents
from blockstore.storage.copies import CopiedBlock, ExtentCopy
from blockstore.storage.delta import all_generations, read_extent, visible_generations
from blockstore.storage.extent_check import uncovered_entries
from blockstore.storage.keys import decode_bits, number_key, parse_version_key, version_key
from blockstore.storage.meta import Meta
from blockstore.storage.reads import ZERO_BLOCK
from blockstore.storage.tables import Reading, Tables
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, MAX_GENERATION, Generation, Sequence


class ExtentView(NamedTuple):
    """What an extent shows in the current generation and in those named, as of a position.

    highest: no later record changed it here. generations: the pinned ones that the digest covers, ascending; the
    current one is always in it. size_bytes: what was read for it.
    """

    extent: int
    position: Position
    highest: Sequence
    generations: tuple[Generation, ...]
    digest: bytes
    size_bytes: int


class ShownBlock(NamedTuple):
    """The version of a block that shows: where it comes from, and a digest of its content; empty for zeroes."""

    generation: Generation
    sequence: Sequence
    digest: bytes


class ShownExtent(NamedTuple):
    """The blocks of an extent that have an entry, by number, as one generation shows them."""

    position: Position
    highest: Sequence
    blocks: dict[int, ShownBlock]


class ScrubReader:
    """Each call is one read transaction, blocking, of a whole replica. Raises QuorumUnavailable while it fills."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def extents(self, first: int, limit: int) -> list[int]:
        """The first `limit` extents from `first` on of which there is anything, be it a stray row. Raises Corrupt."""
        with self._tables.reading() as transaction:
            Meta(self._tables, transaction).check_whole()
            rows = changed_extents(self._tables, transaction, range(MAX_GENERATION + 1), first, limit)
            found = {extent for extent, _ in rows}
            found.update(_present_extents(self._tables, transaction, first, limit))
            found.update(_indexed_extents(self._tables, transaction, first, limit))
            return sorted(found)[:limit]

    def count(self) -> int:
        """About how many extents there are: for progress."""
        with self._tables.reading() as transaction:
            return int(transaction.stat(self._tables.present)["entries"])

    def view(self, extent: int, asked: Collection[Generation] | None = None) -> ExtentView:
        """Check all rows of the extent; what it shows.

        asked: the generations to cover, as far as they are pinned here; None for all that are.
        Raises CorruptBlocks, and Corrupt where rows contradict each other.
        """
        with self._tables.reading() as transaction:
            copy, readable = self._read(transaction, extent)
        covered = tuple(each for each in readable if asked is None or each in asked)
        digest = _digest(copy.blocks, (*covered, MAX_GENERATION))
        size_bytes = BLOCK_SIZE * sum(block.block is not None for block in copy.blocks)
        return ExtentView(extent, copy.position, _highest(copy), covered, digest, size_bytes)

    def shown(self, extent: int, generation: Generation) -> ShownExtent:
        """Block by block, as `generation` (or MAX_GENERATION) shows it, for the place of a difference."""
        with self._tables.reading() as transaction:
            copy, _ = self._read(transaction, extent)
        newest: dict[int, CopiedBlock] = {}
        for block in sorted(copy.blocks, key=_age):
            if block.generation <= generation:
                newest[block.number] = block
        blocks = {
            number: ShownBlock(block.generation, block.sequence, _content(block)) for number, block in newest.items()
        }
        return ShownExtent(copy.position, _highest(copy), blocks)

    def pins(self) -> tuple[Position, bytes]:
        """What must be equal at one applied position beside the extents, as a digest: pins and source."""
        with self._tables.reading() as transaction:
            meta = Meta(self._tables, transaction)
            meta.check_whole()
            digest = xxhash.xxh3_128(meta.source)
            for pin in meta.pins():
                if pin.held:
                    digest.update(b"%d %s\n" % (pin.generation, pin.holder.hex().encode()))
            return meta.applied(), digest.digest()

    def _read(self, transaction: Reading, extent: int) -> tuple[ExtentCopy, list[Generation]]:
        """All of an extent, checked, and the pinned generations that can be read."""
        meta = Meta(self._tables, transaction)
        meta.check_whole()
        copy = read_extent(self._tables, transaction, extent)
        _check_order(self._tables, transaction, extent, copy)
        for _, what in uncovered_entries(
            extent,
            {(block.number, block.generation): block.sequence for block in copy.blocks},
            copy.rows,
            all_generations(meta),
            meta.pinned(),
        ):
            raise Corrupt(f"the tables at {self._tables.path} contradict themselves: {what}")
        merging = {sealed.generation for sealed in meta.sealed() if sealed.merging}
        return copy, [each for each in visible_generations(meta)[:-1] if each not in merging]


def _highest(copy: ExtentCopy) -> Sequence:
    """Of the records that changed the extent."""
    sequences = [row.sequence for row in copy.rows.values()] + [block.sequence for block in copy.blocks]
    return max(sequences, default=Sequence(0))


def _digest(blocks: Iterable[CopiedBlock], generations: Iterable[Generation]) -> bytes:
    """Over what each generation shows; one that changes nothing of the one before costs nothing."""
    digest = xxhash.xxh3_128()
    shown: dict[int, bytes] = {}
    rest = iter(sorted(blocks, key=_age))
    block = next(rest, None)
    changed, last = True, b""
    for generation in generations:
        while block is not None and block.generation <= generation:
            shown[block.number] = _content(block)
            block, changed = next(rest, None), True
        if changed:
            last = _digest_of(shown)
            changed = False
        digest.update(last)
    return digest.digest()


def _digest_of(shown: dict[int, bytes]) -> bytes:
    digest = xxhash.xxh3_128()
    for number, content in sorted(shown.items()):
        if content:
            digest.update(number_key(number))
            digest.update(content)
    return digest.digest()


def _age(block: CopiedBlock) -> tuple[int, int]:
    return block.generation, block.number


def _content(block: CopiedBlock) -> bytes:
    if block.block is None or block.block == ZERO_BLOCK:
        return b""
    return xxhash.xxh3_128_digest(block.block)


def _check_order(tables: Tables, transaction: Reading, extent: int, copy: ExtentCopy) -> None:
    """Keys ascend, and `data` has rows for just the entries with data: else LMDB finds some only by chance."""
    wanted = [version_key(each.number, each.generation) for each in copy.blocks if each.block is not None]
    found = list(_keys_of(tables, transaction, extent))
    if any(before >= after for before, after in pairwise(found)) or sorted(wanted) != found:
        raise Corrupt(
            f"the tables at {tables.path} contradict themselves: extent {extent} has {len(found)} rows in data, "
            f"of {len(wanted)} entries with data"
        )


def _keys_of(tables: Tables, transaction: Reading, extent: int) -> Iterator[bytes]:
    """The keys of `data` of an extent, as the table has them."""
    cursor = transaction.cursor(tables.data)
    end = number_key((extent + 1) * EXTENT_BLOCKS)
    here = cursor.set_range(version_key(extent * EXTENT_BLOCKS, MAX_GENERATION))
    while here:
        key = bytes(cursor.key())
        if key >= end:
            return
        yield key
        here = cursor.next()


def _present_extents(tables: Tables, transaction: Reading, first: int, limit: int) -> list[int]:
    """A row under a wrong key fails its check here: nobody would look for it."""
    cursor = transaction.cursor(tables.present)
    found: list[int] = []
    here = cursor.set_range(number_key(first))
    while here and len(found) < limit:
        key, value = cursor.item()
        decode_bits(key, value)
        found.append(int.from_bytes(key, "big"))
        here = cursor.next()
    return found


def _indexed_extents(tables: Tables, transaction: Reading, first: int, limit: int) -> list[int]:
    """Of `index` and `data`, by a seek for each extent."""
    found: list[int] = []
    for table in (tables.index, tables.data):
        cursor, extent, count = transaction.cursor(table), first, 0
        while count < limit and cursor.set_range(version_key(extent * EXTENT_BLOCKS, MAX_GENERATION)):
            number, _ = parse_version_key(cursor.key())
            if number // EXTENT_BLOCKS < extent:
                raise Corrupt(f"the tables at {tables.path} are out of order at block {number}")
            found.append(number // EXTENT_BLOCKS)
            extent, count = number // EXTENT_BLOCKS + 1, count + 1
    return found
