"""Typed records over a metastore: read with their revision, changed by compare-and-swap only.

What the catalogs of volumes and of snapshots have in common. Invariants: a record is decoded once for
each revision, and a list is made once while nothing in it changes, so that reading all of them with
every heartbeat costs little; two lists that are one object have the same records.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from blockstore.control.codec import decode, encode
from blockstore.control.metastore.interface import ABSENT, KeyValue, Metastore, Revision
from blockstore.errors import Conflict

#: Lost races of one change before it is given up; each lost one means that another change was made.
MAX_TRIES: Final = 100

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Stored(Generic[Record]):
    """A record as it stands, and the revision that a change of it must name."""

    record: Record
    revision: Revision


class RecordStore:
    """Records of any kind by their keys."""

    def __init__(self, store: Metastore) -> None:
        self._store = store
        self._decoded: dict[str, Stored[Any]] = {}
        self._lists: dict[str, tuple[tuple[KeyValue, ...], tuple[Stored[Any], ...]]] = {}
        self._followed: dict[str, tuple[KeyValue, ...]] = {}
        """Up to where the changes were told."""

    def as_of_now(self) -> AbstractContextManager[None]:
        """A block of many reads, each of which may be as of its beginning (Metastore.as_of_now)."""
        return self._store.as_of_now()

    async def _get(self, kind: type[Record], key: str) -> Stored[Record] | None:
        found = await self._store.get(key)
        return None if found is None else self._decode(kind, found)

    async def _get_text(self, key: str) -> str:
        found = await self._store.get(key)
        return "" if found is None else found.value.decode()

    async def _list(self, kind: type[Record], prefix: str) -> tuple[Stored[Record], ...]:
        items = (await self._store.list(prefix)).items
        made_of, records = self._lists.get(prefix, (None, ()))
        if made_of is not items:
            records = tuple(self._decode(kind, each) for each in items)
            self._lists[prefix] = items, records
        return records

    async def _changes(self, kind: type[Record], prefix: str) -> tuple[bool, Mapping[str, Record | None]]:
        """What has changed under the prefix since this was asked last: records by their keys, None where they went.

        True where these are all that there are, and what was told before is void.
        """
        listing = await self._store.list(prefix)
        before = self._followed.get(prefix)
        if listing.items is before:
            return False, {}
        found: Mapping[str, KeyValue | None]
        if listing.step is not None and listing.step.before is before:
            whole, found = False, listing.step.changed
        else:
            whole, found = True, {each.key: each for each in listing.items}
        records = {key: None if now is None else self._decode(kind, now).record for key, now in found.items()}
        self._followed[prefix] = listing.items  # only now: what does not decode is told again
        return whole, records

    def _decode(self, kind: type[Record], found: KeyValue) -> Stored[Record]:
        held = self._decoded.get(found.key)
        if held is None or held.revision != found.revision:
            held = self._decoded[found.key] = Stored(decode(kind, found.value), found.revision)
        return held

    async def _put(self, key: str, record: Any) -> None:
        for _ in range(MAX_TRIES):
            stored = await self._get(type(record), key)
            if stored is not None and stored.record == record:
                return
            if await self._swap(key, stored.revision if stored else ABSENT, record):
                return
        raise Conflict(f"{key} is changed by too many at once: try again")

    async def _swap(self, key: str, revision: Revision, record: Any) -> bool:
        return await self._store.transact({key: revision}, {key: encode(record)}) is not None
