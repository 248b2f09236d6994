"""One number for what a replica shows: how replicas are compared, whatever their tables look like.

Raw tables may differ between replicas that show the same: a merge ran on one of them only, a trim
deleted here and left a zero entry there. So the digest is over block numbers and contents, and a
block of zeroes counts for nothing however it came about.
"""

from collections.abc import Iterator

import xxhash

from blockstore.storage.keys import number_key
from blockstore.storage.meta import Meta
from blockstore.storage.reads import ZERO_BLOCK, Found, TableReader
from blockstore.storage.tables import Tables
from blockstore.units import EXTENT_BLOCKS, MAX_GENERATION, Generation


def digest_of(tables: Tables, generation: Generation | None) -> str:
    """In hexadecimal. Raises NotFound, CorruptBlocks."""
    if generation is not None:
        with tables.reading() as transaction:
            Meta(tables, transaction).check_readable(generation)
    digest = xxhash.xxh3_128()
    for extent in extents_present(tables):
        for found in _showing(tables, extent, MAX_GENERATION if generation is None else generation):
            if found.block is not None and found.block != ZERO_BLOCK:
                digest.update(number_key(found.number))
                digest.update(found.block)
    return digest.hexdigest()


def extents_present(tables: Tables) -> Iterator[int]:
    """The extents that have entries, ascending; a transaction for each."""
    extent = 0
    while True:
        with tables.reading() as transaction:
            cursor = transaction.cursor(tables.present)
            if not cursor.set_range(number_key(extent)):
                return
            extent = int.from_bytes(cursor.key(), "big")
        yield extent
        extent += 1


def _showing(tables: Tables, extent: int, generation: int) -> list[Found]:
    with tables.reading() as transaction:
        reader = TableReader(tables, transaction)
        start = extent * EXTENT_BLOCKS
        found = reader.versions(start, start + EXTENT_BLOCKS, generation)
        reader.raise_damage()
        return found
