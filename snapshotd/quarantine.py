"""What a prune means to delete, published before it deletes: marks of packs, objects, shards and roots.

A mark is 16 bytes: the id of a pack, or the first half of the name of an object of frames, a shard or a root. The
quarantine is bound to its number, which is the object's name. Source: docs/format.md, "Quarantine"; what prunes and
writers do with it is told in `snapshotd.prune`.
"""

from collections.abc import Collection
from typing import Final

from snapshotd.compression import compress, expand
from snapshotd.crypto import DomainKeys, Kind
from snapshotd.fields import Fields

#: Of a name, as pack ids have it: 128 bits of a hash never collide by chance.
MARK_SIZE: Final = 16
MAX_MARKS: Final = 4 << 20
_MAX_CONTENT: Final = 4 + MAX_MARKS * MARK_SIZE


def encode_quarantine(keys: DomainKeys, number: int, marks: Collection[bytes], salt: bytes) -> bytes:
    """The stored bytes of quarantine `number` (64 bits). salt: 16 random bytes, never used before."""
    if len(marks) > MAX_MARKS or any(len(mark) != MARK_SIZE for mark in marks):
        raise ValueError(f"a quarantine of {len(marks)} marks: at most {MAX_MARKS} of {MARK_SIZE} bytes")
    content = len(marks).to_bytes(4, "little") + b"".join(sorted(marks))
    return keys.seal(Kind.QUARANTINE, _context(number), compress(content), salt)


def decode_quarantine(keys: DomainKeys, number: int, stored: bytes) -> frozenset[bytes]:
    """The marks of quarantine `number`. Raises Corrupt where the bytes are not it, whole and unchanged."""
    what = f"quarantine {number}"
    fields = Fields(expand(keys.open(Kind.QUARANTINE, _context(number), stored, what), _MAX_CONTENT, what), what)
    marks = fields.names(fields.number(4, MAX_MARKS), MARK_SIZE)
    fields.end()
    return frozenset(marks)


def _context(number: int) -> bytes:
    return number.to_bytes(8, "little")
