"""Rows that say what the tables hold are damaged: the node goes on, and the replica is filled anew from its peers."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from blockstore.errors import CairnError, Corrupt
from blockstore.node.hosted_replica import HostedReplica
from blockstore.storage.check import check_replica
from blockstore.storage.keys import extent_key, number_key
from blockstore.storage.meta import Meta
from blockstore.storage.tables import FILE_NAME, Tables, Writing
from blockstore.units import BLOCK_SIZE, FIRST_GENERATION, MIB, Sequence
from tests.stack import Stack, in_loop, running_stack, until
from tests.table_flips import flip

SIZE = 32 * MIB
BAD = 1

Damage = Callable[[Tables, Writing], object]

DAMAGE: dict[str, Damage] = {
    "present": lambda tables, writing: writing.put(number_key(0), bytes(40), db=tables.present),
    "extents": lambda tables, writing: writing.put(extent_key(FIRST_GENERATION, 0), bytes(48), db=tables.extents),
    "meta": lambda tables, writing: writing.put(b"source", bytes(9), db=tables.meta),
}


def damage(hosted: HostedReplica, name: str) -> None:
    """As a flipped bit leaves it: LMDB does not check its own pages."""
    tables = hosted.store._tables
    tables.change(lambda transaction: DAMAGE[name](tables, transaction))


def sound(hosted: HostedReplica) -> bool:
    """Whether the replica is whole, and can read all that it should hold."""
    try:
        with hosted.store._tables.reading() as transaction:
            _ = Meta(hosted.store._tables, transaction).source
        for extent in hosted.store.delta_extents(Sequence(0)):
            hosted.store.copy_extent(extent)
    except CairnError:
        return False
    return hosted.follower.whole


def says(stack: Stack, index: int) -> str:
    """What the node says is wrong with its replica."""
    (status,) = stack.statuses(index)
    return status.damage


@pytest.mark.parametrize("name", DAMAGE)
def test_a_checkpoint_that_meets_a_damaged_row_has_the_replica_filled_anew(tmp_path: Path, name: str) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1, heartbeat_s=0.1) as stack:
            volume = await stack.open(SIZE)
            content = {number: os.urandom(BLOCK_SIZE) for number in (3, 4, 5, 300, 900)}
            for number, block in content.items():
                await volume.write(number, block)
            await stack.until_all_whole(volume)
            hosted = stack.hosted(BAD)
            await until(lambda: hosted.store.applied == volume.status().commit, "all is in the tables")
            damage(hosted, name)
            assert not sound(hosted)
            for number in (3, 900):
                content[number] = os.urandom(BLOCK_SIZE)
                await volume.write(number, content[number])
            await volume.trim(4, 1)
            content[4] = bytes(BLOCK_SIZE)
            await until(lambda: sound(hosted) or stack.failed(BAD).done(), "the damage is found, and all is copied")
            assert not stack.failed(BAD).done()
            await stack.until_all_applied(volume)
            assert {number: hosted.store.read(number, 1) for number in content} == content
            assert says(stack, BAD) == ""
            assert hosted.store.digest() == stack.hosted(0).store.digest()
            await volume.close()
            path = hosted.store.directory / FILE_NAME
            await stack.stop_node(BAD)
            assert check_replica(path).problems == []

    in_loop(test)


def test_where_too_few_others_are_whole_nothing_is_given_up_and_the_damage_is_told(tmp_path: Path) -> None:
    """And the journal's files do not wait for that replica, or the whole node would stand still."""

    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1, heartbeat_s=0.1, upkeep_s=0.1) as stack:
            volume = await stack.open(SIZE)
            kept, new = os.urandom(BLOCK_SIZE), os.urandom(BLOCK_SIZE)
            await volume.write(3, kept)
            await stack.until_all_whole(volume)
            hosted = stack.hosted(BAD)
            await until(lambda: hosted.store.applied == volume.status().commit, "all is in the tables")
            applied, mark = hosted.store.applied, hosted.store.mark
            await stack.stop_node(2)
            await stack.until_gone(volume, 2)
            damage(hosted, "present")
            await volume.write(4, new)
            await until(lambda: "fails its checksum" in says(stack, BAD), "the damage is told")
            assert hosted.follower.whole
            assert hosted.store.applied == applied
            await until(lambda: hosted.follower.commit >= volume.status().commit, "the commit arrives")
            await until(lambda: hosted.store.mark > mark, "the journal is let go of")
            assert hosted.store.read(3, 2) == kept + new
            with pytest.raises(Corrupt):
                await hosted.checkpoint()
            await stack.stop_node(BAD)  # what its tables could not take is in their tail
            await stack.start_node(BAD)
            assert "fails its checksum" in says(stack, BAD), "nobody counts on it again because it started anew"
            assert stack.hosted(BAD).store.read(3, 1) == kept
            await volume.close()
            await stack.start_node(2)
            volume = await stack.open(SIZE)
            await until(lambda: stack.hosted(BAD).store.applied > applied, "it was filled anew")
            await stack.until_all_know(volume)
            again = stack.hosted(BAD).store
            assert again.read(3, 2) == kept + new
            assert says(stack, BAD) == ""
            note = again.directory / "damage"
            assert not note.exists()
            note.write_text("of before")  # as a crash leaves it that came before it was forgotten
            await until(lambda: not note.exists(), "nobody is filled anew twice for one damage")
            await stack.stop_node(BAD)
            await stack.start_node(BAD)
            assert (says(stack, BAD), stack.hosted(BAD).follower.whole) == ("", True)

    in_loop(test)


def test_a_flipped_bit_in_the_journal_has_the_replica_filled_before_it_counts(tmp_path: Path) -> None:
    """What only the journal holds, as after a power cut: a group that rots before good ones is no torn tail."""

    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=1000) as stack:
            volume = await stack.open(SIZE)
            content = {number: os.urandom(BLOCK_SIZE) for number in (3, 4, 300, 900)}
            for number, block in content.items():
                await volume.write(number, block)
            await stack.until_all_whole(volume)
            await volume.close()
            data, copy = tmp_path / f"node{BAD}", tmp_path / "as-it-was"
            shutil.copytree(data, copy)
            await stack.stop_node(BAD)  # which brings all into the tables; as it was, nothing is there
            shutil.rmtree(data)
            copy.rename(data)
            (path,) = [file for file in (data / "journal").iterdir() if content[4] in file.read_bytes()]
            flip(path, content[4], 2000)
            await stack.start_node(BAD)
            assert not stack.hosted(BAD).follower.whole
            volume = await stack.open(SIZE)
            await stack.until_all_know(volume)
            for _ in range(48):  # every member has its turn, sixteen reads long
                assert await volume.read(3, 2) == content[3] + content[4]
            assert {number: stack.hosted(BAD).store.read(number, 1) for number in content} == content

    in_loop(test)
