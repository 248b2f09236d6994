"""The catalog of snapshots, in the metastore of the volumes.

    snapshots/ID   snapshots.store   snapshot-tokens/TOKEN -> ids   daemons/ID   pins/VOLUME/SEAL
    deleted-snapshots/ID -> when

Invariants: a snapshot whose `pinned` goes from true to false leaves a pin to be taken away, in the
same transaction; one completes, or is added, only in a transaction that sees the prune number that
its references were checked at. All that prune must know stands under one prefix, so that one
listing tells it as of one revision.

A deleted snapshot of which something may be in the object store leaves its id for good, in the transaction that
removes it: a daemon that was held up may put its root there at any later time, and no root of it is ever taken again.
That is some 60 bytes each, which are never taken away, because no time is long enough.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from blockstore.control.catalog import VOLUMES
from blockstore.control.clock import now_ms
from blockstore.control.codec import encode
from blockstore.control.metastore.interface import ABSENT, Metastore, Revision
from blockstore.control.record_store import MAX_TRIES, RecordStore, Stored
from blockstore.control.records import Volume
from blockstore.control.snapshot_index import SnapshotIndex
from blockstore.control.snapshot_records import Pin, Snapshot, Store, StoreDaemon
from blockstore.domain import SnapshotId, VolumeId
from blockstore.errors import AlreadyExists, Conflict, Fenced, NotFound

SNAPSHOTS: Final = "snapshots/"
PINS: Final = "pins/"
_STORE: Final = "snapshots.store"
_ALL_FOR_PRUNE: Final = "snapshots"
_TOKENS: Final = "snapshot-tokens/"
_DAEMONS: Final = "daemons/"
_DELETED: Final = "deleted-snapshots/"
#: Random bytes that name a cluster.
_CLUSTER_SIZE: Final = 16


class SnapshotCatalog(RecordStore):
    """All that is kept of snapshots. Reads see every change that was made before."""

    def __init__(self, store: Metastore) -> None:
        super().__init__(store)
        self._index = SnapshotIndex()
        self._changed = asyncio.Event()

    # ---- snapshots

    async def snapshots(self) -> tuple[Snapshot, ...]:
        """All of them, the oldest first."""
        return (await self.index()).all

    async def unfinished(self) -> tuple[Snapshot, ...]:
        """Those that are not completed, the oldest first: few, however many there are."""
        return (await self.index()).unfinished

    async def snapshot(self, snapshot: str) -> Snapshot:
        """Raises NotFound."""
        return (await self.stored(snapshot)).record

    async def stored(self, snapshot: str) -> Stored[Snapshot]:
        """Raises NotFound."""
        found = await self._get(Snapshot, SNAPSHOTS + snapshot) if snapshot else None
        if found is None:
            raise NotFound(f"there is no snapshot {snapshot!r}: see `cairn snapshot list`")
        return found

    async def of_token(self, token: str) -> tuple[Snapshot, ...]:
        """The snapshots that were created with this client token, in their order; those that are gone are left out."""
        names = (await self._get_text(_TOKENS + token)).split(",") if token else []
        found = [await self._get(Snapshot, SNAPSHOTS + name) for name in names]
        return tuple(each.record for each in found if each)

    async def enter(self, snapshots: Sequence[Snapshot], of: Sequence[Stored[Volume]]) -> bool:
        """Enter new snapshots of these volumes, all or none.

        False where a volume has changed, or another request with the same token was first: look again.
        """
        conditions = {VOLUMES + each.record.id: each.revision for each in of}
        # The volumes are written as they are: whoever is about to delete one then has to look again.
        puts = {VOLUMES + each.record.id: encode(each.record) for each in of}
        for each in snapshots:
            conditions[SNAPSHOTS + each.id] = ABSENT
            puts[SNAPSHOTS + each.id] = encode(each)
        if token := snapshots[0].client_token:
            conditions[_TOKENS + token] = ABSENT
            puts[_TOKENS + token] = ",".join(each.id for each in snapshots).encode()
        return await self._transact(conditions, puts)

    async def change(
        self,
        snapshots: Sequence[SnapshotId],
        change: Callable[[Snapshot], Snapshot],
        *,
        pins: Iterable[Pin] = (),
        prune_number: int | None = None,
        unchanged: dict[str, Revision] | None = None,
    ) -> tuple[Snapshot, ...]:
        """Swap their records for what `change` makes of them, all or none; what `change` raises ends it.

        pins: further ones to be taken away from now on. prune_number: Fenced where it is another by now.
        unchanged: further keys with the revisions that they must have; Fenced where one has another.
        """
        further = tuple(pins)
        for _ in range(MAX_TRIES):
            conditions = dict(unchanged or {})
            if prune_number is not None:
                conditions |= await self._prune_condition(prune_number)
            before = [await self.stored(each) for each in snapshots]
            after = tuple(change(each.record) for each in before)
            conditions |= {SNAPSHOTS + each.record.id: each.revision for each in before}
            puts = {SNAPSHOTS + each.id: encode(each) for each in after}
            puts |= {_pin_key(each): encode(each) for each in (*_dropped(before, after), *further)}
            same = all(old.record == new for old, new in zip(before, after, strict=True))
            if (same and not further) or await self._transact(conditions, puts):
                return after
            await self._check_unchanged(unchanged or {})
        raise Conflict(f"snapshot {snapshots[0]} is changed by too many at once: try again")

    async def add(self, snapshot: Snapshot, prune_number: int) -> Snapshot:
        """Enter one that is whole in the object store. The same again changes nothing.

        Raises Fenced where the prune number is another by now, AlreadyExists where the id has another root, Conflict
        where it was deleted.
        """
        for _ in range(MAX_TRIES):
            conditions = await self._prune_condition(prune_number)
            held = await self._get(Snapshot, SNAPSHOTS + snapshot.id)
            if held and held.record.root == snapshot.root and held.record.state is snapshot.state:
                return held.record
            if held:
                raise AlreadyExists(
                    f"snapshot {snapshot.id} is in the catalog as {held.record.state.value}, "
                    f"with the root {held.record.root or '(none)'} and not {snapshot.root}"
                )
            if await self.deleted([snapshot.id]):
                raise Conflict(f"snapshot {snapshot.id} was deleted, and stays so: prune removes what is left of it")
            conditions |= {SNAPSHOTS + snapshot.id: ABSENT, _DELETED + snapshot.id: ABSENT}
            if await self._transact(conditions, {SNAPSHOTS + snapshot.id: encode(snapshot)}):
                return snapshot
        raise Conflict("the catalog is changed by too many at once: try again")

    async def remove(self, snapshot: SnapshotId) -> None:
        """Forget one that nothing needs any more, and its token with the last that has it. It may be gone already.

        Raises Conflict where it has changed meanwhile.
        """
        key, before = SNAPSHOTS + snapshot, await self._get(Snapshot, SNAPSHOTS + snapshot)
        while before is not None:
            if await self._remove(before):
                self._decoded.pop(key, None)
                return
            now = await self._get(Snapshot, key)
            if now and now.revision != before.revision:
                raise Conflict(f"snapshot {snapshot} has changed meanwhile: look again")
            before = now  # another one of its token has gone

    async def _remove(self, stored: Stored[Snapshot]) -> bool:
        """False where it, or its token, has changed."""
        key, token_key = SNAPSHOTS + stored.record.id, _TOKENS + stored.record.client_token
        conditions, puts, gone = {key: stored.revision}, dict[str, bytes](), [key]
        if stored.record.client_token and (token := await self._store.get(token_key)):
            conditions[token_key] = token.revision  # each of two that go at once would leave it to the other one
            left = [each.id for each in await self.of_token(stored.record.client_token) if each.id != stored.record.id]
            if left:
                puts[token_key] = ",".join(left).encode()
            else:
                gone.append(token_key)
        if stored.record.touched or stored.record.root:
            puts[_DELETED + stored.record.id] = str(now_ms()).encode()
        return await self._transact(conditions, puts, gone)

    async def deleted(self, snapshots: Iterable[str]) -> list[str]:
        """Those of them that were removed, and may have left something in the object store."""
        return [each for each in snapshots if await self._store.get(_DELETED + each) is not None]

    async def index(self) -> SnapshotIndex:
        """As of now; to be asked before the next change."""
        anew, changed = await self._changes(Snapshot, SNAPSHOTS)
        if anew:
            self._index = SnapshotIndex(each for each in changed.values() if each)
            return self._index
        for key, snapshot in changed.items():
            if snapshot is None:
                self._index.remove(SnapshotId(key.removeprefix(SNAPSHOTS)))
            else:
                self._index.put(snapshot)
        return self._index

    # ---- the store, and who serves it

    async def store(self) -> Store | None:
        """None before a node or a daemon registered for the first time."""
        stored = await self._get(Store, _STORE)
        return stored.record if stored else None

    async def ensure_store(self) -> Store:
        """Made, and the cluster named by it, where there is none yet."""
        return await self.store() or await self.change_store(lambda now: now or new_store())

    async def change_store(self, change: Callable[[Store | None], Store]) -> Store:
        """Swap its record for what `change` makes of it; what `change` raises ends it."""
        for _ in range(MAX_TRIES):
            stored = await self._get(Store, _STORE)
            changed = change(stored.record if stored else None)
            if stored and changed == stored.record:
                return changed
            if await self._transact({_STORE: stored.revision if stored else ABSENT}, {_STORE: encode(changed)}):
                return changed
        raise Conflict("the store's record is changed by too many at once: try again")

    async def roots(self) -> tuple[int, tuple[Snapshot, ...]]:
        """The prune number and all snapshots, as of one revision."""
        items = (await self._store.list(_ALL_FOR_PRUNE)).items
        stores = [self._decode(Store, each).record for each in items if each.key == _STORE]
        snapshots = [self._decode(Snapshot, each).record for each in items if each.key.startswith(SNAPSHOTS)]
        return (stores[0].prune_number if stores else 0), tuple(snapshots)

    async def prune_number(self) -> int:
        """As `roots` has it."""
        store = await self.store()
        return store.prune_number if store else 0

    async def daemons(self) -> tuple[StoreDaemon, ...]:
        """All that ever registered, by id."""
        return tuple(each.record for each in await self._list(StoreDaemon, _DAEMONS))

    async def daemon(self, daemon: str) -> StoreDaemon:
        """Raises NotFound."""
        stored = await self._get(StoreDaemon, _DAEMONS + daemon) if daemon else None
        if stored is None:
            raise NotFound(f"there is no snapshotd {daemon!r} here: it has to register")
        return stored.record

    async def put_daemon(self, daemon: StoreDaemon) -> None:
        """Enter it, or what it says of itself now."""
        await self._put(_DAEMONS + daemon.id, daemon)

    async def remove_daemon(self, daemon: str) -> None:
        """Forget it. Raises NotFound, Conflict where it has registered meanwhile."""
        stored = await self._get(StoreDaemon, _DAEMONS + daemon) if daemon else None
        if stored is None:
            raise NotFound(f"there is no snapshotd {daemon!r}: see `cairn store show`")
        if not await self._transact({_DAEMONS + daemon: stored.revision}, {}, (_DAEMONS + daemon,)):
            raise Conflict(f"snapshotd {daemon} has changed meanwhile: look again")
        self._decoded.pop(_DAEMONS + daemon, None)

    # ---- pins to be taken away

    async def pins(self) -> tuple[Pin, ...]:
        """All of them, by volume."""
        return tuple(each.record for each in await self._list(Pin, PINS))

    async def remove_pin(self, pin: Pin) -> None:
        """It is taken away, or its volume is gone."""
        await self._store.transact({}, {}, (_pin_key(pin),))
        self._decoded.pop(_pin_key(pin), None)

    # ---- changes

    def next_change(self) -> asyncio.Event:
        """Set at the next change of a snapshot; taken before one looks, it misses none."""
        return self._changed

    def notify(self) -> None:
        """Something has changed; also of what is in memory only."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _transact(
        self, conditions: dict[str, Revision], puts: dict[str, bytes], deletes: Iterable[str] = ()
    ) -> bool:
        done = await self._store.transact(conditions, puts, deletes) is not None
        self.notify()
        return done

    async def _prune_condition(self, expected: int) -> dict[str, Revision]:
        stored = await self._get(Store, _STORE)
        number = stored.record.prune_number if stored else 0
        if number != expected:
            raise Fenced(f"the prune number is {number}, and the references were checked at {expected}: check again")
        return {_STORE: stored.revision if stored else ABSENT}

    async def _check_unchanged(self, unchanged: dict[str, Revision]) -> None:
        for key, revision in unchanged.items():
            found = await self._store.get(key)
            if (found.revision if found else ABSENT) != revision:
                raise Fenced(f"{key} has changed meanwhile: look again")


def new_store() -> Store:
    """Of a cluster that has none yet, and no name."""
    return Store(secrets.token_hex(_CLUSTER_SIZE))


def key_of(snapshot: SnapshotId | str) -> str:
    """Where its record stands."""
    return SNAPSHOTS + snapshot


def key_of_volume(volume: VolumeId) -> str:
    """Where the volume's record stands."""
    return VOLUMES + volume


def _dropped(before: Iterable[Stored[Snapshot]], after: Iterable[Snapshot]) -> list[Pin]:
    return [
        Pin(new.volume, new.seal_name, new.generation, new.generations[1:])
        for old, new in zip(before, after, strict=True)
        if old.record.pinned and not new.pinned
    ]


def _pin_key(pin: Pin) -> str:
    return f"{PINS}{pin.volume}/{pin.snapshot}"
