"""A snapshot read as a volume: over real nodes and a real server of what its volume came from."""

import asyncio
import random
from pathlib import Path

import pytest

from blockstore.errors import Corrupt, QuorumUnavailable, ReadOnly
from blockstore.units import BLOCK_SIZE, MIB
from blockstore.volume.control_messages import to_source
from blockstore.volume.sealed_segment import NodeChannels, SealedSegment
from blockstore.volume.snapshot_content import Content, SealedContent, SnapshotContent, StoredContent
from blockstore.volume.snapshot_volume import SnapshotVolume
from tests.restored import go_on, restored_volume, until_hydrated
from tests.snapshot_source import SnapshotSource
from tests.stack import VOLUME

SOURCE_BLOCKS = 512
BLOCKS = 768
SNAPSHOT = "snap-" + "5" * 17


def random_blocks(numbers: range, seed: int) -> dict[int, bytes]:
    chance = random.Random(seed)
    return {number: chance.randbytes(BLOCK_SIZE) for number in numbers}


async def check(volume: SnapshotVolume, model: bytes) -> None:
    """Whole, and in pieces that begin and end anywhere."""
    assert await volume.read(0, len(model) // BLOCK_SIZE) == model
    chance = random.Random(3)
    for _ in range(30):
        start = chance.randrange(len(model) // BLOCK_SIZE)
        count = chance.randint(1, len(model) // BLOCK_SIZE - start)
        assert await volume.read(start, count) == model[start * BLOCK_SIZE : (start + count) * BLOCK_SIZE]


@pytest.mark.parametrize("hydrated", [False, True])
def test_a_generation_of_a_restored_volume_is_its_own_blocks_over_the_sources(tmp_path: Path, hydrated: bool) -> None:
    async def test() -> None:
        blocks = random_blocks(range(0, SOURCE_BLOCKS, 3), 1)
        size = BLOCKS * BLOCK_SIZE
        async with restored_volume(
            tmp_path, blocks, source_bytes=SOURCE_BLOCKS * BLOCK_SIZE, size_bytes=size
        ) as restored:
            model = restored.source.content(size)
            attempt = await restored.attach()
            if hydrated:
                go_on(attempt, paused=False)
                await until_hydrated(attempt)
            for start, block in random_blocks(range(0, BLOCKS, 5), 2).items():
                await attempt.device.write(start * BLOCK_SIZE, block)
                model[start * BLOCK_SIZE : (start + 1) * BLOCK_SIZE] = block
            await attempt.device.trim(30 * BLOCK_SIZE, 40 * BLOCK_SIZE)
            model[30 * BLOCK_SIZE : 70 * BLOCK_SIZE] = bytes(40 * BLOCK_SIZE)
            sealed = await attempt.sealing.seal(SNAPSHOT, again=False)
            await attempt.sealing.until_known()
            await attempt.device.write(0, bytes(size))  # what comes later is not in it
            for index in range(3):
                await restored.stack.hosted(index).checkpoint()
            channels = NodeChannels()
            where = restored.stack.where().segments[0]
            generation = sealed.segments[0].generation
            segment = SealedSegment(VOLUME, where, BLOCKS, channels, 5.0, generation=generation)
            source = None if hydrated else StoredContent(to_source(restored.source.message), 5.0)
            content = SealedContent([segment], source)
            volume = SnapshotVolume(SnapshotContent("it", size, content, nowhere), 20.0)
            await check(volume, bytes(model))
            with pytest.raises(ReadOnly):
                volume.write(0, bytes(BLOCK_SIZE))
            await volume.close()
            await channels.close()

    asyncio.run(asyncio.wait_for(test(), 100))


async def nowhere() -> Content | None:
    """Nobody knows anything new."""
    return None


def test_a_daemon_that_comes_back_elsewhere_is_found_and_damage_is_told_at_once() -> None:
    async def test() -> None:
        blocks = random_blocks(range(0, 300, 2), 4)
        source = SnapshotSource(blocks, MIB * 2)  # type: ignore[abstract]  # two calls are all that is made
        await source.start()
        stored = StoredContent(to_source(source.message), 2.0)
        asked = 0

        async def find() -> Content | None:
            nonlocal asked
            asked += 1
            stored.client.set_addresses([source.address])
            return None

        volume = SnapshotVolume(SnapshotContent("it", MIB * 2, stored, find), 20.0)
        model = bytes(source.content(MIB * 2))
        assert await volume.read(0, 64) == model[: 64 * BLOCK_SIZE]
        await source.stop()
        reading = asyncio.create_task(check(volume, model))
        while not asked:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.01)
        source.address = "127.0.0.1:0"
        await source.start()
        await reading
        source.error = Corrupt("frame 7 fails its checksum")
        fresh = SnapshotVolume(
            SnapshotContent("it", MIB * 2, StoredContent(to_source(source.message), 2.0), find), 20.0
        )
        began = asyncio.get_running_loop().time()
        with pytest.raises(Corrupt):
            await fresh.read(0, 64)
        assert asyncio.get_running_loop().time() - began < 10
        source.error = None
        assert await fresh.read(0, 64) == model[: 64 * BLOCK_SIZE]
        await source.stop()
        hasty = SnapshotVolume(SnapshotContent("it", MIB * 2, stored, nowhere), 0.5)
        with pytest.raises(QuorumUnavailable):
            await hasty.read(0, 64)
        for each in (volume, fresh, hasty):
            await each.close()

    asyncio.run(asyncio.wait_for(test(), 100))
