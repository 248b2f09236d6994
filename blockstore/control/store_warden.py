"""What the daemons of the object store say and ask: registration, heartbeats, ends of ships, prune.

A daemon is one instance of a process at a time, and belongs to one repository, the cluster's. What
ends a ship names the prune number that its references were checked at, and is refused where that has
moved: then what it refers to may be in quarantine (design, section 5).
"""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import structlog

from blockstore.control import snapshot_transitions
from blockstore.control.clock import now_ms
from blockstore.control.presence import Presence
from blockstore.control.reconcile import Reconciler
from blockstore.control.registrar import checked_address
from blockstore.control.shipping import Shipping
from blockstore.control.snapshot_catalog import SnapshotCatalog, new_store
from blockstore.control.snapshot_messages import statistics_of, whole_snapshot
from blockstore.control.snapshot_records import (
    MAX_REASON,
    Snapshot,
    SnapshotState,
    Store,
    StoreDaemon,
    check_daemon,
    check_root,
)
from blockstore.domain import DaemonId, SnapshotId, check_id
from blockstore.errors import Conflict, Fenced, InvalidRequest, NotFound
from blockstore.grpc_parts import in_parts
from blockstore.rpc import snapshot_pb2

_log = structlog.get_logger(__name__)

#: Ids of one FindDeleted: far below what a message holds.
MAX_FOUND = 10_000


class StoreWarden:
    """The calls of daemons."""

    def __init__(
        self,
        snapshots: SnapshotCatalog,
        presence: Presence,
        reconciler: Reconciler,
        shipping: Shipping,
        lease_s: float,
    ) -> None:
        self._snapshots = snapshots
        self._presence = presence
        self._reconciler = reconciler
        self._shipping = shipping
        self._lease_s = lease_s

    async def register(self, request: snapshot_pb2.RegisterDaemonRequest) -> snapshot_pb2.RegisterDaemonResponse:
        """Raises InvalidRequest, and Conflict where another repository is the cluster's.

        Without a repository it is not registered. It only says that it was started, or, with an address, asks whose
        one is to be made.
        """
        check_daemon(request.instance, request.store, request.repository)
        if not request.repository:
            self._presence.daemon_starting(DaemonId(check_id("sd", request.daemon)), request.why[:MAX_REASON])
            store = await self._snapshots.ensure_store()
            if request.address:
                await self._check_none_lost(request.store, store)
            return snapshot_pb2.RegisterDaemonResponse(lease_s=self._lease_s, cluster=store.cluster)
        daemon = StoreDaemon(
            DaemonId(check_id("sd", request.daemon)),
            request.instance,
            checked_address(request.address),
            request.store,
            request.repository,
        )
        store = await self._claim(daemon)
        await self._snapshots.put_daemon(daemon)
        self._presence.daemon_registered(daemon.id)
        self._snapshots.notify()
        _log.info("snapshotd registered", daemon=daemon.id, address=daemon.address, store=daemon.store)
        return snapshot_pb2.RegisterDaemonResponse(lease_s=self._lease_s, cluster=store.cluster)

    async def _check_none_lost(self, address: str, store: Store) -> None:
        """Raises Conflict where a repository is about to be made in place of the one that snapshots are in."""
        if store.repository and await self._has_shipped():
            raise Conflict(
                f"there is no repository in {address}, and this cluster's snapshots are in {store.repository}: is the "
                "disk mounted, and the address right, with its prefix? None is made in its place"
            )

    async def _has_shipped(self) -> bool:
        return any(each.touched or each.root for each in await self._snapshots.snapshots())

    async def _claim(self, daemon: StoreDaemon) -> Store:
        """The cluster's record; its repository is this daemon's. While nothing was shipped it may take another."""
        shipped = await self._has_shipped()

        def change(now: Store | None) -> Store:
            now = now or new_store()
            if now.repository not in ("", daemon.repository) and shipped:
                raise Conflict(
                    f"the object store {daemon.store} has the repository {daemon.repository}, and this cluster's "
                    f"snapshots are in {now.repository}: give the daemon that one, or start a new cluster for this one"
                )
            return replace(now, repository=daemon.repository)

        return await self._snapshots.change_store(change)

    async def heartbeat(self, request: snapshot_pb2.DaemonHeartbeatRequest) -> snapshot_pb2.DaemonHeartbeatResponse:
        """Answers when there is news for that daemon, or after the time that it asked for.

        Raises NotFound where it has to register, Fenced where another instance has.
        """
        daemon = await self._instance(request.daemon, request.instance)
        if request.address != daemon.address:
            await self._snapshots.put_daemon(replace(daemon, address=checked_address(request.address)))
        reported = {SnapshotId(each.snapshot): each.progress for each in request.snapshots}
        self._presence.daemon_reported(daemon.id, reported, request.why[:MAX_REASON])
        self._snapshots.notify()
        loop = asyncio.get_running_loop()
        until = loop.time() + min(self._lease_s / 3, request.wait_s)
        while True:
            changed = self._snapshots.next_change()
            tasks = await self._shipping.tasks(daemon.id, reported, await self._reconciler.messages())
            drops = await self._shipping.drops()
            if {*(task.snapshot.id for task in tasks), *drops} != set(request.known) or loop.time() >= until:
                return snapshot_pb2.DaemonHeartbeatResponse(ship=tasks, drop=drops)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await changed.wait()
            await self._instance(request.daemon, request.instance)

    async def complete(self, request: snapshot_pb2.CompleteSnapshotRequest) -> Snapshot:
        """Raises Fenced where the prune number has moved, or another daemon or another try ships it by now."""
        daemon = await self._instance(request.daemon, request.instance)
        root, statistics = check_root(request.root), statistics_of(request.statistics)
        found = await self._snapshots.snapshot(request.snapshot)

        def complete(now: Snapshot) -> Snapshot:
            return snapshot_transitions.completed(now, root, statistics, now_ms(), retries=request.retries)

        if found.state is SnapshotState.COMPLETED:
            return complete(found)
        self._shipping.check_given(found.id, daemon.id)
        (snapshot,) = await self._snapshots.change([found.id], complete, prune_number=request.prune_number)
        _log.info("snapshot completed", snapshot=snapshot.id, daemon=daemon.id)
        return snapshot

    async def fail(self, request: snapshot_pb2.FailSnapshotRequest) -> Snapshot:
        """Raises Fenced where another daemon or another try ships it by now."""
        daemon = await self._instance(request.daemon, request.instance)
        found = await self._snapshots.snapshot(request.snapshot)
        self._shipping.check_given(found.id, daemon.id)
        reason = request.reason or f"{daemon.id} could not ship it, and did not say why"

        def fail(now: Snapshot) -> Snapshot:
            return snapshot_transitions.failed(now, reason, retries=request.retries)

        (snapshot,) = await self._snapshots.change([found.id], fail)
        _log.warning("snapshot failed", snapshot=snapshot.id, daemon=daemon.id, reason=reason)
        return snapshot

    async def drop(self, request: snapshot_pb2.DropSnapshotRequest) -> None:
        """Its root is gone from the object store, and so is its record. It may be gone already."""
        await self._snapshots.daemon(request.daemon)
        try:
            snapshot = await self._snapshots.snapshot(request.snapshot)
        except NotFound:
            return
        await self._shipping.check_free(snapshot)
        await self._snapshots.remove(snapshot.id)
        _log.info("snapshot deleted", snapshot=snapshot.id)

    async def forget(self, request: snapshot_pb2.ForgetDaemonRequest) -> None:
        """A daemon that is gone for good. Raises NotFound, and Conflict while it is up.

        Nothing rests on it: what it shipped is given to others once it is down, and one that comes back registers.
        """
        daemon = DaemonId(request.daemon)
        registered = any(each.id == daemon for each in await self._snapshots.daemons())
        if registered and self._presence.may_be_up(daemon):
            raise Conflict(f"snapshotd {daemon} is up, or was a moment ago: stop it first")
        if registered or daemon not in self._presence.starting():
            await self._snapshots.remove_daemon(daemon)
        self._presence.daemon_removed(daemon)
        _log.info("snapshotd forgotten", daemon=daemon)

    async def roots(self) -> Iterator[snapshot_pb2.GetRootsResponse]:
        """What must not be pruned, in parts. One that is being deleted counts until its record is gone.

        All of one revision, read before the first part: what changes until the last one is as what changes after it.
        """
        number, snapshots = await self._snapshots.roots()
        whole = [each for each in snapshots if each.root]
        pending = [each.id for each in snapshots if each.state is SnapshotState.PENDING]
        return in_parts(
            snapshot_pb2.GetRootsResponse(prune_number=number, total=len(whole) + len(pending)),
            roots=(snapshot_pb2.Root(snapshot=each.id, root=bytes.fromhex(each.root)) for each in whole),
            pending=pending,
        )

    async def find_deleted(self, request: snapshot_pb2.FindDeletedRequest) -> snapshot_pb2.FindDeletedResponse:
        """Raises InvalidRequest for more ids than one message is to have, or what is no id."""
        if len(request.snapshots) > MAX_FOUND:
            raise InvalidRequest(f"{len(request.snapshots)} snapshots: ask for {MAX_FOUND} at most")
        asked = [check_id("snap", each) for each in request.snapshots]
        return snapshot_pb2.FindDeletedResponse(snapshots=await self._snapshots.deleted(asked))

    async def raise_prune_number(self, request: snapshot_pb2.RaisePruneNumberRequest) -> int:
        """The number after it. Raises Fenced where it was another than expected."""
        await self._snapshots.daemon(request.daemon)

        def change(now: Store | None) -> Store:
            if now is None or now.prune_number != request.expected:
                number = now.prune_number if now else 0
                raise Fenced(f"the prune number is {number}, not {request.expected}: another prune is at work")
            return replace(now, prune_number=now.prune_number + 1)

        number = (await self._snapshots.change_store(change)).prune_number
        _log.info("prune number raised", prune_number=number, daemon=request.daemon)
        return number

    async def add(self, request: snapshot_pb2.AddSnapshotRequest) -> Snapshot:
        """Raises InvalidRequest, Fenced where the prune number has moved, AlreadyExists for another root."""
        return await self._snapshots.add(whole_snapshot(request.snapshot, now_ms()), request.prune_number)

    async def _instance(self, daemon: str, instance: str) -> StoreDaemon:
        registered = await self._snapshots.daemon(daemon)
        if registered.instance != instance:
            raise Fenced(f"another process has registered as {daemon}: this one must stop")
        store = await self._snapshots.store()
        if store is None or store.repository != registered.repository:
            raise NotFound(f"the repository of {daemon} is not the cluster's any more: it has to register")
        return registered
