"""Objects of the stored format, of each kind, with fixed salts: what the tests of the format share."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from blockstore.units import BLOCK_SIZE
from snapshotd.crypto import DomainKeys
from snapshotd.frame import compress_frame
from snapshotd.index import Index, IndexEntry, decode_index, encode_index
from snapshotd.manifest import BlockRef, Shard, decode_shard, encode_patch, encode_shard
from snapshotd.pack import ObjectWriter, check_object
from snapshotd.quarantine import decode_quarantine, encode_quarantine
from snapshotd.root import Root, Statistics, decode_root, encode_root

KEYS = DomainKeys(bytes(range(16)), bytes(range(100, 132)))
SNAPSHOT = "snap-0123456789abcdef0"
OTHER_SNAPSHOT = "snap-fedcba98765432100"
VOLUME = "vol-00112233445566778"


def salt(number: int) -> bytes:
    """A salt for a test: the same for the same number. Real ones are random."""
    return hashlib.sha256(b"salt %d" % number).digest()[:16]


def noise(number: int) -> bytes:
    """A block that does not compress."""
    return hashlib.shake_256(b"block %d" % number).digest(BLOCK_SIZE)


def words(number: int) -> bytes:
    """A block that compresses well."""
    return (b"block %d of this volume, " % number * 300)[:BLOCK_SIZE]


def write_pack(
    frames: list[list[bytes]], number: int = 1, keys: DomainKeys = KEYS, snapshot: str = SNAPSHOT
) -> tuple[str, bytes, IndexEntry]:
    """(name, bytes, entry) of a pack of these frames, under the salt of `number`."""
    writer, cipher = ObjectWriter(keys, salt(number)), keys.frame_cipher(salt(number))
    for at, blocks in enumerate(frames):
        stored = cipher.encrypt(at, compress_frame(blocks))
        writer.copy(salt(number), snapshot, at, stored, [keys.block_hash(block) for block in blocks])
    name, buffers, entry = writer.finish()
    return name, b"".join(buffers), entry


def repack(
    objects: list[tuple[bytes, IndexEntry]], keep: set[tuple[bytes, int]], number: int
) -> tuple[str, bytes, IndexEntry]:
    """One object of the frames of `objects` (bytes, entry) whose (pack, number) is in `keep`, copied."""
    writer = ObjectWriter(KEYS, salt(number))
    for stored, entry in objects:
        trailer = check_object(KEYS, entry.object, stored)
        for part, hashes in zip(trailer.parts, trailer.hashes, strict=True):
            for frame, its in zip(part, hashes, strict=True):
                if (part.pack, frame.number) in keep:
                    copied = stored[frame.offset : frame.offset + frame.length]
                    writer.copy(part.pack, part.snapshot, frame.number, copied, its)
    name, buffers, entry = writer.finish()
    return name, b"".join(buffers), entry


def small_shard() -> Shard:
    """Three runs in two packs."""
    shard = Shard()
    for block in range(5):
        shard[block + 100] = BlockRef(salt(1), 0, block + 62) if block < 2 else BlockRef(salt(1), 1, block - 2)
    shard[32_767] = BlockRef(salt(2), 7, 9)
    return shard


ROOT = Root(
    snapshot=SNAPSHOT,
    volume=VOLUME,
    volume_name="database",
    size_bytes=1 << 40,
    parent=OTHER_SNAPSHOT,
    barrier="both at once",
    generation=7,
    created_at_ms=1_700_000_000_000,
    sealed_at_ms=1_700_000_000_004,
    completed_at_ms=1_700_000_009_000,
    pause_us=1234,
    description="vor dem Umbau: größer",
    tags={"owner": "ops", "kind": "nightly"},
    statistics=Statistics(6 * BLOCK_SIZE, 5 * BLOCK_SIZE, BLOCK_SIZE, 9999),
    shards={0: "ab" * 32, 8191: "cd" * 32},
)


@dataclass(frozen=True)
class Sample:
    """One stored object. read: what it says, given the name under which it was found, and its bytes."""

    name: str
    stored: bytes
    read: Callable[[str, bytes], object]
    is_named_by_content: bool = True


def samples(first_salt: int = 10, keys: DomainKeys = KEYS) -> dict[str, Sample]:
    """A small object of each kind; other salts give other objects of the same content."""
    salts = [salt(first_salt + step) for step in range(5)]
    pack, pack_bytes, entry = write_pack([[words(0)], [words(1), words(2)]], first_salt + 6, keys)
    index, index_bytes = encode_index(keys, Index((entry,), ("ef" * 32,)), salts[0])
    shard, shard_bytes = encode_shard(keys, small_shard(), salts[1])
    changes = {3: BlockRef(salt(3), 4, 5), 101: None, 102: None}
    patch, patch_bytes = encode_patch(keys, shard, 1, changes, salts[2])
    root_bytes, _ = encode_root(keys, ROOT, salts[3])
    quarantine_bytes = encode_quarantine(keys, 5, [salt(1), salt(2)], salts[4])
    return {
        "pack": Sample(pack, pack_bytes, lambda name, stored: check_object(keys, name, stored)),
        "index": Sample(index, index_bytes, lambda name, stored: decode_index(keys, name, stored)),
        "shard": Sample(shard, shard_bytes, lambda name, stored: decode_shard(keys, name, stored)),
        "patch": Sample(patch, patch_bytes, lambda name, stored: decode_shard(keys, name, stored)),
        "root": Sample(SNAPSHOT, root_bytes, lambda name, stored: decode_root(keys, name, stored), False),
        "quarantine": Sample(
            "5", quarantine_bytes, lambda name, stored: decode_quarantine(keys, int(name), stored), False
        ),
    }
