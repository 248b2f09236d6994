"""Scrub between real nodes: damage is found and mended, a difference is told and left alone, and no alarm is false."""

import asyncio
import os
import random
from pathlib import Path

import pytest

from blockstore.config import NodeSettings
from blockstore.errors import CairnError, Corrupt
from blockstore.node import scrub_replica
from blockstore.node.hosted_replica import HostedReplica
from blockstore.record import block_checksum
from blockstore.storage.check import check_replica
from blockstore.storage.keys import HEAD_SIZE, data_value, extent_key, version_key
from blockstore.storage.tables import FILE_NAME, Writing
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, FIRST_GENERATION, MAX_GENERATION, MIB, Generation
from blockstore.volume.open_volume import OpenVolume
from tests.stack import Stack, in_loop, running_stack, until
from tests.table_flips import FLIPS, READ_FLIPS

SIZE = 32 * MIB
#: Next to each other in the ring of members.
OWN, PEER, THIRD = 0, 1, 2


@pytest.fixture(autouse=True)
def rounds_follow_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes here checkpoint each tenth of a second, not every five."""
    monkeypatch.setattr(scrub_replica, "ROUND_WAITS_S", (0.05, 0.1, 0.2, 0.3, 0.3))


def sound(hosted: HostedReplica) -> bool:
    """Whether the replica is whole, its tables say so, and all their rows are good."""
    try:
        for extent in hosted.store.scrub.extents(0, 1000):
            hosted.store.scrub.view(extent)
    except CairnError:
        return False
    return hosted.follower.whole


def reads(hosted: HostedReplica, number: int, content: bytes) -> bool:
    try:
        return hosted.store.read(number, len(content) // BLOCK_SIZE) == content
    except CairnError:
        return False


def plant(hosted: HostedReplica, number: int, content: bytes, sequence: int, generation: int = 1) -> None:
    """Another content of a block, which passes every checksum."""
    tables, key = hosted.store._tables, version_key(number, generation)

    def write(transaction: Writing) -> None:
        checksum = block_checksum(content, number, generation, sequence)
        transaction.put(key, data_value(sequence, checksum, content), db=tables.index)
        transaction.put(key, content[:HEAD_SIZE], db=tables.data)

    tables.change(write)


async def some_content(stack: Stack, volume: OpenVolume) -> dict[int, bytes]:
    content = {number: os.urandom(BLOCK_SIZE) for number in (3, 5, 300, 301, 900)}
    for number, block in content.items():
        await volume.write(number, block)
    await stack.until_all_applied(volume)
    return content


def test_replicas_that_are_sound_are_found_to_be_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1, upkeep_s=0.1) as stack:
            volume = await stack.open(SIZE)
            await some_content(stack, volume)
            await volume.seal(b"snap-1")
            await volume.write(5, os.urandom(BLOCK_SIZE))
            await volume.trim(300, 1)
            await stack.until_all_applied(volume)
            for index in range(3):
                found = await stack.scrub(index)
                assert (found.extents_done, found.extents_compared) == (3, 3)
                assert (found.extents_damaged, found.extents_differing, found.extents_not_compared) == (0, 0, 0)
                assert found.ended_ms >= found.began_ms > 0
                assert not found.why

    in_loop(test)


@pytest.mark.parametrize("name", FLIPS)
def test_a_flipped_bit_is_found_and_mended_whatever_table_it_is_in(tmp_path: Path, name: str) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1, upkeep_s=0.1) as stack:
            volume = await stack.open(SIZE)
            content = await some_content(stack, volume)
            hosted = stack.hosted(OWN)
            FLIPS[name](hosted.store, 5, content[5])
            assert not sound(hosted)
            found = await stack.scrub(OWN)
            assert found.extents_damaged or found.why
            while not sound(hosted):  # a row under a wrong key is found once the rest was filled anew
                await until(lambda: hosted.follower.whole or stack.failed(OWN).done(), "it is filled anew")
                assert not stack.failed(OWN).done()
                again = await stack.scrub(OWN)
            again = await stack.scrub(OWN)
            assert (again.extents_damaged, again.extents_differing, again.why) == (0, 0, "")
            assert {number: hosted.store.read(number, 1) for number in content} == content
            assert hosted.store.digest() == stack.hosted(PEER).store.digest()
            await volume.close()
            await stack.stop_node(OWN)
            assert check_replica(hosted.store.directory / FILE_NAME).problems == []

    in_loop(test)


def test_two_that_are_damaged_at_once_both_stay_and_mend_each_others_bad_blocks(tmp_path: Path) -> None:
    """Each has lost an entry that only two members hold yet: neither may be emptied while the other is not sound."""

    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1, upkeep_s=0.1, heartbeat_s=0.1) as stack:
            volume = await stack.open(SIZE)
            content = await some_content(stack, volume)
            own, peer = stack.hosted(OWN), stack.hosted(PEER)
            FLIPS["data, the block"](own.store, 5, content[5])
            FLIPS["data, the block"](peer.store, 300, content[300])
            for index in (OWN, PEER):
                await stack.scrub(index)
                await until(lambda index=index: stack.repaired(index) == 1, "what the other one had good is mended")  # type: ignore[misc]
            await volume.close()  # whoever is told of one first has that one filled anew, before it hears of the other
            FLIPS["index, key"](own.store, 3, content[3])
            FLIPS["index, key"](peer.store, 900, content[900])
            for index, number in ((OWN, 3), (PEER, 900)):
                with pytest.raises(Corrupt) as found:
                    stack.hosted(index).store.read(number, 1)
                stack.repair(index, found.value)
            volume = await stack.open(SIZE)
            for number, block in content.items():
                for _ in range(48):  # every member has its turn, sixteen reads long
                    assert await volume.read(number, 1) == block
            await volume.write(7, content[5])
            assert [bool(stack.statuses(index)[0].damage) for index in (OWN, PEER)] == [True, True]
            assert (own.follower.whole, peer.follower.whole) == (True, True)

    in_loop(test)


@pytest.mark.parametrize("name", READ_FLIPS)
def test_a_read_that_meets_a_flipped_bit_is_answered_by_a_peer_and_has_it_mended(tmp_path: Path, name: str) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1, upkeep_s=0.1) as stack:
            volume = await stack.open(SIZE)
            content = await some_content(stack, volume)
            hosted = stack.hosted(OWN)
            FLIPS[name](hosted.store, 5, content[5])
            assert not sound(hosted)
            for _ in range(64):  # every member has its turn, sixteen reads long
                assert await volume.read(4, 2) == bytes(BLOCK_SIZE) + content[5]
            await until(lambda: reads(hosted, 4, bytes(BLOCK_SIZE) + content[5]), "what is damaged is mended")

    in_loop(test)


def test_rows_that_nothing_reads_are_compared_with_each_other(tmp_path: Path) -> None:
    """A row of `data` that no entry has; an entry that no row of `extents` tells of, so no delta would bring it."""

    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1, upkeep_s=0.1) as stack:
            volume = await stack.open(SIZE)
            await some_content(stack, volume)
            hosted = stack.hosted(OWN)
            tables = hosted.store._tables
            stray, row = version_key(7, FIRST_GENERATION), extent_key(FIRST_GENERATION, 1)
            tables.change(lambda transaction: transaction.put(stray, bytes(HEAD_SIZE), db=tables.data))
            assert not sound(hosted)
            await stack.scrub(OWN)
            await until(lambda: sound(hosted), "it was filled anew")
            assert tables.change(lambda transaction: transaction.delete(row, db=tables.extents))
            assert not sound(hosted)
            await stack.scrub(OWN)
            await until(lambda: sound(hosted), "it was filled anew")
            await stack.until_all_whole(volume)

    in_loop(test)


@pytest.mark.parametrize("older", [False, True])
def test_a_difference_is_told_with_its_place_and_left_alone(tmp_path: Path, older: bool) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1) as stack:
            volume = await stack.open(SIZE)
            content = await some_content(stack, volume)
            right = stack.hosted(PEER).store.scrub.shown(0, MAX_GENERATION).blocks[5].sequence
            wrong = os.urandom(BLOCK_SIZE)
            plant(stack.hosted(PEER), 5, wrong, right - 1 if older else right)
            found = await stack.scrub(OWN)
            (difference,) = found.divergences
            assert (difference.block, difference.generation, difference.peer) == (
                5,
                MAX_GENERATION,
                stack.replicas[PEER],
            )
            assert difference.sequence == stack.hosted(OWN).store.applied.sequence
            assert ("the other one lacks a committed write" in difference.what) == older
            assert found.extents_differing == 1
            assert found.extents_compared == 2
            assert (await stack.scrub(THIRD)).extents_differing == 0, "that one was compared with the first"
            assert stack.hosted(OWN).store.read(5, 1) == content[5]
            assert stack.hosted(PEER).store.read(5, 1) == wrong
            await stack.stop_node(OWN)
            await stack.start_node(OWN)
            assert stack.scrubbed(OWN).extents_differing == 1, "it is known after a restart as well"
            plant(stack.hosted(PEER), 5, content[5], right)
            await until(lambda: stack.hosted(OWN).follower.whole, "it is back")
            assert (await stack.scrub(OWN)).extents_differing == 0

    in_loop(test)


def test_a_difference_in_a_snapshot_alone_is_told(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1) as stack:
            volume = await stack.open(SIZE)
            await some_content(stack, volume)
            await volume.seal(b"snap-1")
            await volume.write(5, os.urandom(BLOCK_SIZE))
            await stack.until_all_applied(volume)
            sequence = stack.hosted(PEER).store.scrub.shown(0, FIRST_GENERATION).blocks[5].sequence
            plant(stack.hosted(PEER), 5, os.urandom(BLOCK_SIZE), sequence)
            assert stack.hosted(OWN).store.digest() == stack.hosted(PEER).store.digest()
            (difference,) = (await stack.scrub(OWN)).divergences
            assert (difference.block, difference.generation) == (5, FIRST_GENERATION)

    in_loop(test)


def test_what_only_damaged_replicas_have_stays_and_is_told(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1) as stack:
            volume = await stack.open(SIZE)
            content = await some_content(stack, volume)
            await volume.close()
            for index in (PEER, THIRD):
                await stack.stop_node(index)
            hosted = stack.hosted(OWN)
            FLIPS["data, the block"](hosted.store, 5, content[5])
            found = await stack.scrub(OWN)
            assert (found.extents_done, found.extents_damaged, found.extents_bad) == (3, 1, 1)
            assert found.extents_not_compared == 2
            assert found.why
            assert hosted.store.read(300, 1) == content[300]
            await stack.start_node(PEER)
            assert (await stack.scrub(OWN)).extents_bad == 0, "a detached volume's replicas are mended as well"
            assert hosted.store.read(5, 1) == content[5]

    in_loop(test)


def test_a_pass_goes_on_where_it_was_after_a_restart(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1) as stack:
            volume = await stack.open(SIZE)
            for extent in range(16):
                await volume.write(extent * EXTENT_BLOCKS, os.urandom(BLOCK_SIZE))
            await stack.until_all_applied(volume)
            number = await stack.begin_scrub(OWN, rate_bytes=16 * 1024)  # seconds for each step
            await until(lambda: stack.scrubbed(OWN).extents_done >= 4, "it is under way")
            assert await stack.begin_scrub(OWN) == number, "who asks again joins it"
            done = stack.scrubbed(OWN).extents_done
            await stack.stop_node(OWN)
            await stack.start_node(OWN)
            assert stack.scrubbed(OWN).running
            assert done <= stack.scrubbed(OWN).extents_done < 16
            stack.lift_scrub_rate(OWN)
            await until(lambda: stack.scrubbed(OWN).ended == number, "it is over")
            assert stack.scrubbed(OWN).extents_done == 16
            assert stack.scrubbed(OWN).ended_ms

    in_loop(test)


def test_a_note_of_progress_that_cannot_be_read_is_no_matter(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1) as stack:
            volume = await stack.open(SIZE)
            await some_content(stack, volume)
            note = stack.hosted(OWN).store.directory / "scrub"
            await stack.stop_node(OWN)
            note.write_text('{"due_ms": 3, "latest": {"numbers": 1}}')
            await stack.start_node(OWN)
            await until(lambda: stack.hosted(OWN).follower.whole, "it is back")
            assert (await stack.scrub(OWN)).extents_done == 3

    in_loop(test)


def test_the_schedule_begins_by_itself_and_asks_where_the_members_are(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1, scrub_every_s=0.2) as stack:
            volume = await stack.open(SIZE)
            await some_content(stack, volume)
            await until(lambda: stack.scrubbed(OWN).ended >= 2, "two passes were begun by the schedule")
            await volume.close()
            await stack.stop_node(OWN)
            await stack.start_node(OWN)
            (status,) = stack.statuses(OWN)
            assert status.needs_peers, "nobody has told it since"
            await stack.begin_scrub(OWN)
            (status,) = stack.statuses(OWN)
            assert not status.needs_peers

    in_loop(test)


def test_the_rate_holds(tmp_path: Path) -> None:
    """Sixteen full extents at 16 MiB/s take a second, give or take the first step; without a limit far less."""

    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.1) as stack:
            volume = await stack.open(SIZE)
            for extent in range(16):
                await volume.write(extent * EXTENT_BLOCKS, os.urandom(MIB))
            await stack.until_all_applied(volume)
            loop = asyncio.get_running_loop()
            began = loop.time()
            number = await stack.begin_scrub(OWN, rate_bytes=16 * MIB)
            await until(lambda: stack.scrubbed(OWN).ended == number, "it is over")
            assert loop.time() - began >= 0.7

    in_loop(test)


async def guest(volume: OpenVolume, chance: random.Random, until_done: asyncio.Event) -> None:
    """Writes, trims and zeroes at random, and snapshots that come and go."""
    sealed: list[tuple[Generation, bytes]] = []
    while not until_done.is_set():
        start, count = chance.randrange(4 * EXTENT_BLOCKS), chance.choice((1, 1, 1, 2, 8, 64))
        kind = chance.randrange(20)
        if kind < 12:
            await volume.write(start, os.urandom(min(count, 8) * BLOCK_SIZE))
        elif kind < 15:
            await volume.trim(start, count)
        elif kind < 17:
            await volume.zero(start, count, allocate=False)
        elif kind < 18:
            holder = b"snap-%d" % chance.randrange(1 << 30)
            sealed.append(((await volume.seal(holder)).generation, holder))
        elif sealed:
            await volume.unpin(*sealed.pop(chance.randrange(len(sealed))))


@pytest.mark.parametrize("seed", [1])
def test_under_load_nothing_is_found(tmp_path: Path, seed: int) -> None:
    """With snapshots, trims and merges, checkpoints of their own pace, and a node that is away and comes back."""

    async def test() -> None:
        async with running_stack(
            tmp_path, checkpoint_s=0.05, upkeep_s=0.05, scrub_every_s=0.05, scrub_rate_bytes=0
        ) as stack:
            volume = await stack.open(SIZE)
            chance, done = random.Random(seed), asyncio.Event()
            guests = [asyncio.create_task(guest(volume, random.Random(chance.random()), done)) for _ in range(4)]
            passes = [stack.scrubbed(index).ended for index in range(3)]
            for _ in range(2):
                await stack.stop_node(THIRD)
                await asyncio.sleep(chance.random() / 4)
                await stack.start_node(THIRD)
                await until(lambda: all(each.whole for each in volume.status().members), "it is whole again")
                await stack.scrub(OWN)
            for index in range(3):
                await until(lambda index=index: stack.scrubbed(index).ended > passes[index], "a pass under load")  # type: ignore[misc]
            done.set()
            await asyncio.gather(*guests)
            await stack.until_all_applied(volume)
            for index in range(3):
                found = await stack.scrub(index)
                assert found.extents_compared == found.extents_done > 0
            for index in range(3):
                check_no_alarm(stack, index)

    in_loop(test)


def check_no_alarm(stack: Stack, index: int) -> None:
    (status,) = stack.statuses(index)
    assert list(status.scrub.divergences) == []
    assert (status.corrupt_blocks_found, status.damage) == (0, "")
    assert not stack.failed(index).done()


def test_while_a_restored_volume_is_hydrated_nothing_is_found(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(
            tmp_path, source=b"snap-0", checkpoint_s=0.05, upkeep_s=0.05, scrub_every_s=0.05, scrub_rate_bytes=0
        ) as stack:
            volume = await stack.open(SIZE)
            chance, done = random.Random(3), asyncio.Event()
            guests = [asyncio.create_task(guest(volume, random.Random(chance.random()), done)) for _ in range(2)]
            for number in range(0, 4 * EXTENT_BLOCKS, 16):
                await volume.fill(number, os.urandom(16 * BLOCK_SIZE))
                if number % 512 == 0:
                    await stack.scrub(chance.randrange(3))
            await volume.hydrated()
            await stack.scrub(OWN)
            done.set()
            await asyncio.gather(*guests)
            await stack.until_all_applied(volume)
            for index in range(3):
                found = await stack.scrub(index)
                assert found.extents_compared == found.extents_done > 0
                check_no_alarm(stack, index)

    in_loop(test)


def test_settings_of_scrub_are_bounded() -> None:
    with pytest.raises(CairnError, match="--scrub-rate"):
        NodeSettings(scrub_rate_bytes=-1)
