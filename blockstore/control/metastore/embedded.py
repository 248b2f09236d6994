"""The embedded metastore: one LMDB environment in a directory, for a control process on one host.

LMDB's own transactions give atomicity and durability (default sync flags: a commit returns when
it is on disk); here are revisions, conditions and watch. One thread does all writes, so they stand
in one order; reads are microseconds and run where they are called. The changes of the last
HISTORY transactions since the start are kept in memory for watchers, who list again where they ask
for older ones, and for listings, which are made of the one before and the changes since. A change
is put there before its commit and counts once the commit shows: what is read is never behind the
tables. A lock on the directory keeps a second process out. After a commit that failed for anything
but a full disk nothing is answered any more: what the kernel dropped is not known.
"""

import asyncio
import fcntl
import os
import struct
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

import lmdb

from blockstore.control.metastore.history import History, Listings
from blockstore.control.metastore.interface import (
    Change,
    KeyValue,
    Listing,
    Revision,
    check_key,
    check_transaction,
)
from blockstore.durable_files import make_directory, sync_path
from blockstore.errors import CairnError, Conflict, Corrupt, NoSpace
from blockstore.units import GIB

#: Transactions whose changes are kept for watchers; control makes a few a second.
HISTORY: Final = 10_000
_FORMAT: Final = b"1"
_REVISION: Final = struct.Struct(">Q")


class EmbeddedMetastore:
    """Implements Metastore; make it with `open_embedded`, inside a running event loop."""

    def __init__(self, environment: Any, lock: int, directory: Path) -> None:
        self._environment = environment
        self._lock = lock
        self._directory = directory
        self._keys = environment.open_db(b"keys")
        self._meta = environment.open_db(b"meta")
        self._writer = ThreadPoolExecutor(1, "metastore")
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._broken: CairnError | None = None
        self._revision = self._check_format()
        self._committed = self._revision
        """self._committed: as the writer's thread knows it; self._revision: as watchers were told."""
        self._history = History(self._revision, HISTORY)
        self._listings = Listings(self._history)

    async def get(self, key: str) -> KeyValue | None:
        check_key(key)
        self._check_usable()
        with self._environment.begin(self._keys) as transaction:
            stored = transaction.get(key.encode())
        return None if stored is None else _decode(key.encode(), stored)

    async def list(self, prefix: str) -> Listing:
        self._check_usable()
        with self._environment.begin(self._keys) as transaction:
            revision = _read_revision(transaction, self._meta)
            followed = self._listings.follow(prefix, revision)
            return followed or self._listings.keep(prefix, Listing(revision, _read(transaction, prefix)))

    def as_of_now(self) -> AbstractContextManager[None]:
        return nullcontext()  # to read costs nothing

    async def transact(
        self,
        conditions: Mapping[str, Revision],
        puts: Mapping[str, bytes] | None = None,
        deletes: Iterable[str] = (),
    ) -> Revision | None:
        puts, deletes = dict(puts or {}), frozenset(deletes)
        check_transaction(conditions, puts, deletes)
        self._check_usable()
        return await self._loop.run_in_executor(self._writer, self._commit, dict(conditions), puts, deletes)

    async def watch(self, prefix: str, after: Revision) -> AsyncIterator[Change]:
        while True:
            changed = self._changed
            for change in self._history.between(after, self._revision):
                values = {key: value for key, value in change.values.items() if key.startswith(prefix)}
                after = change.revision
                if values:
                    yield Change(change.revision, values)
            if after >= self._revision:
                await changed.wait()

    async def close(self) -> None:
        await self._loop.run_in_executor(None, self._writer.shutdown)
        self._environment.close()
        os.close(self._lock)

    def _check_format(self) -> Revision:
        with self._environment.begin(self._meta, write=True) as transaction:
            found = transaction.get(b"format")
            if found is None:
                transaction.put(b"format", _FORMAT)
            elif found != _FORMAT:
                raise Corrupt(f"{self._directory} has metastore format {found!r}, this program reads {_FORMAT!r}")
            return _read_revision(transaction, self._meta)

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _commit(
        self, conditions: Mapping[str, Revision], puts: Mapping[str, bytes], deletes: Iterable[str]
    ) -> Revision | None:
        """In the writer's thread: check, change, commit, tell."""
        self._check_usable()
        try:
            with self._environment.begin(write=True) as transaction:
                if not all(self._holds(transaction, *condition) for condition in conditions.items()):
                    return None
                before = _read_revision(transaction, self._meta)
                change = Change(Revision(before + 1), self._apply(transaction, puts, deletes, before + 1))
                if not change.values:
                    return before
                transaction.put(b"revision", _REVISION.pack(change.revision), db=self._meta)
                self._history.add(change)
        except (lmdb.MapFullError, lmdb.DiskError) as error:
            self._history.forget_above(self._committed)
            raise NoSpace(f"no room in the metastore at {self._directory}: {error}; free disk space there") from error
        except lmdb.Error as error:
            self._broken = CairnError(f"the metastore at {self._directory} failed: {error}; control must start anew")
            raise self._broken from error
        self._committed = change.revision
        self._loop.call_soon_threadsafe(self._publish, change.revision)
        return change.revision

    def _holds(self, transaction: Any, key: str, revision: Revision) -> bool:
        stored = transaction.get(key.encode(), db=self._keys)
        return revision == (0 if stored is None else _REVISION.unpack_from(stored)[0])

    def _apply(
        self, transaction: Any, puts: Mapping[str, bytes], deletes: Iterable[str], revision: int
    ) -> dict[str, bytes | None]:
        values: dict[str, bytes | None] = {}
        for key, value in puts.items():
            transaction.put(key.encode(), _REVISION.pack(revision) + value, db=self._keys)
            values[key] = value
        for key in deletes:
            if transaction.delete(key.encode(), db=self._keys):
                values[key] = None
        return values

    def _publish(self, revision: Revision) -> None:
        self._revision = revision
        self._changed.set()
        self._changed = asyncio.Event()


def open_embedded(directory: Path, map_size_bytes: int = GIB) -> EmbeddedMetastore:
    """The metastore in `directory`, made where there is none.

    map_size_bytes: the most that it may grow to; only address space until it is used.
    Raises Conflict where another process has it open, Corrupt where it cannot be read.
    """
    make_directory(directory)
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(lock, directory)
        environment = lmdb.open(str(directory), map_size=map_size_bytes, max_dbs=2, mode=0o600)
        sync_path(directory)
        return EmbeddedMetastore(environment, lock, directory)
    except lmdb.Error as error:
        os.close(lock)
        raise Corrupt(f"cannot open the metastore at {directory}: {error}") from error
    except BaseException:
        os.close(lock)
        raise


def _lock(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Conflict(f"another control process is running on {directory}; stop it first") from None


def _read_revision(transaction: Any, meta: Any) -> Revision:
    stored = transaction.get(b"revision", db=meta)
    return Revision(0 if stored is None else _REVISION.unpack(stored)[0])


def _read(transaction: Any, prefix: str) -> tuple[KeyValue, ...]:
    start, items = prefix.encode(), []
    cursor = transaction.cursor()
    found = cursor.set_range(start) if start else cursor.first()
    while found and cursor.key().startswith(start):
        items.append(_decode(cursor.key(), cursor.value()))
        found = cursor.next()
    return tuple(items)


def _decode(key: bytes, stored: bytes) -> KeyValue:
    return KeyValue(key.decode(), stored[_REVISION.size :], Revision(_REVISION.unpack_from(stored)[0]))
