"""What a prune means to delete, published before it deletes: the ids of packs.

It is bound to its number, which the prune got by raising the one in the metastore; the object's name is that
number. Source: docs/format.md, "Quarantine"; design: snapshots complete only after they were checked against it.
"""

from collections.abc import Collection
from typing import Final

from snapshotd.compression import compress, expand
from snapshotd.crypto import SALT_SIZE, DomainKeys, Kind
from snapshotd.fields import Fields

MAX_PACKS: Final = 4 << 20
_MAX_CONTENT: Final = 4 + MAX_PACKS * SALT_SIZE


def encode_quarantine(keys: DomainKeys, number: int, packs: Collection[bytes], salt: bytes) -> bytes:
    """The stored bytes of quarantine `number`. packs: ids of 16 bytes. salt: 16 random bytes, never used before."""
    if len(packs) > MAX_PACKS or any(len(pack) != SALT_SIZE for pack in packs):
        raise ValueError(f"a quarantine of {len(packs)} packs: at most {MAX_PACKS} ids of {SALT_SIZE} bytes")
    content = len(packs).to_bytes(4, "little") + b"".join(sorted(packs))
    return keys.seal(Kind.QUARANTINE, _context(number), compress(content), salt)


def decode_quarantine(keys: DomainKeys, number: int, stored: bytes) -> frozenset[bytes]:
    """The packs of quarantine `number`. Raises Corrupt where the bytes are not it, whole and unchanged."""
    what = f"quarantine {number}"
    fields = Fields(expand(keys.open(Kind.QUARANTINE, _context(number), stored, what), _MAX_CONTENT, what), what)
    packs = fields.names(fields.number(4, MAX_PACKS), SALT_SIZE)
    fields.end()
    return frozenset(packs)


def _context(number: int) -> bytes:
    return number.to_bytes(8, "little")
