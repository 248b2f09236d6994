"""A repository: made once, owned by one cluster, opened by the right key, and never lost by a rotation."""

import asyncio
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockstore.errors import CairnError, Conflict, Corrupt, InvalidRequest, NotFound
from snapshotd.keyring import FileKeyring, WrongKey
from snapshotd.memory_store import MemoryStore
from snapshotd.object_store import Data
from snapshotd.repository import Repository, open_repository
from snapshotd.repository_objects import RepositoryObject, decode_repository, encode_repository
from snapshotd.store_settings import StoreSettings
from snapshotd.stores import open_keyring, open_store
from tests.repository_parts import Crash, CrashingStore, copy_of, keys_in, made, opened, sealed
from tests.s3_server import S3Server


@pytest.fixture
def keyring(tmp_path: Path) -> FileKeyring:
    return FileKeyring(tmp_path / "keyring", create=True)


def test_what_was_made_opens_again(keyring: FileKeyring) -> None:
    async def main() -> None:
        store = MemoryStore()
        first = await made(store, keyring)
        for again in (await opened(store, keyring), await made(store, keyring)):
            assert (again.id, again.owner) == (first.id, "cl-1")
            assert again.keys.check_value == first.keys.check_value
            assert again.keys.domain == first.keys.domain
        assert len(await keys_in(store)) == 1

    asyncio.run(main())


def test_no_repository_is_made_unasked(keyring: FileKeyring) -> None:
    async def main() -> None:
        store = MemoryStore()
        with pytest.raises(NotFound, match="no repository at memory://"):
            await opened(store, keyring)
        assert copy_of(store) == {}

    asyncio.run(main())


def test_no_repository_is_made_where_one_lost_its_first_object(keyring: FileKeyring) -> None:
    async def main() -> None:
        store = MemoryStore()
        await made(store, keyring)
        await store.put("packs/ab/abcd", b"data")
        await store.delete("repository")
        with pytest.raises(Conflict, match="such as packs/ab/abcd"):
            await made(store, keyring)

    asyncio.run(main())


def test_a_crash_while_it_is_made(keyring: FileKeyring) -> None:
    async def at(number: int, after: bool) -> None:
        crashing = CrashingStore({}, number, after=after)
        with pytest.raises(Crash):
            await made(crashing, keyring)
        left = MemoryStore()
        left._objects = copy_of(crashing)
        again = await made(left, keyring)
        assert (await opened(left, keyring)).keys.check_value == again.keys.check_value

    for number in range(2):
        for after in (False, True):
            asyncio.run(at(number, after))


@pytest.fixture(params=["directory", "s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> StoreSettings:
    """Of a new store of each kind that several may use at once."""
    if request.param == "directory":
        return StoreSettings(str(tmp_path / "store"))
    server: S3Server = request.getfixturevalue("s3")
    return server.settings()


def test_of_many_that_make_it_at_once_all_open_the_same(settings: StoreSettings, keyring: FileKeyring) -> None:
    async def main() -> None:
        store = await open_store(settings)
        repositories = await asyncio.gather(*(made(store, keyring) for _ in range(10)))
        assert len({each.id for each in repositories}) == 1
        assert len({each.keys.check_value for each in repositories}) == 1
        assert len(await keys_in(store)) == 1
        await store.close()

    asyncio.run(main())


def test_of_many_clusters_that_claim_it_at_once_one_owns_it(settings: StoreSettings, keyring: FileKeyring) -> None:
    async def main() -> None:
        store = await open_store(settings)
        claims = (open_repository(store, keyring, f"cl-{number}", create=True) for number in range(8))
        told = await asyncio.gather(*claims, return_exceptions=True)
        owners = [each.owner for each in told if isinstance(each, Repository)]
        assert len(owners) == 1
        refused = [each for each in told if isinstance(each, Conflict)]
        assert len(refused) == 7
        assert all(f"belongs to the cluster {owners[0]}" in str(each) for each in refused)
        assert len(await keys_in(store)) == 1
        await store.close()

    asyncio.run(main())


def _make(url: str, keyring: Path, start: Any, told: Any) -> None:
    async def main() -> str:
        settings = StoreSettings(url, keyring=keyring)
        store, ring = await open_store(settings), open_keyring(settings, create=True)
        start.wait(60)
        return (await made(store, ring)).keys.check_value.hex()

    told.put(asyncio.run(main()))


def test_processes_that_make_it_at_once(tmp_path: Path) -> None:
    """The keyring as well."""
    context = multiprocessing.get_context("spawn")
    start, told = context.Barrier(3), context.Queue()
    arguments = (str(tmp_path / "store"), tmp_path / "keyring", start, told)
    making = [context.Process(target=_make, args=arguments) for _ in range(3)]
    for process in making:
        process.start()
    values = {told.get(timeout=60) for _ in making}
    for process in making:
        process.join(60)
        assert process.exitcode == 0
    assert len(values) == 1


# The owner


def test_another_clusters_repository_is_refused_until_it_is_taken_over(keyring: FileKeyring) -> None:
    async def main() -> None:
        store = MemoryStore()
        first = await made(store, keyring)
        for create in (False, True):
            with pytest.raises(Conflict, match=r"belongs to the cluster cl-1, and this is cl-2.*cairn store adopt"):
                await open_repository(store, keyring, "cl-2", create=create)
        second = await open_repository(store, keyring, "cl-2", create=False, any_owner=True)
        assert second.owner == "cl-1"
        await first.check_owner("cl-1")
        await second.take_over("cl-2")
        assert second.owner == "cl-2"
        with pytest.raises(Conflict, match="belongs to the cluster cl-2"):
            await first.check_owner("cl-1")
        assert (await open_repository(store, keyring, "cl-2", create=False)).id == first.id

    asyncio.run(main())


def test_of_two_that_take_it_over_at_once_only_the_last_believes_in_it(keyring: FileKeyring) -> None:
    class Slow(MemoryStore):
        """Another cluster's take-over comes between the write and the look at it."""

        async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
            await super().put(key, data, if_absent=if_absent)
            if key == "repository" and b"cl-2" in bytes(data):  # type: ignore[arg-type]
                mine = decode_repository(await self.get(key), key)
                await super().put(key, encode_repository(RepositoryObject(mine.id, "cl-3")))
            return True

    async def main() -> None:
        store = Slow()
        repository = await made(store, keyring)
        with pytest.raises(Conflict, match="belongs to the cluster cl-3"):
            await repository.take_over("cl-2")

    asyncio.run(main())


def test_another_repository_in_its_place_is_noticed(keyring: FileKeyring) -> None:
    async def main() -> None:
        store = MemoryStore()
        first = await made(store, keyring)
        await store.put("repository", encode_repository(RepositoryObject("ab" * 16, "cl-1")))
        with pytest.raises(Conflict, match=f"the repository {'ab' * 16} now"):
            await first.check_owner("cl-1")
        with pytest.raises(Corrupt, match="no data key for its repository"):
            await opened(store, keyring)

    asyncio.run(main())


# Damage


def _every_flip(data: bytes) -> list[bytes]:
    return [data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :] for place in range(len(data))]


def _cuts(data: bytes) -> list[bytes]:
    return [data[:length] for length in range(0, len(data), 7)] + [
        data + b" ",
        data + data,
        b"[" * 60_000,
        b"x" * 70_000,
    ]


@pytest.mark.parametrize("which", ["repository", "keys"])
@pytest.mark.parametrize("damage", [_every_flip, _cuts])
def test_any_damage_is_told_as_damage(keyring: FileKeyring, which: str, damage: Callable[[bytes], list[bytes]]) -> None:
    async def main() -> None:
        store = MemoryStore()
        await made(store, keyring)
        key = which if which == "repository" else (await keys_in(store))[0]
        for bad in damage(await store.get(key)):
            await store.put(key, bad)
            with pytest.raises(Corrupt, match=f"{key} in memory://"):
                await opened(store, keyring)

    asyncio.run(main())


@pytest.mark.parametrize("which", ["repository", "keys"])
def test_a_format_of_a_later_release(keyring: FileKeyring, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        store = MemoryStore()
        monkeypatch.setattr("snapshotd.repository_objects.VERSION", 2)
        await made(store, keyring)
        later = {key: await store.get(key) for key in ["repository", *await keys_in(store)]}
        monkeypatch.undo()
        await store.delete("repository")
        for key in await keys_in(store):
            await store.delete(key)
        await made(store, keyring)
        if which == "keys":
            await store.delete((await keys_in(store))[0])
        for key, data in later.items():
            if key.startswith(which):
                await store.put(key, data)
        with pytest.raises(InvalidRequest, match="format version 2, and this release reads 1: use a newer one"):
            await opened(store, keyring)

    asyncio.run(main())


def test_a_lost_data_key_is_told(keyring: FileKeyring) -> None:
    async def main() -> None:
        store = MemoryStore()
        await made(store, keyring)
        await store.delete((await keys_in(store))[0])
        with pytest.raises(Corrupt, match="no data key for its repository"):
            await opened(store, keyring)

    asyncio.run(main())


def test_the_data_key_of_another_repository_is_refused(keyring: FileKeyring) -> None:
    """Swapped by somebody who may write to the store: it is bound to its own repository."""

    async def main() -> None:
        one, two = MemoryStore(), MemoryStore()
        await made(one, keyring)
        await made(two, keyring)
        mine, theirs = (await keys_in(one))[0], (await keys_in(two))[0]
        members = json.loads(await two.get(theirs))
        await one.put(mine, await two.get(theirs))
        with pytest.raises(Corrupt, match="no data key"):
            await opened(one, keyring)
        forged = {**members, "repository": json.loads(await one.get("repository"))["repository"]}
        del forged["sha256"]
        await one.put(mine, sealed(forged))
        with pytest.raises(WrongKey):
            await opened(one, keyring)

    asyncio.run(main())


def test_nothing_secret_is_told(keyring: FileKeyring) -> None:
    async def main() -> None:
        store = MemoryStore()
        repository = await made(store, keyring)
        data_key = repository._data_key
        for shown in (repr(repository), str(repository.keys), str(copy_of(store))):
            assert data_key.hex() not in shown
            assert repr(data_key)[2:-1] not in shown

    asyncio.run(main())


def test_the_errors_are_those_of_the_tree() -> None:
    assert issubclass(WrongKey, InvalidRequest)
    assert issubclass(WrongKey, CairnError)
