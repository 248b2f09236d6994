"""The root of a snapshot: all that is known of it, and the names of its shards.

It is whole by itself: from the root and the keys, everything of the snapshot is found and checked, as each
shard is named by its hash and names packs whose frames are authenticated. Shards that map nothing are left
out, so that a root grows with the data and not with the volume. It is bound to the snapshot's id (its name in
the object store) and to the volume's id, which stands in clear; names, texts and tags are inside.
Source: docs/format.md, "Roots".
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from blockstore.domain import check_id
from blockstore.errors import Corrupt, InvalidRequest
from blockstore.units import BLOCK_SIZE, MAX_BLOCKS, MAX_VOLUME_SIZE
from snapshotd.compression import compress, expand
from snapshotd.crypto import NAME_SIZE, DomainKeys, Kind, clear_of, raw_name
from snapshotd.fields import Fields, column, text
from snapshotd.manifest import SHARD_BLOCKS

MAX_SHARDS: Final = MAX_BLOCKS // SHARD_BLOCKS
MAX_TAGS: Final = 200
MAX_ROOT_CONTENT: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Statistics:
    """Bytes, as in SnapshotStatistics of snapshot.proto."""

    logical_bytes: int = 0
    changed_bytes: int = 0
    deduplicated_bytes: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Root:
    """One snapshot. Times are milliseconds since 1970, UTC; "" where there is no parent, barrier or volume.

    shards: by shard number (block number // 32,768) the name of the shard; only those that map something.
    """

    snapshot: str
    volume: str
    volume_name: str
    size_bytes: int
    parent: str = ""
    barrier: str = ""
    generation: int = 0
    created_at_ms: int = 0
    sealed_at_ms: int = 0
    completed_at_ms: int = 0
    pause_us: int = 0
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    statistics: Statistics = Statistics()
    shards: Mapping[int, str] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """Of the volume; the last one may be used in part only."""
        return -(-self.size_bytes // BLOCK_SIZE)


def encode_root(keys: DomainKeys, root: Root, salt: bytes) -> tuple[bytes, bytes]:
    """(stored bytes, their SHA-256). salt: 16 random bytes, never used before. Raises ValueError beyond the limits."""
    if not 0 <= root.size_bytes <= MAX_VOLUME_SIZE or len(root.tags) > MAX_TAGS:
        raise ValueError(f"a root of {root.size_bytes} bytes with {len(root.tags)} tags")
    numbers = sorted(root.shards)
    if numbers and not 0 <= numbers[0] <= numbers[-1] < _shard_count(root.size_bytes):
        raise ValueError(f"shards {numbers[0]} to {numbers[-1]} of a volume of {root.size_bytes} bytes")
    content = b"".join([_encode_facts(root), len(numbers).to_bytes(4, "little"), column(numbers, 4)])
    content += b"".join(raw_name(root.shards[number]) for number in numbers)
    stored = keys.seal(Kind.ROOT, root.snapshot.encode(), compress(content), salt, clear=root.volume.encode())
    return stored, hashlib.sha256(stored).digest()


def decode_root(keys: DomainKeys, snapshot: str, stored: bytes, expected: bytes | None = None) -> Root:
    """The root of that snapshot. expected: the SHA-256 that the catalog has, or None where nobody knows it.

    Raises Corrupt where the bytes are not it, whole and unchanged.
    """
    what = f"root of {snapshot}"
    if expected is not None and hashlib.sha256(stored).digest() != expected:
        raise Corrupt(f"{what} is not the one that the catalog names: it was changed, or is an older one")
    plain = keys.open(Kind.ROOT, snapshot.encode(), stored, what)
    fields = Fields(expand(plain, MAX_ROOT_CONTENT, what), what)
    root = _decode_root(fields, snapshot, _volume_of(stored, what))
    fields.end()
    return root


def _encode_facts(root: Root) -> bytes:
    chunks = [_unsigned(root.size_bytes), text(root.volume_name), text(root.parent), text(root.barrier)]
    chunks.append(root.generation.to_bytes(4, "little"))
    for time_ms in (root.created_at_ms, root.sealed_at_ms, root.completed_at_ms):
        chunks.append(time_ms.to_bytes(8, "little", signed=True))
    chunks += [_unsigned(root.pause_us), text(root.description), len(root.tags).to_bytes(2, "little")]
    for name, value in sorted(root.tags.items()):
        chunks += [text(name), text(value)]
    statistics = root.statistics
    chunks += [_unsigned(statistics.logical_bytes), _unsigned(statistics.changed_bytes)]
    chunks += [_unsigned(statistics.deduplicated_bytes), _unsigned(statistics.stored_bytes)]
    return b"".join(chunks)


def _decode_root(fields: Fields, snapshot: str, volume: str) -> Root:
    """Arguments are read in the order in which they lie: Python evaluates them from left to right."""
    size_bytes = fields.number(8, MAX_VOLUME_SIZE)
    return Root(
        snapshot=snapshot,
        volume=volume,
        size_bytes=size_bytes,
        volume_name=fields.text(),
        parent=fields.text(),
        barrier=fields.text(),
        generation=fields.number(4),
        created_at_ms=fields.signed(),
        sealed_at_ms=fields.signed(),
        completed_at_ms=fields.signed(),
        pause_us=fields.number(8),
        description=fields.text(),
        tags=_decode_tags(fields),
        statistics=Statistics(fields.number(8), fields.number(8), fields.number(8), fields.number(8)),
        shards=_decode_shards(fields, _shard_count(size_bytes)),
    )


def _decode_tags(fields: Fields) -> dict[str, str]:
    count = fields.number(2, MAX_TAGS)
    tags = {fields.text(): fields.text() for _ in range(count)}
    if len(tags) != count:
        raise fields.error("has a tag twice")
    return tags


def _decode_shards(fields: Fields, most: int) -> dict[int, str]:
    count = fields.number(4, most)
    numbers = fields.column(count, 4)
    names = [raw.hex() for raw in fields.names(count, NAME_SIZE)]
    if list(numbers) != sorted(set(numbers)) or (count and numbers[-1] >= most):
        raise fields.error(f"has shard numbers that do not ascend, or go beyond {most}")
    return dict(zip(numbers, names, strict=True))


def _volume_of(stored: bytes, what: str) -> str:
    volume = clear_of(stored).decode("ascii", "replace")
    try:
        return check_id("vol", volume) if volume else ""
    except InvalidRequest as error:
        raise Corrupt(f"{what} names a volume {volume!r}, which is no id") from error


def _shard_count(size_bytes: int) -> int:
    return -(-size_bytes // (SHARD_BLOCKS * BLOCK_SIZE))


def _unsigned(number: int) -> bytes:
    return number.to_bytes(8, "little")
