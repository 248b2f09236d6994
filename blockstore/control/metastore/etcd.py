"""etcd as the metastore, for control on several hosts.

    PREFIX/format            the format of all this
    PREFIX/catalog/KEY       the records
    PREFIX/catalog.head      put in every transaction that changes a record: who made it, and its number
    PREFIX/control/LEASE     who would be the active control (blockstore/control/leadership.py)

How changes are made is in blockstore/control/metastore/etcd_writer.py: fenced, and with no outcome guessed. Reads are
linearizable: one key is read from etcd, a list comes out of a mirror of all records in memory, once that shows the
head that etcd has when the list is asked for (the head, because it moves with deletions too). Who reads much for one
purpose asks for the head once, and is shown the mirror (`as_of_now`): a pass of control's loop makes twenty reads, a
heartbeat six, and each would be a round of etcd's members.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

from blockstore.control.metastore.etcd_client import EtcdClient
from blockstore.control.metastore.etcd_mirror import Mirror
from blockstore.control.metastore.etcd_writer import Fence, Writer, read, stands
from blockstore.control.metastore.history import History, Listings
from blockstore.control.metastore.interface import (
    Change,
    KeyValue,
    Listing,
    Revision,
    check_key,
    check_transaction,
)
from blockstore.errors import Corrupt
from blockstore.rpc import etcd_pb2 as pb

#: As of the embedded one.
HISTORY: Final = 10_000
_FORMAT: Final = b"1"


@dataclass(slots=True)
class _Block:
    """A task's reads for one purpose. head: etcd's as of the first of them; None: it is to be asked for."""

    head: int | None = None


class EtcdMetastore:
    """Implements Metastore; make it with `open_etcd`."""

    def __init__(self, client: EtcdClient, fence: Fence | None) -> None:
        prefix = client.address.prefix
        self._client = client
        self._records = f"{prefix}/catalog/".encode()
        self._head_key = f"{prefix}/catalog.head".encode()
        self._mirror = Mirror(client, self._head_key, f"{prefix}/catalog0".encode(), self._take_in, self._begin_anew)
        self._history = History(Revision(0), HISTORY)
        self._listings = Listings(self._history)
        self._following: asyncio.Task[None] | None = None
        self._writer = Writer(client, self._head_key, fence)
        self._under_way: set[asyncio.Task[Revision | None]] = set()
        self._blocks: WeakKeyDictionary[asyncio.Task[Any], _Block] = WeakKeyDictionary()
        self._changed_at = 0
        """The revision of the last change that was made here."""

    async def open(self) -> None:
        """Read all records, and follow them from here. Raises Corrupt where the format is another."""
        await self._check_format()
        await self._mirror.load()
        self._following = asyncio.ensure_future(self._mirror.run())
        self._following.add_done_callback(_hear_failure)

    async def get(self, key: str) -> KeyValue | None:
        check_key(key)
        found: Sequence[pb.KeyValue]
        block = self._block_of_this_task()
        if block is None:
            found = (await self._client.range(pb.RangeRequest(key=self._key(key)))).kvs
        elif block.head is None:  # what is read first waits for no mirror
            found = await self._read_with_head(key, block)
        else:
            await self._show_what_stands()
            held = self._mirror.items.get(self._key(key))
            found = [] if held is None else [held]
        return self._item(found[0]) if found else None

    async def list(self, prefix: str) -> Listing:
        await self._show_what_stands()
        revision = Revision(self._mirror.revision)
        return self._listings.follow(prefix, revision) or self._listings.keep(prefix, self._listing(prefix, revision))

    @contextmanager
    def as_of_now(self) -> Iterator[None]:
        task = asyncio.current_task()
        if task is None or task in self._blocks:  # which goes on
            yield
            return
        self._blocks[task] = _Block()
        try:
            yield
        finally:
            del self._blocks[task]

    async def transact(
        self,
        conditions: Mapping[str, Revision],
        puts: Mapping[str, bytes] | None = None,
        deletes: Iterable[str] = (),
    ) -> Revision | None:
        puts, deletes = dict(puts or {}), frozenset(deletes)
        check_transaction(conditions, puts, deletes)
        work = self._change(conditions, puts, deletes) if puts or deletes else self._look(conditions)
        # Whoever stops waiting leaves the head to be found out all the same.
        task = asyncio.ensure_future(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        revision = None
        try:
            revision = await asyncio.shield(task)
        finally:
            if revision is None and (block := self._block_of_this_task()) is not None:
                block.head = None  # it showed too little: somebody else has changed something
        return revision

    async def watch(self, prefix: str, after: Revision) -> AsyncIterator[Change]:
        while True:
            for change in self._history.between(after, Revision(self._mirror.revision)):
                values = {key: value for key, value in change.values.items() if key.startswith(prefix)}
                after = change.revision
                if values:
                    yield Change(change.revision, values)
            if after >= self._history.last():
                await self._mirror.next_change()

    async def close(self) -> None:
        """The client stays open: it is its maker's."""
        ending = [*self._under_way, *([self._following] if self._following else [])]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    # ---- reading

    async def _check_format(self) -> None:
        key = f"{self._client.address.prefix}/format".encode()
        request = pb.TxnRequest(
            compare=[stands(key, 0)],
            success=[pb.RequestOp(request_put=pb.PutRequest(key=key, value=_FORMAT))],
            failure=[read(key)],
        )
        answer = await self._client.look(request)
        found = _FORMAT if answer.succeeded else answer.responses[0].response_range.kvs[0].value
        if found != _FORMAT:
            raise Corrupt(
                f"what the etcd at {self._client.address} has under {self._client.address.prefix} is of format "
                f"{found!r}, and this program reads {_FORMAT!r}"
            )

    def _block_of_this_task(self) -> "_Block | None":
        task = asyncio.current_task()
        return None if task is None else self._blocks.get(task)

    async def _show_what_stands(self) -> None:
        """Until the mirror shows what stands now, or stood when this task's block began and was changed here since."""
        block = self._block_of_this_task() or _Block()
        if block.head is None:
            block.head = await self._read_head()
        await self._mirror.at_least(max(block.head, self._changed_at))

    async def _read_head(self) -> int:
        """The revision of the last transaction that changed a record, as of now; 0 before the first."""
        return _revision_of((await self._client.range(pb.RangeRequest(key=self._head_key))).kvs)

    async def _read_with_head(self, key: str, block: _Block) -> Sequence[pb.KeyValue]:
        answer = await self._client.look(pb.TxnRequest(success=[read(self._key(key)), read(self._head_key)]))
        found, head = (each.response_range.kvs for each in answer.responses)
        block.head = _revision_of(head)
        return found

    def _listing(self, prefix: str, revision: Revision) -> Listing:
        start = self._records + prefix.encode()
        found = sorted(key for key in self._mirror.items if key.startswith(start))
        return Listing(revision, tuple(self._item(self._mirror.items[key]) for key in found))

    def _item(self, found: pb.KeyValue) -> KeyValue:
        return KeyValue(found.key[len(self._records) :].decode(), found.value, Revision(found.mod_revision))

    def _take_in(self, revision: int, events: Sequence[pb.Event]) -> None:
        values: dict[str, bytes | None] = {}
        for event in events:
            if event.kv.key.startswith(self._records):
                key = event.kv.key[len(self._records) :].decode()
                values[key] = None if event.type == pb.Event.DELETE else event.kv.value
        self._history.add(Change(Revision(revision), values))

    def _begin_anew(self, revision: int) -> None:
        """What is asked for from before here is Compacted."""
        self._history.begin(Revision(revision))

    # ---- changing

    async def _look(self, conditions: Mapping[str, Revision]) -> Revision | None:
        # With a read in it: etcd answers an empty transaction out of what one member has, which may be old.
        request = pb.TxnRequest(
            compare=self._compares(conditions), success=[read(self._head_key)], failure=[read(self._head_key)]
        )
        answer = await self._client.look(request)
        return Revision(answer.header.revision) if answer.succeeded else None

    async def _change(
        self, conditions: Mapping[str, Revision], puts: Mapping[str, bytes], deletes: Iterable[str]
    ) -> Revision | None:
        changes = [pb.RequestOp(request_put=pb.PutRequest(key=self._key(key), value=puts[key])) for key in puts]
        gone = (pb.DeleteRangeRequest(key=self._key(key)) for key in deletes)
        changes += [pb.RequestOp(request_delete_range=each) for each in gone]
        revision = await self._writer.change(self._compares(conditions), changes)
        if revision is None:
            return None
        self._changed_at = max(revision, self._changed_at)
        return Revision(revision)

    def _compares(self, conditions: Mapping[str, Revision]) -> Sequence[pb.Compare]:
        return [stands(self._key(key), revision) for key, revision in conditions.items()]

    def _key(self, key: str) -> bytes:
        return self._records + key.encode()


def _revision_of(found: Sequence[pb.KeyValue]) -> int:
    return found[0].mod_revision if found else 0


def _hear_failure(following: "asyncio.Task[None]") -> None:
    """Whoever asks the mirror next is told."""
    if not following.cancelled():
        following.exception()


async def open_etcd(client: EtcdClient, fence: Fence | None = None) -> EtcdMetastore:
    """The metastore under the prefix of the client's address, made where there is none.

    fence: what must stand for anything to be changed. Raises Corrupt where it cannot be read, QuorumUnavailable.
    """
    store = EtcdMetastore(client, fence)
    try:
        await store.open()
    except BaseException:
        await store.close()
        raise
    return store
