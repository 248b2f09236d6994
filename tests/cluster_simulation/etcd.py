"""A simulated etcd: one store that honours what etcd's API promises, served by members that come and go.

The store is what a quorum of members agrees on, so it survives all of them; revisions, conditions, leases, watches and
compaction are etcd's own. A member answers only while it and a majority hear each other, as a leader would have to.
Whether real clients can tell it from etcd is shown by the suite that all metastores run (tests/test_metastore.py).

Source: etcd, api/etcdserverpb/rpc.proto and server/etcdserver/api/v3rpc.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Final

import grpc

from blockstore.rpc import etcd_pb2 as pb
from blockstore.rpc import etcd_pb2_grpc

_CLUSTER: Final = 0xE7CD
#: After which a member without a quorum says so; and how often a watch looks whether there is one.
_NO_QUORUM_S: Final = 7.0
_LOOK_S: Final = 0.5

Stored = tuple[int, Sequence[pb.Event]]


class EtcdStore:
    """now: in seconds. What is asked of it happens at once; who has no quorum does not ask."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.revision = 1
        self.items: dict[bytes, pb.KeyValue] = {}
        self._history: list[Stored] = []
        self._compacted = 0
        self._leases: dict[int, tuple[float, int]] = {}
        """When each ends, and for how long it is given."""
        self._last_lease = 1000
        self._waiting: list[asyncio.Future[None]] = []

    # ---- keys

    def header(self) -> pb.ResponseHeader:
        return pb.ResponseHeader(cluster_id=_CLUSTER, revision=self.revision)

    def range(self, request: pb.RangeRequest) -> pb.RangeResponse:
        """Raises LookupError where the revision is compacted."""
        items = self.items if request.revision in (0, self.revision) else self._items_at(request.revision)
        found = sorted((each for key, each in items.items() if _within(key, request)), key=lambda each: each.key)
        limit = request.limit or len(found)
        return pb.RangeResponse(header=self.header(), kvs=found[:limit], more=len(found) > limit)

    def transact(self, request: pb.TxnRequest) -> pb.TxnResponse:
        """Raises LookupError where a put names a lease that is over."""
        succeeded = all(map(self._holds, request.compare))
        operations = request.success if succeeded else request.failure
        for operation in operations:
            lease = operation.request_put.lease
            if lease and lease not in self._leases:
                raise LookupError("etcdserver: requested lease not found")
        events: list[pb.Event] = []
        answers = [self._do(operation, events) for operation in operations]
        self._commit(events)
        return pb.TxnResponse(header=self.header(), succeeded=succeeded, responses=answers)

    def compact(self) -> None:
        """Forget all but what stands now."""
        self._history.clear()
        self._compacted = self.revision

    def _holds(self, compare: pb.Compare) -> bool:
        found = self.items.get(compare.key, pb.KeyValue())
        target = compare.WhichOneof("target_union")
        assert compare.result == pb.Compare.EQUAL, f"not simulated: {compare}"
        return bool(getattr(found, target or "mod_revision") == getattr(compare, target or "mod_revision"))

    def _do(self, operation: pb.RequestOp, events: list[pb.Event]) -> pb.ResponseOp:
        match operation.WhichOneof("request"):
            case "request_range":
                return pb.ResponseOp(response_range=self.range(operation.request_range))
            case "request_put":
                self._put(operation.request_put, events)
                return pb.ResponseOp(response_put=pb.PutResponse(header=self.header()))
            case _:
                keys = [key for key in self.items if _within(key, operation.request_delete_range)]
                self._delete(keys, events)
                return pb.ResponseOp(response_delete_range=pb.DeleteRangeResponse(deleted=len(keys)))

    def _put(self, put: pb.PutRequest, events: list[pb.Event]) -> None:
        before, revision = self.items.get(put.key), self.revision + 1
        created, version = (before.create_revision, before.version) if before else (revision, 0)
        self.items[put.key] = pb.KeyValue(
            key=put.key, value=put.value, lease=put.lease, create_revision=created, mod_revision=revision,
            version=version + 1,
        )  # fmt: skip
        events.append(pb.Event(type=pb.Event.PUT, kv=self.items[put.key]))

    def _delete(self, keys: Iterable[bytes], events: list[pb.Event]) -> None:
        for key in keys:
            del self.items[key]
            gone = pb.KeyValue(key=key, mod_revision=self.revision + 1)
            events.append(pb.Event(type=pb.Event.DELETE, kv=gone))

    def _commit(self, events: list[pb.Event]) -> None:
        if events:
            self.revision += 1
            self._history.append((self.revision, events))
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                if not each.done():
                    each.set_result(None)

    def _items_at(self, revision: int) -> dict[bytes, pb.KeyValue]:
        """As of that revision: what changed since has to be seen in the history."""
        if revision < self._compacted:
            raise LookupError("etcdserver: mvcc: required revision has been compacted")
        changed = {each.kv.key for number, events in self._history if number > revision for each in events}
        items = {key: each for key, each in self.items.items() if key not in changed}
        for number, events in self._history:
            for each in events if number <= revision else ():
                if each.kv.key in changed and each.type == pb.Event.PUT:
                    items[each.kv.key] = each.kv
                elif each.kv.key in changed:
                    items.pop(each.kv.key, None)
        # What is changed since, and stood since before the history begins, cannot be told any more.
        if any(key not in items and self._compacted for key in changed):
            raise LookupError("etcdserver: mvcc: required revision has been compacted")
        return items

    # ---- watches

    def changes(self, request: pb.WatchCreateRequest, after: int) -> list[pb.Event] | None:
        """Those of its keys after that revision; None where they are compacted."""
        if after < self._compacted:
            return None
        later = (events for revision, events in reversed(self._history) if revision > after)
        return [each for events in reversed(list(later)) for each in events if _within(each.kv.key, request)]

    @property
    def oldest(self) -> int:
        return self._compacted

    async def next_change(self) -> None:
        """Until something has changed, or it is time to look whether there is still a quorum."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        await asyncio.wait([waiting], timeout=_LOOK_S)

    # ---- leases

    def grant(self, seconds: int) -> int:
        self._last_lease += 1
        self._leases[self._last_lease] = self._now() + seconds, seconds
        return self._last_lease

    def keep_alive(self, lease: int) -> int:
        """The seconds that it has from now on; 0 where it is over."""
        if lease not in self._leases:
            return 0
        seconds = self._leases[lease][1]
        self._leases[lease] = self._now() + seconds, seconds
        return seconds

    def revoke(self, lease: int) -> bool:
        """With its keys; False where it is over already."""
        if self._leases.pop(lease, None) is None:
            return False
        events: list[pb.Event] = []
        self._delete([key for key, each in self.items.items() if each.lease == lease], events)
        self._commit(events)
        return True

    def expire(self) -> None:
        """End the leases whose time is over."""
        for lease in [lease for lease, (ends, _) in self._leases.items() if ends <= self._now()]:
            self.revoke(lease)

    def extend(self) -> None:
        """Give all leases their whole time again, as a new leader does."""
        for lease in self._leases:
            self.keep_alive(lease)


def _within(key: bytes, request: pb.RangeRequest | pb.DeleteRangeRequest | pb.WatchCreateRequest) -> bool:
    if not request.range_end:
        return key == request.key
    return request.key <= key and (request.range_end == b"\0" or key < request.range_end)


class EtcdMember(etcd_pb2_grpc.KVServicer, etcd_pb2_grpc.WatchServicer, etcd_pb2_grpc.LeaseServicer):
    """Serves the store while `has_quorum`."""

    def __init__(self, store: EtcdStore, has_quorum: Callable[[], bool] = lambda: True) -> None:
        self._store = store
        self._has_quorum = has_quorum

    def add_to(self, server: Any) -> None:
        etcd_pb2_grpc.add_KVServicer_to_server(self, server)
        etcd_pb2_grpc.add_WatchServicer_to_server(self, server)
        etcd_pb2_grpc.add_LeaseServicer_to_server(self, server)

    async def Range(self, request: pb.RangeRequest, context: Any) -> pb.RangeResponse:
        await self._quorum(context)
        try:
            return self._store.range(request)
        except LookupError as error:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, str(error))
            raise

    async def Txn(self, request: pb.TxnRequest, context: Any) -> pb.TxnResponse:
        await self._quorum(context)
        try:
            return self._store.transact(request)
        except LookupError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            raise

    async def Watch(self, requests: AsyncIterator[pb.WatchRequest], context: Any) -> AsyncIterator[pb.WatchResponse]:
        create = (await anext(aiter(requests))).create_request
        await self._quorum(context)
        yield pb.WatchResponse(header=self._store.header(), created=True)
        seen = create.start_revision - 1 if create.start_revision else self._store.revision
        while True:
            if not self._has_quorum():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader")
            events = self._store.changes(create, seen)
            if events is None:
                yield pb.WatchResponse(
                    header=self._store.header(), canceled=True, compact_revision=self._store.oldest + 1
                )
                return
            seen = max(seen, self._store.revision)
            if events:
                yield pb.WatchResponse(header=self._store.header(), events=events)
            if self._store.revision <= seen:
                await self._store.next_change()

    async def LeaseGrant(self, request: pb.LeaseGrantRequest, context: Any) -> pb.LeaseGrantResponse:
        await self._quorum(context)
        return pb.LeaseGrantResponse(header=self._store.header(), ID=self._store.grant(request.TTL), TTL=request.TTL)

    async def LeaseRevoke(self, request: pb.LeaseRevokeRequest, context: Any) -> pb.LeaseRevokeResponse:
        await self._quorum(context)
        if not self._store.revoke(request.ID):
            await context.abort(grpc.StatusCode.NOT_FOUND, "etcdserver: requested lease not found")
        return pb.LeaseRevokeResponse(header=self._store.header())

    async def LeaseKeepAlive(
        self, requests: AsyncIterator[pb.LeaseKeepAliveRequest], context: Any
    ) -> AsyncIterator[pb.LeaseKeepAliveResponse]:
        async for request in requests:
            await self._quorum(context)
            left_s = self._store.keep_alive(request.ID)
            yield pb.LeaseKeepAliveResponse(header=self._store.header(), ID=request.ID, TTL=left_s)

    async def _quorum(self, context: Any) -> None:
        if not self._has_quorum():
            await asyncio.sleep(_NO_QUORUM_S)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out")
        self._store.expire()


async def serve(store: EtcdStore, address: str, has_quorum: Callable[[], bool]) -> None:
    """A member, until it is killed."""
    server = grpc.aio.server()
    EtcdMember(store, has_quorum).add_to(server)
    server.add_insecure_port(address)
    await server.start()
    while True:
        had_quorum = has_quorum()
        await asyncio.sleep(_LOOK_S)
        if has_quorum():
            store.expire() if had_quorum else store.extend()
