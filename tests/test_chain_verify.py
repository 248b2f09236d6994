"""Every kind of object flipped, cut, removed, swapped: verify names it and who needs it; nobody else is affected."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blockstore.errors import CairnError, Corrupt, InvalidRequest, NotFound
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB
from snapshotd.keyring import FileKeyring
from snapshotd.repository_objects import decode_key, encode_key
from snapshotd.root import Root
from tests.chain_parts import Chain, LocalCatalog, blocks, chain_at
from tests.snapshot_parts import snapshot_id

SIZE = 8 * MIB
KINDS = ["packs", "index", "shards", "snapshots"]

Damage = Callable[[Chain, str, str], Awaitable[None]]
"""Of an object (key) of the damaged snapshot; and the same kind of object of the other."""


async def _flip(chain: Chain, key: str, other: str) -> None:
    stored = bytearray(await chain.store.get(key))
    stored[len(stored) // 2] ^= 0x10
    await chain.store.put(key, bytes(stored))


async def _truncate(chain: Chain, key: str, other: str) -> None:
    stored = await chain.store.get(key)
    await chain.store.put(key, stored[: len(stored) // 2])


async def _remove(chain: Chain, key: str, other: str) -> None:
    await chain.store.delete(key)


async def _swap(chain: Chain, key: str, other: str) -> None:
    mine, theirs = await chain.store.get(key), await chain.store.get(other)
    await chain.store.put(key, theirs)
    await chain.store.put(other, mine)


async def _two_snapshots(chain: Chain) -> tuple[Root, Root, dict[str, tuple[str, str]]]:
    """Two that have nothing in common; by kind of object, the first's and the second's."""
    first = await chain.snapshot(1, SIZE, blocks(range(200), 1))
    before = await chain.keys()
    second = await chain.snapshot(2, SIZE, blocks(range(200), 2))
    after = await chain.keys()
    mine = {kind: next(key for key in before if key.startswith(kind)) for kind in KINDS}
    theirs = {kind: next(key for key in after if key.startswith(kind) and key not in before) for kind in KINDS}
    return first, second, {kind: (mine[kind], theirs[kind]) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [_flip, _truncate, _remove, _swap], ids=lambda each: each.__name__.strip("_"))
def test_damage_is_named_and_refused_and_spreads_to_nobody(tmp_path: Path, kind: str, damage: Damage) -> None:
    async def check() -> None:
        catalog = LocalCatalog()
        async with chain_at(tmp_path, catalog=catalog) as chain:
            first, second, keys = await _two_snapshots(chain)
            expected = await chain.parts.content(second)
            mine, theirs = keys[kind]
            await damage(chain, mine, theirs)
            problems = await chain.verify()
            store = chain.store
        is_swapped = damage is _swap
        needed = {key for key, snapshots in problems.items() if first.snapshot in snapshots}
        if kind == "index" and damage is _remove:
            assert needed == {keys["packs"][0]}, "its pack is in no index"
        elif kind == "index" and is_swapped:
            assert needed == {mine, theirs}, "which of the two damaged ones listed it, nobody can tell"
        else:
            assert needed == {mine}
        assert {each for snapshots in problems.values() for each in snapshots} == (
            {first.snapshot, second.snapshot} if is_swapped else {first.snapshot}
        )
        async with chain_at(tmp_path, store, catalog) as fresh:
            with pytest.raises(Corrupt):
                await _read(fresh, first)
            if not is_swapped:
                assert await _read(fresh, second) == expected

    asyncio.run(check())


async def _read(chain: Chain, root: Root) -> bytes:
    stored = await chain.parts.reader.root(root.snapshot, (await chain.catalog.roots()).completed[root.snapshot])  # type: ignore[index]
    return await chain.parts.content(stored)


@pytest.mark.parametrize("folder", ["keys", "repository"])
def test_damage_to_what_opens_the_repository_is_named(tmp_path: Path, folder: str) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.snapshot(1, SIZE, blocks(range(10)))
            key = next(key for key in await chain.keys() if key.startswith(folder))
            await _truncate(chain, key, "")
            assert await chain.verify() == {key: {snapshot_id(1)}}

    asyncio.run(check())


@pytest.mark.parametrize("change", ["damaged blob", "other data key", "lost", "lost keyring", "changed keyring"])
def test_a_data_key_that_does_not_open_any_more_is_named(tmp_path: Path, change: str) -> None:
    """The process has the data key and goes on; its next start would not."""

    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.snapshot(1, SIZE, blocks(range(10)))
            (key,) = await chain.keys("keys")
            found, keyring = decode_key(await chain.store.get(key), key), FileKeyring(tmp_path / "keyring")
            if change == "damaged blob":
                blob = found.wrapped.blob[:-1] + bytes([found.wrapped.blob[-1] ^ 1])
                await chain.store.put(key, encode_key(replace(found, wrapped=replace(found.wrapped, blob=blob))))
            elif change == "other data key":
                await chain.store.put(key, encode_key(replace(found, wrapped=keyring.wrap(bytes(32), found.context))))
            elif change == "lost":
                await chain.store.delete(key)
            else:
                (tmp_path / "keyring").unlink()
                if change == "changed keyring":
                    FileKeyring(tmp_path / "keyring", create=True)
            named = "keys/" if change in ("lost", "lost keyring") else key
            assert await chain.verify() == {named: {snapshot_id(1)}}
            assert [each.object for each in (await chain.check()).problems] == [named]

    asyncio.run(check())


def test_a_key_that_a_rotation_left_is_fine(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.snapshot(1, SIZE, blocks(range(10)))
            (key,) = await chain.keys("keys")
            old = await chain.store.get(key)
            await chain.service.RotateKey(pb.RotateKeyRequest(), None)  # type: ignore[arg-type]
            await chain.store.put(key, old)
            assert await chain.verify() == {}
            assert list((await chain.check()).problems) == []

    asyncio.run(check())


def test_a_shared_object_is_needed_by_all_who_share_it(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            first = await chain.snapshot(1, SIZE, blocks(range(200)))
            await chain.snapshot(2, SIZE, {5: bytes(BLOCK_SIZE)}, first)
            await chain.snapshot(3, SIZE, blocks(range(200), 3))
            assert await chain.verify() == {}
            shard = f"shards/{first.shards[0]}"
            await _flip(chain, shard, "")
            assert await chain.verify() == {shard: {snapshot_id(1), snapshot_id(2)}}
            assert await chain.verify(snapshots=[snapshot_id(3)]) == {}

    asyncio.run(check())


def test_a_sample_reads_its_share_and_all_manifests(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root = await chain.snapshot(1, SIZE, blocks(range(640)))
            (pack,) = await chain.keys("packs")
            await _flip(chain, pack, "")
            found: set[bool] = set()
            for _ in range(200):  # that all of them are alike happens never
                found.add(await chain.verify(sample=0.3) == {})
                if len(found) == 2:
                    break
            assert found == {True, False}, "one frame of ten is damaged: some samples have it, some have not"
            await _flip(chain, f"shards/{root.shards[0]}", "")
            assert f"shards/{root.shards[0]}" in await chain.verify(sample=0.01)

    asyncio.run(check())


def test_progress_reaches_its_total(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.snapshot(1, SIZE, blocks(range(640)))
            seen = [each.progress async for each in chain.service.Verify(pb.VerifyRequest(), None)]  # type: ignore[arg-type]
            assert ("manifests", 1, 1) in {(each.phase, each.done, each.total) for each in seen}
            read = [each for each in seen if each.phase == "packs" and each.total]
            assert read[-1].done == read[-1].total == sum((await chain.keys("packs")).values())

    asyncio.run(check())


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            for request, error in (
                ({"sample": 1.5}, InvalidRequest),
                ({"snapshots": ["x"]}, InvalidRequest),
                ({"snapshots": [snapshot_id(9)]}, NotFound),
            ):
                with pytest.raises(CairnError) as caught:
                    await chain.verify(**request)
                assert isinstance(caught.value, error)

    asyncio.run(check())


def test_check_tells_what_is_missing_what_is_strange_and_what_is_for_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.snapshot(1, SIZE, blocks(range(200), 1))
            garbage = await chain.snapshot(2, SIZE, blocks(range(200), 2))
            clean = await chain.check()
            assert (list(clean.problems), clean.unreferenced_objects) == ([], 0)
            before = await chain.keys()
            await chain.delete(garbage)
            await chain.store.put("packs/notes.txt", b"hello")
            found = await chain.check()
            assert [each.object for each in found.problems] == ["packs/notes.txt"]
            assert found.unreferenced_objects == 2
            pack = next(key for key in before if key.startswith("packs/"))
            await _truncate(chain, pack, "")
            assert pack in {each.object for each in (await chain.check()).problems} or found.unreferenced_bytes
            await chain.prune()
            left = await chain.check()
            assert left.unreferenced_objects == 0

    asyncio.run(check())


def test_check_sees_sizes_without_reading_data(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root = await chain.snapshot(1, SIZE, blocks(range(200), 1))
            (pack,) = await chain.keys("packs")
            await _truncate(chain, pack, "")
            (problem,) = (await chain.check()).problems
            assert (problem.object, list(problem.snapshots)) == (pack, [root.snapshot])
            await chain.store.delete(pack)
            (problem,) = (await chain.check()).problems
            assert (problem.object, problem.message) == (pack, "it is gone")

    asyncio.run(check())
