"""A repository: one object store's snapshots, with their key domain and the one cluster that may write them.

What is stored of it (snapshotd.repository_objects): `repository`, which names its id and its owner, and in `keys/`
the wrapped data key, once or more often. Invariants:
- `repository` is written after the data key and exists once: by `put` with if_absent. Of several creators the one
  whose object is there wins, and the others use it. Where a store's if_absent is no promise, each reads back what
  it wrote; two that create at the very same instant may then both believe in it, until the loser's next
  `check_owner`. So is `take_over`, which a person asks for, everywhere: the last one wins.
- At every instant some object in `keys/` opens with a key of the keyring: `rotate` deletes the old ones last, only
  those that were there before its new one, only those that it can open, and looks at the new one again afterwards.
- The data key never changes. Packs and manifests are not touched by anything in here.
"""

import asyncio
import secrets
from collections.abc import Mapping
from typing import Final

import structlog

from blockstore.errors import CairnError, Conflict, Corrupt, InvalidRequest, NotFound
from snapshotd.crypto import DomainKeys
from snapshotd.keyring import KEY_BYTES, Keyring, WrongKey
from snapshotd.object_store import PROBE_FOLDER, ObjectStore
from snapshotd.repository_objects import (
    ID_BYTES,
    KEYS_FOLDER,
    REPOSITORY_KEY,
    KeyObject,
    RepositoryObject,
    context_of,
    decode_key,
    decode_repository,
    encode_key,
    encode_repository,
)

_log = structlog.get_logger(__name__)
#: A rotation leaves one; more than this were not made by rotations, and each may cost a scrypt.
_MAX_KEYS: Final = 64
KeyObjects = Mapping[str, KeyObject]
"""The stored wrapped keys of one repository, by the keys of their objects."""


class Repository:
    """An open repository. keys: of its one key domain; id: 32 hexadecimal digits; owner: a cluster's id."""

    def __init__(self, store: ObjectStore, keys: DomainKeys, stored: RepositoryObject, data_key: bytes) -> None:
        self.store: Final = store
        self.keys: Final = keys
        self._stored = stored
        self._data_key = data_key

    def __repr__(self) -> str:
        return f"Repository({self.id}, {self.store.url})"

    @property
    def id(self) -> str:
        return self._stored.id

    @property
    def owner(self) -> str:
        """Who it belonged to when that was last looked at."""
        return self._stored.owner

    async def check_owner(self, cluster: str) -> None:
        """Raises Conflict where the repository belongs to another cluster, or is another one, by now."""
        found = await _read_repository(self.store)
        if found.id != self.id:
            raise Conflict(f"{self.store.url} holds the repository {found.id} now, and no longer {self.id}")
        self._stored = found
        _check_owner(found, cluster, self.store.url)

    async def take_over(self, cluster: str) -> None:
        """Make `cluster` the owner, whoever it was: when a person knows that the owner is gone for good.

        Raises Conflict where another cluster took it at the same time.
        """
        await self.store.put(REPOSITORY_KEY, encode_repository(RepositoryObject(self.id, cluster)))
        await self.check_owner(cluster)

    async def damaged_keys(self, keyring: Keyring) -> dict[str, str]:
        """What is wrong with each stored data key that is damaged or does not open with `keyring`, by its object's key.

        One that opens is enough to read everything. One that a rotation removes meanwhile is passed over.
        """
        found: dict[str, str] = {}
        listed = [info.key async for info in self.store.list(KEYS_FOLDER)]
        for key in listed:
            try:
                stored = await self.store.get(key)
            except NotFound:
                continue
            try:
                await self._check_key(decode_key(stored, key), keyring)
            except (Corrupt, InvalidRequest, NotFound) as error:
                found[key] = str(error)
        if not listed:
            found[KEYS_FOLDER] = "there is no data key: without one nothing can be opened"
        return found

    async def _check_key(self, stored: KeyObject, keyring: Keyring) -> None:
        """Raises Corrupt where it is of another repository or data key, WrongKey where it does not open."""
        mine = self.id, self.keys.domain, self.keys.check_value
        if (stored.repository, stored.domain, stored.check) != mine:
            raise Corrupt("it belongs to another repository, or to another data key than this one's")
        _, data_key = await _opened(stored, keyring)
        if data_key != self._data_key:
            raise Corrupt(f"{keyring.description} opens it, and it is another data key than this repository's")

    async def rotate(self, keyring: Keyring) -> int:
        """Wrap the data key with a new key of `keyring`, remove what the old ones wrapped: how many.

        One that was interrupted goes on where it was, without a second new key. A crash at any point leaves a
        repository that opens with this keyring. Raises InvalidRequest where the keyring needs a person first.
        """
        before = await _read_keys(self.store, self.id)
        opening = await asyncio.to_thread(_sorted_out, before, keyring)
        current = [key for key, is_current in opening.items() if is_current]
        old = [key for key in opening if key not in current]
        if not opening:
            raise WrongKey(f"no data key in {self.store.url} opens with {keyring.description}")
        if not old:
            old, current = current, []
            await asyncio.to_thread(keyring.add_key)
        new = current[0] if current else await self._wrap(keyring)
        for key in old:
            await self.store.delete(key)
        await self._assure(new, keyring)
        return len(old)

    async def _wrap(self, keyring: Keyring) -> str:
        """Store the data key wrapped by the current key, and see that it opens from there."""
        key = await _store_key(self.store, self.id, self.keys, self._data_key, keyring)
        await _opened(decode_key(await self.store.get(key), _named(self.store, key)), keyring)
        return key

    async def _assure(self, key: str, keyring: Keyring) -> None:
        """Put the wrapped key back where somebody else's rotation took it away."""
        try:
            await self.store.get(key)
        except NotFound:
            await self._wrap(keyring)


async def open_repository(
    store: ObjectStore, keyring: Keyring, cluster: str, *, create: bool, any_owner: bool = False
) -> Repository:
    """The repository in `store`; made and owned by `cluster` where there is none and `create` is set.

    any_owner: open also one that belongs to another cluster, to read it or to take it over.
    Raises NotFound, WrongKey, Corrupt, Conflict (another cluster's), and InvalidRequest for a format version that
    this release does not read.
    """
    try:
        stored = await _read_repository(store)
    except NotFound:
        if not create:
            raise NotFound(
                f"there is no repository at {store.url}: is the address right, with its prefix? It is made when the "
                "store is first used"
            ) from None
        stored = await _create(store, keyring, cluster)
    if not any_owner:
        _check_owner(stored, cluster, store.url)
    keys, data_key = await _open_keys(store, stored.id, keyring)
    return Repository(store, keys, stored, data_key)


async def _create(store: ObjectStore, keyring: Keyring, cluster: str) -> RepositoryObject:
    """Make a repository; what is stored then, which may be somebody else's who was faster."""
    await _check_empty(store)
    mine = RepositoryObject(secrets.token_hex(ID_BYTES), cluster)
    data_key = secrets.token_bytes(KEY_BYTES)
    key = await _store_key(store, mine.id, DomainKeys(secrets.token_bytes(ID_BYTES), data_key), data_key, keyring)
    await store.put(REPOSITORY_KEY, encode_repository(mine), if_absent=True)
    stored = await _read_repository(store)
    if stored.id != mine.id:
        await store.delete(key)
        _log.info("another process has just made the repository", repository=stored.id, store=store.url)
    return stored


async def _check_empty(store: ObjectStore) -> None:
    """Refuse to begin anew among the objects of a repository that lost its first one."""
    async for found in store.list():
        if not found.key.startswith((KEYS_FOLDER, PROBE_FOLDER)) and found.key != REPOSITORY_KEY:
            raise Conflict(
                f"{store.url} has no object {REPOSITORY_KEY}, but others, such as {found.key}: put back the lost one "
                "from a copy, or choose an empty prefix"
            )


def _check_owner(stored: RepositoryObject, cluster: str, url: str) -> None:
    if stored.owner != cluster:
        raise Conflict(
            f"the repository at {url} belongs to the cluster {stored.owner}, and this is {cluster}: two must not write "
            "to one. Where that cluster is gone for good, take it over with `cairn store adopt --force`"
        )


async def _read_repository(store: ObjectStore) -> RepositoryObject:
    return decode_repository(await store.get(REPOSITORY_KEY), _named(store, REPOSITORY_KEY))


async def _read_keys(store: ObjectStore, repository: str) -> KeyObjects:
    """The wrapped keys of this repository. One that is damaged is left out where another is whole, with a warning."""
    found: dict[str, KeyObject] = {}
    damaged: CairnError | None = None
    listed = [info.key async for info in store.list(KEYS_FOLDER)]
    if len(listed) > _MAX_KEYS:
        raise Corrupt(f"{store.url} has {len(listed)} objects in {KEYS_FOLDER}, and no rotation leaves so many")
    for key in listed:
        try:
            found[key] = decode_key(await store.get(key), _named(store, key))
        except NotFound:
            continue  # a rotation removed it just now
        except CairnError as error:
            damaged = error
            _log.warning("a stored data key cannot be used", reason=str(error))
    mine = {key: each for key, each in found.items() if each.repository == repository}
    if not mine:
        raise damaged or Corrupt(
            f"{store.url} has no data key for its repository {repository}: put the objects in {KEYS_FOLDER} back from "
            "a copy; without them its snapshots cannot be read"
        )
    return mine


async def _open_keys(store: ObjectStore, repository: str, keyring: Keyring) -> tuple[DomainKeys, bytes]:
    """The keys, from the first stored one that opens. Raises WrongKey where none does."""
    wrong: list[WrongKey] = []
    for each in (await _read_keys(store, repository)).values():
        try:
            return await _opened(each, keyring)
        except WrongKey as error:
            wrong.append(error)
    raise WrongKey(f"the repository at {store.url} does not open: {wrong[0]}")


async def _opened(stored: KeyObject, keyring: Keyring) -> tuple[DomainKeys, bytes]:
    data_key = await asyncio.to_thread(keyring.unwrap, stored.wrapped, stored.context)
    if len(data_key) != KEY_BYTES:
        raise WrongKey(f"{keyring.description} gives a data key of {len(data_key)} bytes, not {KEY_BYTES}")
    keys = DomainKeys(stored.domain, data_key)
    if keys.check_value != stored.check:
        raise WrongKey(f"{keyring.description} opens the data key, but it is not the one of this repository")
    return keys, data_key


async def _store_key(store: ObjectStore, repository: str, keys: DomainKeys, data_key: bytes, keyring: Keyring) -> str:
    """Store the data key wrapped by the current key, under a name of its own."""
    context = context_of(repository, keys.domain)
    wrapped = await asyncio.to_thread(keyring.wrap, data_key, context)
    key = KEYS_FOLDER + secrets.token_hex(ID_BYTES)
    await store.put(key, encode_key(KeyObject(repository, keys.domain, keys.check_value, wrapped)))
    return key


def _sorted_out(stored: KeyObjects, keyring: Keyring) -> Mapping[str, bool]:
    """Of the wrapped keys that open with this keyring: whether it is with the current key.

    The current key is asked for after the objects were listed: one that another rotation has stored since then is
    not among them, so no two rotations can each remove the other's.
    """
    opening = {}
    for key, each in stored.items():
        try:
            keyring.unwrap(each.wrapped, each.context)
        except WrongKey:
            continue
        opening[key] = keyring.is_current(each.wrapped, each.context)
    return opening


def _named(store: ObjectStore, key: str) -> str:
    return f"{key} in {store.url}"
