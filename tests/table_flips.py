"""Bits that flip in a replica's LMDB file, also of a running node: pages are not checked, so what is read has to be.

A row is found by the bytes that stand in its page: key, then value. Pages that LMDB has freed may hold it as well, and
are flipped, too.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path

from blockstore.storage.keys import HEAD_SIZE, TAIL_SIZE, extent_key, number_key, version_key
from blockstore.storage.replica_store import ReplicaStore
from blockstore.storage.tables import FILE_NAME
from blockstore.units import EXTENT_BLOCKS, FIRST_GENERATION

_BIG_DATA = 1

Flip = Callable[[ReplicaStore, int, bytes], None]
"""Damages what belongs to a block, which was written to the first generation with that content."""


def flip(path: Path, needle: bytes, offset: int, bit: int = 0) -> None:
    """Of each place where `needle` stands, the byte at `offset` in it."""
    content = path.read_bytes()
    at = content.find(needle)
    assert at >= 0, "what is to be damaged is not in the file"
    with path.open("r+b") as file:
        while at >= 0:
            file.seek(at + offset)
            file.write(bytes([content[at + offset] ^ 1 << bit]))
            at = content.find(needle, at + 1)
        file.flush()
        os.fsync(file.fileno())


def _row(store: ReplicaStore, table: str, key: bytes) -> bytes:
    """Key and value as they stand in a page."""
    tables = store._tables
    with tables.reading() as transaction:
        value = transaction.get(key, db=getattr(tables, table))
        assert value is not None
        return key + bytes(value)


def _flip_row(table: str, offset: int) -> Flip:
    """offset: into key and value together; negative from the end."""

    def damage(store: ReplicaStore, number: int, content: bytes) -> None:
        extent = number // EXTENT_BLOCKS
        keys = {
            "index": version_key(number, FIRST_GENERATION),
            "extents": extent_key(FIRST_GENERATION, extent),
            "present": number_key(extent),
            "meta": b"applied",
        }
        row = _row(store, table, keys[table])
        flip(store.directory / FILE_NAME, row, offset if offset >= 0 else len(row) + offset)

    return damage


def _flip_block(store: ReplicaStore, number: int, content: bytes) -> None:
    flip(store.directory / FILE_NAME, content[:HEAD_SIZE], 2000)


def _flip_block_key(store: ReplicaStore, number: int, content: bytes) -> None:
    """A head has a page of its own: LMDB's node has sizes, flags, key and the page's number."""
    key = version_key(number, FIRST_GENERATION)
    node = struct.pack("<HHHH", HEAD_SIZE, 0, _BIG_DATA, len(key)) + key
    flip(store.directory / FILE_NAME, node, 8 + 7, bit=6)


_TAIL = -TAIL_SIZE

#: By table and part. A key with a flipped bit: the row is lost under its own.
FLIPS: dict[str, Flip] = {
    "index, the block's last bytes": _flip_row("index", -1),
    "index, checksum": _flip_row("index", _TAIL - 2),
    "index, flag": _flip_row("index", _TAIL - 1),
    "index, key": _flip_row("index", 7),
    "data, the block": _flip_block,
    "data, key": _flip_block_key,
    "present, value": _flip_row("present", 12),
    "present, key": _flip_row("present", 6),
    "extents, bitmap": _flip_row("extents", 22),
    "extents, key": _flip_row("extents", 10),
    "meta, applied": _flip_row("meta", len(b"applied")),
}
#: What a guest's read looks at.
READ_FLIPS = [name for name in FLIPS if not name.startswith(("extents", "meta"))]
