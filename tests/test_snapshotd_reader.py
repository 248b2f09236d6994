"""Reading stored snapshots: once for all who ask, guests first, verified, and through a repacking."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest

from blockstore.errors import Corrupt, OutOfRange, QuorumUnavailable
from blockstore.units import BLOCK_SIZE, MIB
from snapshotd.crypto import SALT_SIZE
from snapshotd.gate import Gate
from snapshotd.index import Index, IndexEntry, encode_index
from snapshotd.layout import index_key, pack_key, root_key, shard_key
from snapshotd.manifest import Shard
from snapshotd.memory_store import MemoryStore
from snapshotd.pack import ObjectWriter
from snapshotd.reader import SnapshotReader
from snapshotd.root import Root
from tests.snapshot_parts import CountingStore, Parts, opened
from tests.stack import until

CONTENT = {number: Random(number).randbytes(BLOCK_SIZE) for number in range(10, 200)}


@asynccontextmanager
async def stored(tmp_path: Path) -> AsyncIterator[tuple[Parts, CountingStore, Root, bytes]]:
    """One snapshot of CONTENT, and nothing of it in memory."""
    store = CountingStore(MemoryStore())
    async with opened(tmp_path, store) as parts:
        root, digest = await parts.snapshot(1, 4 * MIB, CONTENT)
        parts.reader = SnapshotReader(parts.repository, 16 * MIB)
        store.gets.clear()
        yield parts, store, root, digest


def test_what_many_ask_for_at_once_is_fetched_once(tmp_path: Path) -> None:
    async def check() -> None:
        async with stored(tmp_path) as (parts, store, root, _):
            reads = [parts.reader.read(root, start, 1, background=start % 2 == 0) for start in range(10, 74)]
            answers = await asyncio.gather(*reads)
            assert [payload for _, payload in answers] == [CONTENT[number] for number in range(10, 74)]
            assert sorted(key.split("/")[0] for key in store.gets) == ["index", "packs", "shards"]

    asyncio.run(check())


def test_a_reader_that_gives_up_takes_nothing_from_the_others(tmp_path: Path) -> None:
    async def check() -> None:
        async with stored(tmp_path) as (parts, _, root, _):
            tasks = [asyncio.create_task(parts.reader.read(root, 10, 1)) for _ in range(3)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            assert [payload for _, payload in await asyncio.gather(*tasks[1:])] == [CONTENT[10]] * 2
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]

    asyncio.run(check())


def test_a_read_counts_no_blocks_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To count them takes longer than all else that a read does: a shard that is asked whether it is true does so."""

    def count(shard: Shard) -> int:
        raise AssertionError("the blocks of a shard are counted")

    async def check() -> None:
        async with stored(tmp_path) as (parts, _, root, _):
            monkeypatch.setattr(Shard, "__len__", count)
            _, payload = await parts.reader.read(root, 10, 1)
            assert payload == CONTENT[10]

    asyncio.run(check())


def test_what_is_not_mapped_is_not_fetched(tmp_path: Path) -> None:
    async def check() -> None:
        async with stored(tmp_path) as (parts, store, root, _):
            assert await parts.reader.read(root, 300, 16) == (bytes(2), b"")
            assert not any(key.startswith("packs/") for key in store.gets)
            assert await parts.reader.mapped(root, 0) == sum(1 << number for number in CONTENT).to_bytes(4096, "little")
            with pytest.raises(OutOfRange):
                await parts.reader.read(root, 1000, 25)

    asyncio.run(check())


async def objects(store: CountingStore, folder: str) -> list[str]:
    return [info.key async for info in store.list(folder)]


@pytest.mark.parametrize("folder", ["packs", "index", "shards"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "swapped"])
def test_damage_is_corrupt_and_named(tmp_path: Path, folder: str, damage: str) -> None:
    async def check() -> None:
        async with stored(tmp_path) as (parts, store, root, _):
            for key in await objects(store, folder):
                data = bytearray(await store.get(key))
                data[60] ^= 1
                change = {"flipped": bytes(data), "cut": bytes(data[:50]), "swapped": b"another"}.get(damage)
                await store.delete(key)
                if change is not None:
                    await store.put(key, change)
            with pytest.raises(Corrupt) as raised:
                await parts.reader.read(root, 10, 1)
            (key, *_) = await objects(store, folder) or [""]
            named = [key.rpartition("/")[2], *root.shards.values(), "frame 0 of pack"]
            assert any(name and name in str(raised.value) for name in named)

    asyncio.run(check())


def test_another_root_than_the_catalogs_is_corrupt(tmp_path: Path) -> None:
    async def check() -> None:
        async with stored(tmp_path) as (parts, store, root, digest):
            assert await parts.reader.root(root.snapshot, digest) == root
            with pytest.raises(Corrupt, match="is gone"):
                await parts.reader.root(root.snapshot, bytes(32))
            await store.put(root_key(root.snapshot, bytes(32)), await store.get(root_key(root.snapshot, digest)))
            with pytest.raises(Corrupt, match=root.snapshot):
                await parts.reader.root(root.snapshot, bytes(32))
            await store.delete(root_key(root.snapshot, digest))
            parts.reader.forget_root(root.snapshot)
            with pytest.raises(Corrupt, match="is gone"):
                await parts.reader.root(root.snapshot, digest)

    asyncio.run(check())


async def repacked(parts: Parts, entry: IndexEntry, salt: bytes) -> IndexEntry:
    """All that is in that object moves to another one, as by a prune."""
    store, keys = parts.repository.store, parts.repository.keys
    writer = ObjectWriter(keys, salt)
    (part,) = entry.parts
    data = await store.get(pack_key(entry.object))
    for frame in part:
        hashes = [bytes([frame.number]) * 16] * frame.blocks
        frame_bytes = data[frame.offset : frame.offset + frame.length]
        writer.copy(part.pack, part.snapshot, frame.number, frame_bytes, hashes)
    name, buffers, moved = writer.finish()
    await store.put(pack_key(name), buffers)
    index_name, index = encode_index(keys, Index((moved,), (entry.object,)), salt)
    await store.put(index_key(index_name), index)
    await store.delete(pack_key(entry.object))
    return moved


def test_frames_are_found_where_a_repacking_put_them(tmp_path: Path) -> None:
    """The reader knows the old index when the frames move, and the old object goes."""

    async def check() -> None:
        async with stored(tmp_path) as (parts, _, root, _):
            await parts.reader.index.load()
            (entry,) = parts.reader.index.present()
            await repacked(parts, entry, b"s" * SALT_SIZE)
            _, payload = await parts.reader.read(root, 10, 190)
            assert payload == b"".join(CONTENT.values())

    asyncio.run(check())


def test_frames_that_move_again_and_again_are_followed(tmp_path: Path) -> None:
    """A prune begins and ends between every two requests; what is gone in the end is told after one more look."""

    async def check() -> None:
        async with stored(tmp_path) as (parts, store, root, _):
            await parts.reader.index.load()
            (entry,) = parts.reader.index.present()
            salts = iter([bytes([number]) * SALT_SIZE for number in range(5)])
            get_range, asked = store.get_range, 0

            async def moved_before(key: str, start: int, length: int) -> bytes:
                nonlocal entry, asked
                asked += 1
                if key == pack_key(entry.object) and (salt := next(salts, None)) is not None:
                    entry = await repacked(parts, entry, salt)
                return await get_range(key, start, length)

            store.get_range = moved_before  # type: ignore[method-assign]
            assert (await parts.reader.read(root, 10, 1))[1] == CONTENT[10]
            assert asked == 6
            await store.delete(pack_key(entry.object))
            with pytest.raises(Corrupt, match="should hold it"):
                await parts.reader.read(root, 190, 1)
            assert asked == 7

    asyncio.run(check())


def test_a_store_that_comes_back_is_asked_again(tmp_path: Path) -> None:
    """An error is not kept."""

    async def check() -> None:
        async with stored(tmp_path) as (parts, store, root, _):
            shard = shard_key(root.shards[0])
            data = await store.get(shard)
            await store.delete(shard)
            with pytest.raises(Corrupt, match="gone"):
                await parts.reader.read(root, 10, 1)
            await store.put(shard, data)
            assert (await parts.reader.read(root, 10, 1))[1] == CONTENT[10]

    asyncio.run(check())


def test_memory_is_bounded(tmp_path: Path) -> None:
    async def check() -> None:
        async with stored(tmp_path) as (parts, _, root, _):
            reader = SnapshotReader(parts.repository, 2 * 64 * (BLOCK_SIZE + 40) + 2_000_000)
            for start in range(10, 200):
                await reader.read(root, start, 1)
            assert reader._frames.size_bytes <= 2_000_000

    asyncio.run(check())


def test_a_guest_comes_before_the_background(tmp_path: Path) -> None:
    """With every place taken, a guest's fetch is the next one, and so is a background fetch that a guest joins."""

    async def check() -> None:
        async with stored(tmp_path) as (parts, _, root, _):
            await parts.reader.shard(root, 0)
            order: list[int] = []
            gate = parts.reader._frames._gate
            held = [gate.ticket(background=False) for _ in range(16)]
            for each in held:
                await each.__aenter__()

            async def read(start: int, background: bool) -> None:
                await parts.reader.read(root, start, 1, background=background)
                order.append(start)

            tasks = [asyncio.create_task(read(start, True)) for start in (10, 80)]
            await asyncio.sleep(0)
            tasks += [asyncio.create_task(read(150, False)), asyncio.create_task(read(81, False))]
            await until(lambda: (len(gate._guests), len(gate._background)) == (2, 1), "each waits for its place")
            assert order == []
            await held.pop().__aexit__()
            await asyncio.gather(*tasks)
            assert order.index(10) == 3
            for each in held:
                await each.__aexit__()

    asyncio.run(check())


def test_a_store_without_an_answer_is_no_corruption(tmp_path: Path) -> None:
    async def check() -> None:
        async with stored(tmp_path) as (parts, store, root, _):

            async def unanswered(key: str, start: int, length: int) -> bytes:
                raise QuorumUnavailable(f"no answer to {key}")

            store.get_range = unanswered  # type: ignore[method-assign]
            with pytest.raises(QuorumUnavailable):
                await parts.reader.read(root, 10, 1)

    asyncio.run(check())


def test_the_gate_counts_right_whenever_a_fetch_is_promoted() -> None:
    """Before it waits, while it waits, inside, and after: then as many places are free as before."""

    async def check() -> None:
        gate = Gate(3)
        before, inside, after = (gate.ticket(background=True) for _ in range(3))
        before.promote()
        async with before, inside:
            inside.promote()
            waiting = [gate.ticket(background=True) for _ in range(2)]
            tasks = [asyncio.create_task(each.__aenter__()) for each in waiting]
            await asyncio.sleep(0)
            assert [each.inside for each in waiting] == [True, False]
            waiting[1].promote()
            tasks[1].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await waiting[0].__aexit__()
        async with after:
            pass
        after.promote()
        last = [gate.ticket(background=True) for _ in range(3)]
        tasks = [asyncio.create_task(each.__aenter__()) for each in last]
        await asyncio.sleep(0)
        assert [each.inside for each in last] == [True, True, False]
        guest = gate.ticket(background=False)
        await guest.__aenter__()
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(check())


def test_a_place_is_not_given_to_who_was_just_cancelled() -> None:
    async def check() -> None:
        gate = Gate(1)
        first, second, third = (gate.ticket(background=False) for _ in range(3))
        await first.__aenter__()
        tasks = [asyncio.create_task(each.__aenter__()) for each in (second, third)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await first.__aexit__()
        await asyncio.wait(tasks)
        assert (second.inside, third.inside) == (False, True)

    asyncio.run(check())
