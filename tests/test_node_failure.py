"""A node whose disk fails ends, and comes back as a copy to be filled (docs/replication.md, failed syncs)."""

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockstore.config import EXIT_DO_NOT_RESTART
from blockstore.log import UNKNOWN_FLOOR
from blockstore.storage.journal_disk import Disk
from blockstore.storage.node_store import NodeStore
from blockstore.units import BLOCK_SIZE, MIB
from tests.stack import LIMIT_S, in_loop, running_stack

SIZE = 16 * MIB


@pytest.fixture
def break_syncs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """From a call on, every sync of a journal below the directory fails as a dying disk's does."""

    def begin(directory: Path) -> None:
        sound = Disk.sync

        def sync(disk: Disk, fd: int) -> None:
            if Path(os.readlink(f"/proc/self/fd/{fd}")).is_relative_to(directory):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            sound(disk, fd)

        monkeypatch.setattr(Disk, "sync", sync)

    return begin


def test_after_a_failed_sync_the_node_ends_and_its_replicas_are_filled_anew(
    tmp_path: Path, break_syncs: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            await volume.write(0, b"a" * BLOCK_SIZE)
            break_syncs(tmp_path / "node1")
            await volume.write(1, b"b" * BLOCK_SIZE)
            assert await asyncio.wait_for(asyncio.shield(stack.failed(1)), LIMIT_S) == 1
            await stack.stop_node(1)
            monkeypatch.undo()
            await volume.write(2, b"c" * BLOCK_SIZE)
            await stack.start_node(1)
            assert not stack.hosted(1).follower.whole
            await stack.until_all_whole(volume)
            assert not list((tmp_path / "node1").rglob("suspect"))
            await stack.stop_node(0)
            assert await volume.read(0, 3) == b"".join(letter * BLOCK_SIZE for letter in (b"a", b"b", b"c"))

    in_loop(test)


def test_tables_that_were_taken_away_are_filled_anew(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            await volume.write(0, b"a" * BLOCK_SIZE)
            await stack.until_all_whole(volume)
            await stack.stop_node(1)
            await volume.write(1, b"b" * BLOCK_SIZE)
            tables = tmp_path / "node1" / "replicas" / stack.replicas[1] / "tables.mdb"
            tables.rename(tmp_path / "aside")
            await stack.start_node(1)
            filling = stack.hosted(1).follower.filling
            assert filling is not None
            assert filling.floor == UNKNOWN_FLOOR
            await stack.until_all_whole(volume)
            assert not list((tmp_path / "node1").rglob("suspect"))
            await stack.stop_node(1)  # and the start after that finds nothing amiss
            await stack.start_node(1)
            assert stack.hosted(1).follower.whole
            await stack.until_all_whole(volume)
            await stack.stop_node(0)
            assert await volume.read(0, 2) == b"a" * BLOCK_SIZE + b"b" * BLOCK_SIZE

    in_loop(test)


def test_where_not_even_that_can_be_noted_nothing_restarts_the_node(
    tmp_path: Path, break_syncs: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(store: NodeStore, replica: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            monkeypatch.setattr(NodeStore, "mark_suspect", cannot)
            break_syncs(tmp_path / "node2")
            await volume.write(1, b"b" * BLOCK_SIZE)
            assert await asyncio.wait_for(asyncio.shield(stack.failed(2)), LIMIT_S) == EXIT_DO_NOT_RESTART

    in_loop(test)
