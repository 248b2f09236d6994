"""What a snapshot's content is exported as, in order or as frames, over real snapshots."""

import asyncio
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

from blockstore.errors import Corrupt, NotFound, OutOfRange
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, GIB, MIB
from snapshotd.compression import expand
from snapshotd.export import export
from snapshotd.frame import MAX_FRAME_CONTENT
from snapshotd.memory_store import MemoryStore
from tests.chain_parts import Chain, blocks, chain_at, content, exported
from tests.snapshot_parts import CountingStore, snapshot_id

SIZE = 8 * MIB
NONE: Any = None


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (5, 3 * BLOCK_SIZE), (BLOCK_SIZE * 90 + 1, MIB), (SIZE, 0)])
def test_export_gives_the_content_of_its_range(tmp_path: Path, offset: int, size: int) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root = await chain.snapshot(1, SIZE, {**blocks(range(3, 100)), **blocks(range(700, 1300))})
            whole = await chain.parts.content(root)
            end = offset + size if size else SIZE
            image = bytearray(end - offset)
            last = offset
            for at, data in (await exported(chain, offset=offset, size=size)).items():
                assert last <= at <= at + len(data) <= end
                assert len(data) <= MIB
                image[at - offset : at - offset + len(data)] = data
                last = at + len(data)
            assert bytes(image) == whole[offset:end]

    asyncio.run(check())


async def _export_frames(chain: Chain, size_bytes: int) -> bytes:
    """The image that the frames of snapshot 1 make."""
    image = bytearray(size_bytes)
    request = pb.ExportRequest(snapshot=snapshot_id(1), frames=True)
    async for message in chain.service.Export(request, NONE):
        assert not message.data
        assert message.ByteSize() < 3 * MIB
        for frame in message.frames:
            unpacked = expand(frame.body, MAX_FRAME_CONTENT, "a frame")
            for block, slot, count in zip(frame.blocks, frame.slots, frame.counts, strict=True):
                part = unpacked[slot * BLOCK_SIZE : (slot + count) * BLOCK_SIZE]
                image[block * BLOCK_SIZE : (block + count) * BLOCK_SIZE] = part
    return bytes(image)


def test_export_as_frames_gives_the_whole_content(tmp_path: Path) -> None:
    """Of several shards; with blocks that many places share, in no order, and frames of which little is needed."""
    chance = Random(3)
    shared = {block: content(number) for number, block in enumerate(chance.choices(range(40_000), k=300), 7)}
    again = {block: content(chance.randrange(7, 300)) for block in chance.sample(range(40_000), 200)}

    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.snapshot(2, 160 * MIB, shared)
            root = await chain.snapshot(1, 160 * MIB, {**blocks(range(900, 1500), 9), **again, 39_999: content(1)})
            assert await _export_frames(chain, root.size_bytes) == await chain.parts.content(root)

    asyncio.run(check())


def test_frames_that_lie_together_come_by_one_request(tmp_path: Path) -> None:
    async def check() -> None:
        store = CountingStore(MemoryStore())
        async with chain_at(tmp_path, store) as chain:
            await chain.snapshot(1, SIZE, blocks(range(2048)))
            store.gets.clear()
            await _export_frames(chain, SIZE)
            packs = [key for key in store.gets if key.startswith("packs/")]
            assert len(packs) == 32 / 8, "frames, so many in a message"

    asyncio.run(check())


def test_frames_that_a_prune_moved_are_found(tmp_path: Path) -> None:
    """By a daemon that another one pruned behind."""

    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            deleted = await chain.snapshot(2, SIZE, blocks(range(640)))
            root = await chain.snapshot(1, SIZE, {**blocks(range(0, 640, 128)), **blocks(range(64, 192))})
            whole = await _export_frames(chain, SIZE)
            before = await chain.keys("packs")
            await chain.delete(deleted)
            (tmp_path / "other").mkdir()
            shutil.copy(tmp_path / "keyring", tmp_path / "other" / "keyring")
            async with chain_at(tmp_path / "other", chain.store, chain.catalog) as other:
                await other.prune()
            assert not before.keys() & (await chain.keys("packs")).keys()
            assert await _export_frames(chain, SIZE) == whole
            assert await chain.parts.content(root) == whole

    asyncio.run(check())


def test_a_damaged_frame_is_not_exported(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.snapshot(1, SIZE, blocks(range(512)))
            (key,) = await chain.keys("packs")
            stored = bytearray(await chain.parts.repository.store.get(key))
            stored[100] ^= 1
            await chain.parts.repository.store.put(key, bytes(stored))
            with pytest.raises(Corrupt, match="frame 0 of pack"):
                await _export_frames(chain, SIZE)

    asyncio.run(check())


def test_export_leaves_zeroes_out_and_bounds_what_it_reads_ahead(tmp_path: Path) -> None:
    async def check() -> None:
        store = CountingStore(MemoryStore())
        async with chain_at(tmp_path, store) as chain:
            root = await chain.snapshot(1, GIB, {**blocks(range(2048)), **blocks(range(200_000, 206_000), 3)})
            pieces = export(chain.parts.reader, root)
            store.gets.clear()
            await anext(pieces)
            frames = [key for key in store.gets if key.startswith("packs/")]
            await pieces.aclose()
            assert len(frames) <= 17 * 5, "16 pieces ahead of 4 frames each, and one to hand on"
            total = sum([len(piece.data) async for piece in export(chain.parts.reader, root)])
            assert total == 8048 * BLOCK_SIZE

    asyncio.run(check())


def test_export_refuses_what_is_out_of_range_unknown_or_damaged(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            with pytest.raises(NotFound):
                await exported(chain)
            await chain.snapshot(1, SIZE, blocks(range(100)))
            with pytest.raises(OutOfRange):
                await exported(chain, offset=SIZE, size=1)
            (pack,) = await chain.keys("packs")
            await chain.store.delete(pack)
            with pytest.raises(Corrupt):
                await exported(chain)

    asyncio.run(check())
