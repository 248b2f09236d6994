"""Keys of a repository: the right one opens it, a wrong one is told, and no rotation loses the last."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockstore.errors import InvalidRequest
from snapshotd.keyring import FileKeyring, WrongKey
from snapshotd.memory_store import MemoryStore
from snapshotd.object_store import Data, ObjectInfo
from snapshotd.passphrase_keyring import PassphraseKeyring
from tests.repository_parts import CHEAP, Crash, CrashingStore, copy_of, keys_in, made, opened, sealed


@pytest.fixture
def keyring(tmp_path: Path) -> FileKeyring:
    return FileKeyring(tmp_path / "keyring", create=True)


def test_a_wrong_keyring_is_told_as_such(keyring: FileKeyring, tmp_path: Path) -> None:
    async def main() -> None:
        store = MemoryStore()
        await made(store, keyring)
        other = FileKeyring(tmp_path / "other", create=True)
        with pytest.raises(WrongKey, match=f"does not open: .*wrapped by the key {keyring.key_ids[0]}"):
            await opened(store, other)
        with pytest.raises(WrongKey, match="wrapped by a passphrase"):
            await opened(store, PassphraseKeyring(["x"], cost=CHEAP))

    asyncio.run(main())


def test_a_wrong_passphrase_is_told_as_such() -> None:
    async def main() -> None:
        store = MemoryStore()
        await made(store, PassphraseKeyring(["right"], cost=CHEAP))
        await opened(store, PassphraseKeyring(["right"], cost=CHEAP))
        with pytest.raises(WrongKey, match=r"passphrase .* does not open"):
            await opened(store, PassphraseKeyring(["wrong"], cost=CHEAP))

    asyncio.run(main())


def test_rotation_wraps_anew_and_leaves_the_data_key(keyring: FileKeyring) -> None:
    async def main() -> None:
        store = MemoryStore()
        repository = await made(store, keyring)
        await store.put("packs/ab/abcd", b"data")
        before = copy_of(store)
        assert await repository.rotate(keyring) == 1
        assert len(keyring.key_ids) == 2
        changed = {key for key in {*before, *copy_of(store)} if before.get(key) != copy_of(store).get(key)}
        assert all(key.startswith("keys/") for key in changed)
        keyring.retire(keyring.key_ids[0])
        assert (await opened(store, keyring)).keys.check_value == repository.keys.check_value
        assert len(await keys_in(store)) == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("at", "after", "times"),
    [
        (0, False, 3),  # each time after the new key came into the keyring: one comes, however often it crashes
        (0, True, 1),  # the new object is there
        (1, False, 1),  # and the old one about to go
        (1, True, 1),  # and gone
    ],
)
def test_a_rotation_that_crashed_is_finished_by_the_next(
    keyring: FileKeyring, at: int, after: bool, times: int
) -> None:
    async def main() -> None:
        store = MemoryStore()
        repository = await made(store, keyring)
        for _ in range(times):
            crashing = CrashingStore(copy_of(store), at, after=after)
            with pytest.raises(Crash):
                await (await opened(crashing, keyring)).rotate(keyring)
            store._objects = copy_of(crashing)
            assert (await opened(store, keyring)).keys.check_value == repository.keys.check_value
        if len(await keys_in(store)) == 2 or times > 1:
            assert await (await opened(store, keyring)).rotate(keyring) == 1
        assert len(keyring.key_ids) == 2
        assert len(await keys_in(store)) == 1
        keyring.retire(keyring.key_ids[0])
        assert (await opened(store, keyring)).keys.check_value == repository.keys.check_value

    asyncio.run(main())


def test_passphrases_rotate(tmp_path: Path) -> None:
    async def main() -> None:
        store = MemoryStore()
        old, new = PassphraseKeyring(["old"], cost=CHEAP), PassphraseKeyring(["new"], cost=CHEAP)
        both = PassphraseKeyring(["new", "old"], cost=CHEAP)
        repository = await made(store, old)
        with pytest.raises(InvalidRequest, match="write the new one in the line above"):
            await repository.rotate(old)
        await opened(store, old)
        assert await (await opened(store, both)).rotate(both) == 1
        assert (await opened(store, new)).keys.check_value == repository.keys.check_value
        with pytest.raises(WrongKey):
            await opened(store, old)

    asyncio.run(main())


def test_from_a_passphrase_to_a_file_nothing_is_rotated_by_accident(keyring: FileKeyring) -> None:
    async def main() -> None:
        store = MemoryStore()
        repository = await made(store, PassphraseKeyring(["x"], cost=CHEAP))
        before = copy_of(store)
        with pytest.raises(WrongKey, match=r"no data key .* opens with"):
            await repository.rotate(keyring)
        assert copy_of(store) == before

    asyncio.run(main())


class Interleaving(MemoryStore):
    """Every call lets others run: what happens between two of a rotation's steps differs with the order."""

    async def get(self, key: str) -> bytes:
        await asyncio.sleep(0)
        return await super().get(key)

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        await asyncio.sleep(0)
        return await super().put(key, data, if_absent=if_absent)

    async def delete(self, key: str) -> None:
        await asyncio.sleep(0)
        await super().delete(key)

    async def list(self, prefix: str = "", *, after: str = "") -> AsyncIterator[ObjectInfo]:
        await asyncio.sleep(0)
        async for info in super().list(prefix, after=after):
            yield info


def test_rotations_at_once_lose_no_key(keyring: FileKeyring) -> None:
    async def main() -> None:
        store = Interleaving()
        repository = await made(store, keyring)
        for _ in range(10):
            await asyncio.gather(*(repository.rotate(keyring) for _ in range(4)))
            assert (await opened(store, keyring)).keys.check_value == repository.keys.check_value
            await repository.rotate(keyring)

    asyncio.run(main())


def test_a_rotation_puts_back_what_another_took_away(keyring: FileKeyring) -> None:
    """With another keyring's eyes, or by hand: as long as a process has the data key, it is not lost."""

    class Sweeping(MemoryStore):
        async def delete(self, key: str) -> None:
            for each in await keys_in(self):
                await super().delete(each)

    async def main() -> None:
        store = Sweeping()
        repository = await made(store, keyring)
        await repository.rotate(keyring)
        assert (await opened(store, keyring)).keys.check_value == repository.keys.check_value

    asyncio.run(main())


def test_a_data_key_that_is_not_the_repositorys_is_refused(keyring: FileKeyring) -> None:
    async def main() -> None:
        store = MemoryStore()
        await made(store, keyring)
        key = (await keys_in(store))[0]
        members = json.loads(await store.get(key))
        del members["sha256"]
        await store.put(key, sealed({**members, "check": "00" * 16}))
        with pytest.raises(WrongKey, match="it is not the one of this repository"):
            await opened(store, keyring)

    asyncio.run(main())


def test_a_damaged_wrapped_key_beside_a_whole_one_keeps_nobody_out(keyring: FileKeyring) -> None:
    async def main() -> None:
        store = MemoryStore()
        await made(store, keyring)
        await store.put("keys/" + "0" * 32, b"{}")
        await opened(store, keyring)

    asyncio.run(main())
