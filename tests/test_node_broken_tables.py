"""Tables that do not open keep no node from starting: that replica is filled anew, or lost; the node's others serve."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockstore.domain import ReplicaAddress, ReplicaId, make_id
from blockstore.errors import Conflict, Corrupt
from blockstore.log import LogImage
from blockstore.node.node import open_sound
from blockstore.storage.meta import FORMAT, Meta
from blockstore.storage.node_store import NodeStore
from blockstore.storage.tables import FILE_NAME, PAGE_SIZE, Tables
from blockstore.units import BLOCK_SIZE, MIB
from blockstore.volume.open_volume import OpenVolume
from tests.stack import SEGMENT, VOLUME, Stack, in_loop, running_stack, until
from tests.storage_model import address

SIZE = 32 * MIB
BAD = 1
OTHER = ReplicaAddress(VOLUME, SEGMENT, ReplicaId(make_id("rep", b"the other")))


def of_row(name: bytes) -> Callable[[Path], None]:
    """The row of `meta` has a flipped bit."""

    def damage(path: Path) -> None:
        tables = Tables(path, create=False)
        with tables.reading() as transaction:
            value = bytes(transaction.get(name, db=tables.meta) or b"")
        assert value
        data = path.read_bytes()
        tables.close()
        assert data.count(name + value) >= 1
        path.write_bytes(data.replace(name + value, name + bytes([value[0] ^ 1]) + value[1:]))

    return damage


def no_tables(path: Path) -> None:
    path.write_bytes(os.urandom(len(path.read_bytes())))


def without_its_end(path: Path) -> None:
    """As a file system that lost the last writes leaves it: what points there ends a process by SIGBUS."""
    os.truncate(path, 4 * PAGE_SIZE)


def with_roots_of_rubbish(path: Path) -> None:
    with path.open("r+b") as file:
        for at in range(2 * PAGE_SIZE, path.stat().st_size, PAGE_SIZE):
            file.seek(at)
            file.write(b"\xa5" * 64)


DAMAGE = {
    "address": of_row(b"address"),
    "applied": of_row(b"applied"),
    "format": of_row(b"format"),
    "mark": of_row(b"mark"),
    "no tables at all": no_tables,
    "cut short": without_its_end,
    "rubbish": with_roots_of_rubbish,
}


async def until_applied(stack: Stack, volume: OpenVolume, index: int) -> None:
    await stack.until_all_whole(volume)
    hosted = stack.hosted(index)
    await until(lambda: hosted.store.applied == volume.status().commit, "all is in the tables")


@pytest.mark.parametrize("name", DAMAGE)
def test_the_node_starts_and_the_replica_is_filled_anew(tmp_path: Path, name: str) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1, upkeep_s=0.1) as stack:
            volume = await stack.open(SIZE)
            content = {number: os.urandom(BLOCK_SIZE) for number in (3, 4, 300, 900)}
            for number, block in content.items():
                await volume.write(number, block)
            await until_applied(stack, volume, BAD)
            await stack.create_at(BAD, OTHER)
            directory = stack.hosted(BAD).store.directory
            await stack.stop_node(BAD)
            DAMAGE[name](directory / FILE_NAME)
            content[4] = os.urandom(BLOCK_SIZE)
            await volume.write(4, content[4])
            await stack.start_node(BAD)
            assert stack.find(BAD, OTHER).follower.whole, "the other replica of that node serves"
            hosted = stack.hosted(BAD)
            await stack.until_all_applied(volume)
            assert hosted.store.digest() == stack.hosted(0).store.digest()
            assert {number: hosted.store.read(number, 1) for number in content} == content
            kept = directory / (FILE_NAME + ".damaged")
            await until(lambda: not kept.exists(), "what was set aside goes once the replica is whole")

    in_loop(test)


def test_it_is_none_of_the_quorum_before_it_is_filled(tmp_path: Path) -> None:
    """Where the others are gone as well, nothing is made of the empty tables, and the damaged file stays."""

    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1, upkeep_s=0.1) as stack:
            volume = await stack.open(SIZE)
            await volume.write(3, os.urandom(BLOCK_SIZE))
            await until_applied(stack, volume, BAD)
            await volume.close()
            directory = stack.hosted(BAD).store.directory
            for index in range(3):
                await stack.stop_node(index)
            before = (directory / FILE_NAME).read_bytes()
            of_row(b"applied")(directory / FILE_NAME)
            await stack.start_node(BAD)
            await stack.start_node(2)
            assert not stack.hosted(BAD).follower.whole
            volume = await stack.open(SIZE, served=False)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(volume.wait_until_served(), 1.0)
            kept = (directory / (FILE_NAME + ".damaged")).read_bytes()
            assert len(kept) == len(before)

    in_loop(test)


def test_tables_of_another_program_are_left_as_they_are(tmp_path: Path) -> None:
    node = NodeStore.open(tmp_path)
    store = node.create_replica(address(), LogImage())
    store._tables.change(lambda transaction: Meta(store._tables, transaction).put(b"format", FORMAT + b"0"))
    store.close()
    with pytest.raises(Conflict, match="run the one that wrote them"):
        open_sound(node, node.replicas())
    assert not node.lacks_tables(address().replica)
    node.close()


def rubbish_without_address(directory: Path) -> None:
    (directory / FILE_NAME).write_bytes(b"rubbish")
    (directory / "address").unlink()


def rubbish_with_anothers_address(directory: Path) -> None:
    (directory / FILE_NAME).write_bytes(b"rubbish")
    (directory / "address").write_text(f"{OTHER.volume} {OTHER.segment} {OTHER.replica}")


def no_tables_and_no_address(directory: Path) -> None:
    (directory / FILE_NAME).unlink()
    (directory / "address").write_bytes(b"\xff\xfe")


def no_directory(directory: Path) -> None:
    directory.rename(directory.with_name("elsewhere"))
    directory.write_bytes(b"a file")


@pytest.mark.parametrize(
    "damage", [rubbish_without_address, rubbish_with_anothers_address, no_tables_and_no_address, no_directory]
)
def test_of_a_replica_that_nothing_can_be_made_of_the_node_has_none(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Not an empty one either: it would have a vote, and forgotten what it promised."""
    node = NodeStore.open(tmp_path)
    for each in (address(), OTHER):
        node.create_replica(each, LogImage()).close()
    directory = tmp_path / "replicas" / address().replica
    damage(directory)
    opened = open_sound(node, node.replicas())
    assert list(opened) == [OTHER.replica] == list(node.replicas())
    assert node.broken() == {directory.with_name(f"{directory.name}.broken"): address().replica}
    opened[OTHER.replica].close()
    node.close()


def test_a_process_that_died_while_it_opened_tables_looks_at_them_first(tmp_path: Path) -> None:
    node = NodeStore.open(tmp_path)
    node.create_replica(address(), LogImage()).close()
    directory = tmp_path / "replicas" / address().replica
    with_roots_of_rubbish(directory / FILE_NAME)
    (directory / "opening").touch()
    with pytest.raises(Corrupt, match="damaged"):
        node.open_replica(address().replica)
    assert open_sound(node, node.replicas()) == {}
    assert node.lacks_tables(address().replica)
    assert not (directory / "opening").exists()
    node.close()


def test_sound_tables_open_again_after_such_a_death(tmp_path: Path) -> None:
    node = NodeStore.open(tmp_path)
    node.create_replica(address(), LogImage()).close()
    directory = tmp_path / "replicas" / address().replica
    (directory / "opening").touch()
    open_sound(node, node.replicas())[address().replica].close()
    assert not (directory / "opening").exists()
    node.close()


def test_the_first_file_that_was_set_aside_is_the_one_that_is_kept(tmp_path: Path) -> None:
    node = NodeStore.open(tmp_path)
    node.create_replica(address(), LogImage()).close()
    path = tmp_path / "replicas" / address().replica / FILE_NAME
    path.write_bytes(b"first")
    node.set_aside(address().replica)
    path.write_bytes(b"second")
    node.set_aside(address().replica)
    assert path.with_name(FILE_NAME + ".damaged").read_bytes() == b"first"
    assert node.forget_set_aside(address().replica)
    assert not node.forget_set_aside(address().replica)
    node.close()
