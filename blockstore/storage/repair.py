"""Mending one damaged version with a peer's copy of it.

The peer's block passed the checksum that the peer keeps. Here, what is left of the entry must agree:
its sequence, and either its checksum or its stored bytes. So one flipped bit anywhere in the entry or
in the block is mended, and a block that belongs to something else is never written.
"""

from blockstore.record import block_checksum
from blockstore.storage.keys import (
    HEAD_SIZE,
    INDEX_VALUE,
    TAIL_SIZE,
    data_value,
    raw_checksum,
    raw_sequence,
    version_key,
    zero_value,
)
from blockstore.storage.reads import ZERO_BLOCK, BlockVersion
from blockstore.storage.tables import Tables, Writing


def mend(tables: Tables, transaction: Writing, version: BlockVersion, block: bytes) -> bool:
    """Whether `block` stands in the tables now as the content of `version`."""
    number, generation, sequence = version
    if generation is None or sequence is None:
        return False
    key = version_key(number, generation)
    stored = transaction.get(key, db=tables.index)
    if stored is None or raw_sequence(stored) != sequence:
        return False
    if _is_the_zero(stored, version, block):
        transaction.put(key, zero_value(number, generation, sequence), db=tables.index)
        return True
    checksum = block_checksum(block, number, generation, sequence)
    head = transaction.get(key, b"", db=tables.data)
    if raw_checksum(stored) != checksum and head + stored[-TAIL_SIZE:] != block:
        return False
    transaction.put(key, data_value(sequence, checksum, block), db=tables.index)
    transaction.put(key, block[:HEAD_SIZE], db=tables.data)
    return True


def _is_the_zero(stored: bytes, version: BlockVersion, block: bytes) -> bool:
    """Whether the entry was a zero entry, which has no stored bytes to compare with."""
    number, generation, sequence = version
    assert generation is not None
    assert sequence is not None
    wanted = zero_value(number, generation, sequence)
    agrees = raw_checksum(stored) == raw_checksum(wanted) or stored[-1:] == wanted[-1:]
    return len(stored) == INDEX_VALUE.size and block == ZERO_BLOCK and agrees
