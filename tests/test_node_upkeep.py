"""A node finds damage by itself, has it mended by its peers, and keeps its files small."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from blockstore.errors import Corrupt
from blockstore.node.scrub_replica import ReplicaScrub
from blockstore.node.scrubber import Scrubber
from blockstore.storage.keys import extent_key, version_key
from blockstore.storage.replica_store import ReplicaStore
from blockstore.storage.scrub import ScrubReader
from blockstore.units import BLOCK_SIZE, FIRST_GENERATION, MIB, Sequence
from tests.stack import LIMIT_S, in_loop, running_stack, until

SIZE = 32 * MIB


def damage(path: Path, content: bytes) -> None:
    """Flip a byte in the one place of the file where `content` stands."""
    data = path.read_bytes()
    assert data.count(content) == 1
    at = data.index(content) + 100
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
        os.fsync(file.fileno())


def test_a_damaged_block_is_never_shown_and_is_mended_from_a_peer(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            content = os.urandom(BLOCK_SIZE)
            await volume.write(77, content)
            await stack.until_all_whole(volume)
            await until(lambda: stack.hosted(1).follower.commit == volume.status().commit, "the commit arrives")
            await stack.hosted(1).checkpoint()
            damage(next((tmp_path / "node1").rglob("tables.mdb")), content[:4080])
            for _ in range(48):  # every member has its turn, sixteen reads long
                assert await volume.read(77, 1) == content
            await until(lambda: not damaged(stack.hosted(1)), "the block is mended")

    def damaged(hosted: object) -> bool:
        try:
            hosted.store.read(77, 1)  # type: ignore[attr-defined]
        except Exception:
            return True
        return False

    in_loop(test)


def test_scrub_finds_what_nobody_reads(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, scrub_every_s=0.1, upkeep_s=0.1) as stack:
            volume = await stack.open(SIZE)
            content = os.urandom(BLOCK_SIZE)
            await volume.write(5, content)
            await stack.until_all_whole(volume)
            await until(lambda: stack.hosted(2).follower.commit == volume.status().commit, "the commit arrives")
            await stack.hosted(2).checkpoint()
            damage(next((tmp_path / "node2").rglob("tables.mdb")), content[:4080])
            await until(lambda: stack.repaired(2) == 1, "scrub has the block mended")
            assert stack.hosted(2).store.read(5, 1) == content

    in_loop(test)


def test_trimmed_space_goes_back_to_the_file_system(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, upkeep_s=0.2, checkpoint_s=0.2) as stack:
            volume = await stack.open(256 * MIB)
            for at in range(0, 128 * MIB // BLOCK_SIZE, MIB // BLOCK_SIZE):
                await volume.write(at, os.urandom(MIB))
            store = stack.hosted(0).store
            await until(lambda: store.file_bytes() > 128 * MIB and not store.unapplied_bytes, "all is in the tables")
            await volume.trim(0, 256 * MIB // BLOCK_SIZE)
            await volume.write(0, b"x" * BLOCK_SIZE)
            await until(lambda: store.file_bytes() < 8 * MIB, "the file is small again")
            assert await volume.read(0, 2) == b"x" * BLOCK_SIZE + bytes(BLOCK_SIZE)

    in_loop(test)


def test_a_checkpoint_waits_for_four_times_as_much_of_small_writes(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_bytes=MIB, checkpoint_s=600.0) as stack:
            volume = await stack.open(SIZE)
            store = stack.hosted(0).store
            blocks = 3 * MIB // BLOCK_SIZE
            await asyncio.gather(*(volume.write(2 * number, os.urandom(BLOCK_SIZE)) for number in range(blocks)))
            await until(lambda: stack.hosted(0).follower.commit == volume.status().commit, "all is known as committed")
            assert store.unapplied_bytes > 3 * MIB
            await volume.write(0, os.urandom(MIB))
            await until(lambda: store.unapplied_bytes < MIB, "a MiB in a row makes it due")

    in_loop(test)


def lose_entry(store: ReplicaStore, number: int) -> None:
    """The index entry of a block is gone from the tables, and nothing else, as after a flipped bit."""
    key = version_key(number, FIRST_GENERATION)
    tables = store._tables
    assert tables.change(lambda transaction: transaction.delete(key, db=tables.index))


def sound(store: ReplicaStore) -> bool:
    """Whether the tables hold all that they say."""
    try:
        for extent in store.delta_extents(Sequence(0)):
            store.copy_extent(extent)
    except Corrupt:
        return False
    return True


def test_a_lost_entry_is_never_read_as_zeroes_and_has_the_replica_filled_anew(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.2) as stack:
            volume = await stack.open(SIZE)
            content = {number: os.urandom(BLOCK_SIZE) for number in (3, 300, 301, 900)}
            for number, block in content.items():
                await volume.write(number, block)
            await stack.until_all_whole(volume)
            await until(lambda: stack.hosted(1).follower.commit == volume.status().commit, "the commit arrives")
            store = stack.hosted(1).store
            await stack.hosted(1).checkpoint()
            lose_entry(store, 300)
            for turn in range(48):  # every member has its turn, sixteen reads long
                assert await volume.read(300, 1) == content[300]
                content[900] = os.urandom(BLOCK_SIZE)
                await volume.write(900, content[900])
                await volume.trim(301 if turn % 2 else 300 + turn, 1)
                content[301] = content[300 + turn] = bytes(BLOCK_SIZE) if turn % 2 or turn == 1 else content[301]
                await volume.write(300, content[300])
            await until(lambda: sound(store), "everything was copied")
            await stack.until_all_know(volume)
            await stack.hosted(1).checkpoint()
            assert {number: store.read(number, 1) for number in content} == content

    in_loop(test)


def test_a_lost_entry_in_an_idle_volume_is_found_by_scrub_and_filled_anew(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, scrub_every_s=0.1, upkeep_s=0.1, checkpoint_s=0.1) as stack:
            volume = await stack.open(SIZE)
            content = os.urandom(BLOCK_SIZE)
            await volume.write(5, content)
            await stack.until_all_whole(volume)
            hosted = stack.hosted(2)
            await until(lambda: hosted.store.applied == volume.status().commit, "all is in the tables")
            lose_entry(hosted.store, 5)
            assert not sound(hosted.store)
            await until(lambda: hosted.follower.whole and sound(hosted.store), "scrub finds it, and all is copied")
            assert hosted.store.read(5, 1) == content

    in_loop(test)


def test_a_lost_entry_stays_where_too_few_others_are_whole(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1) as stack:
            volume = await stack.open(SIZE)
            content = os.urandom(BLOCK_SIZE)
            await volume.write(5, content)
            await stack.until_all_whole(volume)
            hosted = stack.hosted(1)
            await until(lambda: hosted.store.applied == volume.status().commit, "all is in the tables")
            await stack.stop_node(2)
            await stack.until_gone(volume, 2)
            lose_entry(hosted.store, 5)
            for _ in range(48):
                assert await volume.read(5, 1) == content
            await volume.write(6, content)
            assert hosted.follower.whole, "two of three members are left, and one of them gave up its log"
            await stack.start_node(2)
            await volume.close()
            volume = await stack.open(SIZE)  # which tells the nodes where the others are now
            await stack.until_all_whole(volume)
            while not sound(hosted.store):
                assert await volume.read(5, 1) == content

    in_loop(test)


def test_a_replica_that_is_deleted_while_it_is_scrubbed_is_no_failure_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, closed, scrubbed = threading.Event(), threading.Event(), asyncio.Event()
    extents, step = ScrubReader.extents, Scrubber._step

    def list_when_closed(reader: ScrubReader, first: int, limit: int) -> list[int]:
        if "node1" in reader._tables.path.parts:
            listed.set()
            assert closed.wait(LIMIT_S)
        return extents(reader, first, limit)

    async def step_and_tell(scrubber: Scrubber, scrub: ReplicaScrub) -> None:
        await step(scrubber, scrub)
        if closed.is_set() and scrub.hosted.closed:
            scrubbed.set()

    async def test() -> None:
        async with running_stack(tmp_path, scrub_every_s=0.1, upkeep_s=0.1) as stack:
            await stack.until_all_whole(await stack.open(SIZE))
            monkeypatch.setattr(ScrubReader, "extents", list_when_closed)
            monkeypatch.setattr(Scrubber, "_step", step_and_tell)
            await until(listed.is_set, "scrub lists what there is")
            await stack.delete(1)
            closed.set()
            await until(scrubbed.is_set, "scrub is done with what was deleted")
            for _ in range(10):
                await asyncio.sleep(0)  # what it made of that is known some turns of the loop later
            assert not any(stack.failed(index).done() for index in range(3))

    in_loop(test)


def test_scrub_has_a_damaged_list_of_extents_filled_anew(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, scrub_every_s=0.1, upkeep_s=0.1, checkpoint_s=0.1) as stack:
            volume = await stack.open(SIZE)
            await volume.write(5, os.urandom(BLOCK_SIZE))
            await stack.until_all_whole(volume)
            hosted = stack.hosted(1)
            await until(lambda: hosted.store.applied == volume.status().commit, "all is in the tables")
            tables, key = hosted.store._tables, extent_key(FIRST_GENERATION, 0)
            tables.change(lambda transaction: transaction.put(key, bytes(48), db=tables.extents))
            assert not sound(hosted.store)
            await until(lambda: hosted.follower.whole and sound(hosted.store), "scrub finds it, and all is copied")
            assert not stack.failed(1).done()

    in_loop(test)
