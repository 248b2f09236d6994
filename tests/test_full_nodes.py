"""Nodes whose disks are full, under a volume that is attached: who waits, who is refused, and how it goes on."""

import asyncio
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from blockstore.errors import NoSpace
from blockstore.units import BLOCK_SIZE, MIB
from blockstore.volume.open_volume import OpenVolume
from tests.crash.small_disk import SmallDisk
from tests.file_limits import file_size_limit
from tests.stack import Stack, in_loop, running_stack, until

SIZE = 256 * MIB
#: For the first files of a journal, and some more.
DISK = 192 * MIB
#: Small enough that tables of some thousand blocks do not fit; the journal's first groups do.
FEW_BYTES = MIB // 2
MANY_BLOCKS = 16_384
#: With one, each block that is zeroed leaves an entry: much to be written into the tables, and little into the journal.
SOURCE = b"snap-0"
BLOCK = b"x" * BLOCK_SIZE


def fill_up(disk: SmallDisk) -> None:
    """Leave no room."""
    with (disk.path / "filler").open("ab", buffering=0) as filler:
        while True:
            try:
                filler.write(bytes(MIB))
            except OSError:
                return


def full(volume: OpenVolume) -> list[bool]:
    return [member.full for member in volume.status().members]


async def becomes_full(stack: Stack, volume: OpenVolume, disk: SmallDisk) -> None:
    fill_up(disk)
    await until(lambda: full(volume)[0], "the front-end hears of the full disk")


async def is_held(volume: OpenVolume, write: "asyncio.Future[None]") -> None:
    await until(lambda: volume.status().held == 1, "the write is held")
    assert not write.done()


def test_one_full_node_and_one_that_is_away_hold_a_write_until_that_one_is_back(tmp_path: Path) -> None:
    async def test() -> None:
        with SmallDisk(tmp_path, DISK, 0) as disk:
            async with running_stack(tmp_path, disks={0: disk.path}, heartbeat_s=0.1) as stack:
                volume = await stack.open(SIZE)
                await volume.write(0, BLOCK)
                await becomes_full(stack, volume, disk)
                await volume.write(0, BLOCK)  # the other two have room
                await stack.stop_node(2)
                await until(lambda: not volume.status().members[2].connected, "the front-end hears that it is gone")
                write = volume.write(1, BLOCK)
                await is_held(volume, write)
                await volume.trim(2, 1)  # with the node that is full: its journal has room
                assert bytes(await volume.read(0, 2)) == BLOCK + bytes(BLOCK_SIZE)
                assert "full: node-" in volume.status().lacks_room
                await stack.start_node(2)
                await write
                await until(
                    lambda: volume.status().lacks_room == "" and full(volume)[0], "one is full, which is no lack"
                )

    in_loop(test)


def test_a_held_write_goes_on_where_the_full_node_has_room_again(tmp_path: Path) -> None:
    async def test() -> None:
        with SmallDisk(tmp_path, DISK, 0) as disk:
            async with running_stack(tmp_path, disks={0: disk.path}, heartbeat_s=0.1) as stack:
                volume = await stack.open(SIZE)
                await becomes_full(stack, volume, disk)
                await stack.stop_node(2)
                await until(lambda: not volume.status().members[2].connected, "the front-end hears that it is gone")
                write = volume.write(1, BLOCK)
                await is_held(volume, write)
                disk.make_room()
                await write
                assert not volume.status().members[2].connected
                assert bytes(await volume.read(1, 1)) == BLOCK

    in_loop(test)


def test_room_on_one_of_two_full_nodes_is_enough(tmp_path: Path) -> None:
    async def test() -> None:
        with ExitStack() as mounted:
            disks = []
            for name in ("first", "second"):
                (tmp_path / name).mkdir()
                disks.append(mounted.enter_context(SmallDisk(tmp_path / name, DISK, 0)))
            paths = {index: disk.path for index, disk in enumerate(disks)}
            async with running_stack(tmp_path, disks=paths, heartbeat_s=0.1) as stack:
                volume = await stack.open(SIZE)
                await volume.write(0, BLOCK)
                for disk in disks:
                    fill_up(disk)
                await until(lambda: full(volume) == [True, True, False], "the front-end hears of the full disks")
                with pytest.raises(NoSpace):
                    await volume.write(1, BLOCK)
                assert bytes(await volume.read(0, 2)) == BLOCK + bytes(BLOCK_SIZE)
                disks[0].make_room()
                await until(lambda: full(volume) == [False, True, False], "one has room again")
                await volume.write(1, BLOCK)
                assert bytes(await volume.read(0, 2)) == 2 * BLOCK

    in_loop(test)


@pytest.mark.parametrize("reserve_bytes", [0, MIB])
def test_tables_that_cannot_grow_refuse_writes_and_take_them_again_with_nothing_lost(
    tmp_path: Path, reserve_bytes: int
) -> None:
    """A limit that the disk itself knows nothing of: a checkpoint finds it, and so does the ballast."""

    async def test() -> None:
        async with running_stack(
            tmp_path, source=SOURCE, reserve_bytes=reserve_bytes, heartbeat_s=0.05, checkpoint_s=0.1
        ) as stack:
            volume = await stack.open(SIZE)
            await volume.write(0, BLOCK)
            with ExitStack() as lifted:
                lifted.enter_context(file_size_limit(FEW_BYTES))
                await volume.zero(1, MANY_BLOCKS, allocate=True)
                await until(
                    lambda: all(full(volume)) and all(stack._nodes[index].node.full for index in range(3)),
                    "every node says that it is full",
                )
                with pytest.raises(NoSpace, match=r"full: node-.*free space"):
                    await volume.write(0, b"y" * BLOCK_SIZE)
                await volume.trim(MANY_BLOCKS, 1)
                assert bytes(await volume.read(0, 2)) == BLOCK + bytes(BLOCK_SIZE)
                async with AsyncExitStack() as idle:  # a write that the limit cut short is told by the limit
                    for index in range(3):
                        await idle.enter_async_context(stack.hosted(index).reading_tables())
                    lifted.close()
            await until(lambda: not any(full(volume)), "every node has room again")
            await volume.write(1, BLOCK)
            await until(lambda: not any(stack.hosted(index).dirty_since for index in range(3)), "all is in the tables")
            assert bytes(await volume.read(0, 3)) == 2 * BLOCK + bytes(BLOCK_SIZE)
            assert not any(stack.failed(index).done() for index in range(3))

    in_loop(test)


def test_a_merge_that_finds_no_room_waits_for_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, source=SOURCE, heartbeat_s=0.05, upkeep_s=3600) as stack:
            volume = await stack.open(SIZE)
            await volume.zero(0, MANY_BLOCKS, allocate=True)
            sealed = await volume.seal(b"snap-1")
            await volume.zero(0, MANY_BLOCKS, allocate=True)
            hosted = stack.hosted(0)
            await stack.until_all_whole(volume)
            await until(lambda: hosted.follower.commit == volume.status().commit, "all is committed here")
            await volume.unpin(sealed.generation, b"snap-1")
            await until(lambda: hosted.follower.commit == volume.status().commit, "all is committed here")
            await hosted.checkpoint()
            with file_size_limit(FEW_BYTES):
                with pytest.raises(NoSpace):
                    await hosted.in_thread(hosted.store.merge)
                assert not stack.failed(0).done()
                assert bytes(await volume.read(0, 1)) == bytes(BLOCK_SIZE)
            assert await hosted.in_thread(hosted.store.merge)
            assert not hosted.store.sealed.describe().sealed

    in_loop(test)
