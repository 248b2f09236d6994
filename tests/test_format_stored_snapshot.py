"""What Cairn stores, read by the plain reader from the bucket's bytes and the keyring's file alone.

Snapshots are written by the real writer: new blocks, blocks that are known already, zeroes, patches on shards, the
end of a large volume; then their frames are moved by the real repacking. And while all that happens no key
encrypts two messages under one nonce.
"""

import asyncio
import hashlib
import random
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from blockstore.units import BLOCK_SIZE, TIB
from snapshotd import crypto
from snapshotd.crypto import SALT_SIZE
from snapshotd.index import Index, encode_index
from snapshotd.layout import index_key, pack_key
from snapshotd.local_store import LocalStore
from snapshotd.repack import repack
from snapshotd.root import Root
from tests.format_objects import noise, words
from tests.plain_reader import Bucket, PlainReader, read_directory, unwrap_key
from tests.snapshot_parts import Parts, opened, snapshot_id

Content = dict[int, bytes]
"""By block number, what is not zero."""

_BLOCKS = TIB // BLOCK_SIZE
_ZEROES = bytes(BLOCK_SIZE)


def _first() -> Content:
    """Blocks that compress and blocks that do not, some alike, in three shards: the first, the last, one between."""
    chance = random.Random(1)
    content = {block: words(block) if block % 3 else noise(block) for block in range(1000, 1400)}
    content |= {block: words(chance.randrange(20)) for block in chance.sample(range(5_000_000, 5_032_768), 150)}
    return content | {_BLOCKS - 1: noise(7)}


def _changes(number: int) -> Content:
    chance = random.Random(number)
    changed = {block: noise(10_000 * number + block) for block in chance.sample(range(1000, 1400), 12)}
    return changed | {1000 + number: _ZEROES, 2000 + number: words(number), 1100: noise(1)}


@asynccontextmanager
async def _opened(directory: Path) -> AsyncIterator[Parts]:
    store = LocalStore(directory / "bucket")
    try:
        async with opened(directory, store) as parts:
            yield parts
    finally:
        await store.close()


async def _write_chain(parts: Parts, count: int) -> dict[str, Content]:
    """Snapshots 1 to `count`, each a change of the one before; and what is in each."""
    content, base = _first(), None
    expected = {}
    for number in range(1, count + 1):
        changes = _changes(number) if base else content
        base, _ = await parts.snapshot(number, TIB, changes, base)
        content = {block: data for block, data in (content | changes).items() if data != _ZEROES}
        expected[snapshot_id(number)] = content
    return expected


async def _repack_all(parts: Parts) -> None:
    """All frames move to a new object; the old objects go."""
    await parts.index.refresh()
    entries = list(parts.index.map.entries.values())
    moved = {e.object: {part.pack: sum(1 << n for n in part.numbers) for part in e.parts} for e in entries}
    result = await repack(parts.repository, moved, lambda: secrets.token_bytes(SALT_SIZE), lambda size: None)
    assert result.moved == moved.keys()
    index = Index(tuple(result.entries), tuple(moved))
    name, stored = encode_index(parts.repository.keys, index, secrets.token_bytes(SALT_SIZE))
    await parts.repository.store.put(index_key(name), stored)
    for gone in moved:
        await parts.repository.store.delete(pack_key(gone))


def _reader(directory: Path) -> PlainReader:
    bucket = read_directory(directory / "bucket")
    return PlainReader(bucket, *unwrap_key(bucket, directory / "keyring"))


def _check(directory: Path, expected: dict[str, Content]) -> Bucket:
    reader = _reader(directory)
    for snapshot, content in expected.items():
        assert dict(reader.blocks(snapshot)) == content
    return reader.bucket


def test_the_plain_reader_reads_what_cairn_stored(tmp_path: Path) -> None:
    async def run() -> dict[str, Content]:
        async with _opened(tmp_path) as parts:
            return await _write_chain(parts, 11)

    expected = asyncio.run(run())
    bucket = _check(tmp_path, expected)
    roots = {key: hashlib.sha256(stored).hexdigest() for key, stored in bucket.items() if key.startswith("snapshots/")}
    assert len(roots) == len(expected)
    assert {key.partition(".")[0] for key in roots} == {f"snapshots/{name}" for name in expected}
    assert all(key.endswith(f".{name}") for key, name in roots.items())
    depths = {_depth(_reader(tmp_path), key.removeprefix("shards/")) for key in bucket if key.startswith("shards/")}
    assert depths == set(range(9)), "patches of every depth, and whole shards"


def _depth(reader: PlainReader, name: str) -> int:
    return reader.unseal("S", "shard", reader.named("shards", name))[1].number(1)


def test_trailers_say_what_lies_in_their_objects(tmp_path: Path) -> None:
    async def run() -> None:
        async with _opened(tmp_path) as parts:
            await _write_chain(parts, 2)

    asyncio.run(run())
    reader = _reader(tmp_path)
    listed = [
        each for key, stored in reader.bucket.items() if key.startswith("packs/") for each in reader.trailer(stored)
    ]
    assert len(listed) == len(reader.frames) > 5
    for (pack, snapshot, number, *_), hashes in listed:
        content = reader.frame(pack, number)
        blocks = [content[at : at + BLOCK_SIZE] for at in range(0, len(content), BLOCK_SIZE)]
        assert list(map(reader.block_hash, blocks)) == hashes
        assert snapshot in {snapshot_id(1), snapshot_id(2)}
    every = [digest for _, hashes in listed for digest in hashes]
    assert len(set(every)) == len(every), "no block is stored twice"


def test_the_plain_reader_reads_what_was_repacked(tmp_path: Path) -> None:
    async def run() -> dict[str, Content]:
        async with _opened(tmp_path) as parts:
            expected = await _write_chain(parts, 3)
            await _repack_all(parts)
            return expected

    bucket = _check(tmp_path, asyncio.run(run()))
    assert len([key for key in bucket if key.startswith("packs/")]) == 1


def test_the_plain_reader_reads_the_facts_of_a_root(tmp_path: Path) -> None:
    async def run() -> Root:
        async with _opened(tmp_path) as parts:
            root, _ = await parts.snapshot(1, TIB, _first())
            return root

    root = asyncio.run(run())
    read = _reader(tmp_path).root(root.snapshot)
    assert read["shards"] == dict(root.shards)
    assert read["statistics"][0] == root.statistics.logical_bytes == len(_first()) * BLOCK_SIZE
    assert (read["volume"], read["volume_name"], read["size_bytes"]) == (root.volume, root.volume_name, TIB)


def test_nothing_readable_is_in_the_bucket(tmp_path: Path) -> None:
    async def run() -> Parts:
        async with _opened(tmp_path) as parts:
            await _write_chain(parts, 2)
            return parts

    keys = asyncio.run(run()).repository.keys
    secret = [b"a volume", b"of this volume", noise(1000)[:32], *(keys.block_hash(words(n)) for n in range(20))]
    for key, stored in read_directory(tmp_path / "bucket").items():
        assert not [each for each in secret if each in stored], key


def test_no_nonce_is_used_twice_by_writing_and_repacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: Counter[tuple[bytes, bytes]] = Counter()

    class Watched:
        def __init__(self, key: bytes) -> None:
            self._key, self._aead = key, AESGCM(key)
            self.decrypt = self._aead.decrypt

        def encrypt(self, nonce: bytes, data: bytes, bound: bytes) -> bytes:
            used[self._key, nonce] += 1
            return self._aead.encrypt(nonce, data, bound)

    monkeypatch.setattr(crypto, "AESGCM", Watched)

    async def run() -> None:
        async with _opened(tmp_path) as parts:
            await asyncio.gather(_write_chain(parts, 4), parts.snapshot(50, TIB, _changes(50)))
            await _repack_all(parts)

    asyncio.run(run())
    assert len(used) > 30
    assert set(used.values()) == {1}
