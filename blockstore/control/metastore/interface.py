"""What the control plane asks of its store: compare-and-swap on keys, transactions, and watch.

The model is etcd's, so that etcd fits behind it: the store has one revision, which grows with each
transaction that changes something (and may grow besides, where others share the etcd); a key carries the
revision of its last change; a condition names the revision that a key must still have, 0 for a key that
must be absent. A revision
is never used again, so a key that was deleted and made anew never satisfies an old condition.

Invariants that every implementation keeps (tests/test_metastore.py runs them all):
- a transaction happens as a whole or not at all, and it is durable when `transact` returns;
- transactions are linearizable: who reads after one returned sees it;
- a watcher sees every change after the revision that it names, in order, whole transactions at a
  time, or gets Compacted; it never misses one silently.
"""

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, NewType, Protocol

from blockstore.errors import Conflict, InvalidRequest

Revision = NewType("Revision", int)
"""Of the store, or of a key's last change. 0: the store is empty, the key is absent."""

ABSENT: Final = Revision(0)

#: LMDB takes keys up to 511 bytes.
MAX_KEY_SIZE: Final = 400
#: A volume's record has some hundred bytes a segment; etcd refuses requests over 1.5 MiB.
MAX_VALUE_SIZE: Final = 256 * 1024
#: Conditions of one transaction, and its changes (puts and deletes) likewise; etcd's default limit for each
#: of the two is 128, and some are the implementation's own.
MAX_OPERATIONS: Final = 120
#: Of all that one transaction puts; etcd refuses requests over 1.5 MiB.
MAX_TRANSACTION_SIZE: Final = 1024 * 1024


class Compacted(Conflict):
    """The changes that a watcher asked for are no longer held: list, and watch from there."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as it stands; revision is that of its last change."""

    key: str
    value: bytes
    revision: Revision


@dataclass(frozen=True, slots=True)
class Step:
    """What made a listing's items of those of the listing before: keys with what they are now, None where they went."""

    before: tuple[KeyValue, ...]
    changed: Mapping[str, KeyValue | None]


@dataclass(frozen=True, slots=True)
class Listing:
    """The keys under a prefix in bytewise order, all read at one revision of the store.

    step: for who has the listing before, by its very `items`; None where nobody knows any more.
    """

    revision: Revision
    items: tuple[KeyValue, ...]
    step: Step | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What one transaction changed under a prefix: key to new value, None where it was deleted."""

    revision: Revision
    values: Mapping[str, bytes | None]


class Metastore(Protocol):
    """A store of records; see the module for what holds."""

    async def get(self, key: str) -> KeyValue | None:
        """The key as it stands, None where it is absent."""

    async def list(self, prefix: str) -> Listing:
        """All keys that begin with `prefix`. The `items` of two listings may be one object where nothing changed."""

    def as_of_now(self) -> AbstractContextManager[None]:
        """A block in which this task reads often and may be shown what stood at its beginning, or later.

        All that this process has changed by then is shown, whatever task did it, and everything anew once a condition
        has failed here. It is not for what rests on a read that no other process may have overtaken. Tasks that are
        started in it are not part of it.
        """

    async def transact(
        self,
        conditions: Mapping[str, Revision],
        puts: Mapping[str, bytes] | None = None,
        deletes: Iterable[str] = (),
    ) -> Revision | None:
        """Make all puts and deletes if every key in `conditions` has that revision (0: is absent).

        Returns the store's revision after it, or None where a condition failed and nothing changed.
        Deleting an absent key changes nothing, though the revision may grow. A put that was cancelled
        while it waited may still happen. Raises InvalidRequest for a key that is both put and deleted or
        a size beyond the limits, NoSpace where the store is full, and QuorumUnavailable where it is out
        of reach: the message says whether the transaction may have happened.
        """

    def watch(self, prefix: str, after: Revision) -> AsyncIterator[Change]:
        """Every change under `prefix` with a revision above `after`, those to come included.

        Raises Compacted, when iterated, where changes above `after` are no longer held.
        """

    async def close(self) -> None:
        """Give back what the store holds; nothing is called after it."""


def check_key(key: str) -> None:
    """Raises InvalidRequest unless `key` can be stored."""
    if not 0 < len(key.encode()) <= MAX_KEY_SIZE:
        raise InvalidRequest(f"a key of {len(key.encode())} bytes is outside 1 to {MAX_KEY_SIZE}")


def check_transaction(conditions: Mapping[str, Revision], puts: Mapping[str, bytes], deletes: Iterable[str]) -> None:
    """Raises InvalidRequest where a transaction breaks a limit or contradicts itself."""
    deleted = set(deletes)
    for key in {*conditions, *puts, *deleted}:
        check_key(key)
    if both := deleted & puts.keys():
        raise InvalidRequest(f"a transaction both puts and deletes {sorted(both)[0]!r}")
    if (operations := max(len(conditions), len(puts) + len(deleted))) > MAX_OPERATIONS:
        raise InvalidRequest(f"a transaction of {operations} operations exceeds {MAX_OPERATIONS}")
    if (size := sum(map(len, puts.values()))) > MAX_TRANSACTION_SIZE:
        raise InvalidRequest(f"a transaction that puts {size} bytes exceeds {MAX_TRANSACTION_SIZE}")
    for key, value in puts.items():
        if len(value) > MAX_VALUE_SIZE:
            raise InvalidRequest(f"a value of {len(value)} bytes at {key!r} exceeds {MAX_VALUE_SIZE}")
