"""A node's replicas: opened from disk, created, deleted; and the end when the disk cannot be trusted.

Start: every store, then the journal with what each store reflects, then a follower for each replica
out of both. Nothing is answered before what was read back is durable (the journal sees to it).
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from blockstore.config import EXIT_DO_NOT_RESTART, NodeSettings
from blockstore.domain import ORIGIN, NodeId, Position, ReplicaAddress, ReplicaId
from blockstore.errors import AlreadyExists, CairnError, Conflict, Corrupt, InvalidRequest, NoSpace, NotFound
from blockstore.grpc_connections import Connections
from blockstore.log import UNKNOWN_FLOOR, Filling, LogImage
from blockstore.node.catch_up import CatchUpClient
from blockstore.node.checkpointer import Checkpointer
from blockstore.node.guest_traffic import GuestTraffic
from blockstore.node.hosted_replica import HostedReplica, Services
from blockstore.node.journal_writer import JournalWriter
from blockstore.node.memory import MemoryBudget
from blockstore.node.repair import Repairer
from blockstore.node.scrub_peer import ScrubPeers
from blockstore.node.scrubber import Scrubber
from blockstore.node.upkeep import Upkeep
from blockstore.rate_limit import RateLimit
from blockstore.replica_codec import from_position, make_target
from blockstore.replication.follower import Follower
from blockstore.rpc import replica_pb2 as pb
from blockstore.storage.journal import Journal, Recovered
from blockstore.storage.node_store import NodeStore
from blockstore.storage.replica_store import ReplicaStore
from blockstore.units import GIB, MIB, Sequence

_log = structlog.get_logger(__name__)
#: Files of the journal together: what lies in them and not in the tables is bounded far below by memory.
_JOURNAL_BYTES = GIB
#: A checkpoint of one replica waits for no compaction or scrub of another, and for no copy.
_TABLE_THREADS = 3
#: As control has it by default, until it is heard.
_REBUILD_RATE_BYTES = 64 * MIB
#: What they read is on its way to object storage, or lists: one may wait for the disk while one computes.
_READER_THREADS = 2
#: Made in one turn of the event loop; each takes some 30 us.
_STATUSES_AT_ONCE = 32
_MAX_SOURCE = 256


class Node:
    """Use it inside one event loop. `failed` is set, with the exit code, when the process must end."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[int] = self._loop.create_future()
        self.store = NodeStore.open(settings.data, reserve_bytes=settings.reserve_bytes)
        self.node = NodeId(self.store.node)
        self.memory = MemoryBudget(settings.max_unapplied_bytes)
        self.traffic = GuestTraffic(time.monotonic)
        self.rebuild_rate = RateLimit(_REBUILD_RATE_BYTES)
        """What comes in from peers' tables, for all replicas together; the source reads no further than that is taken.

        Control says it when the node registers, and with each heartbeat.
        """
        self._hosted: dict[ReplicaId, HostedReplica] = {}
        self._peers = Connections(lambda channel: channel)
        self._deletions: set[asyncio.Task[None]] = set()
        self.catch_up = CatchUpClient(self._peers.to, self.memory, self.rebuild_rate, settings.call_timeout_s)
        self.repairer = Repairer(self._peers.to, settings.call_timeout_s, self._note_damage)
        stores = open_sound(self.store, self.store.replicas())
        lost = [replica for replica in self.store.replicas() if self.store.lacks_tables(replica)]
        self.journal, recovered = Journal.open(
            self.store.journal_directory,
            max_bytes=_JOURNAL_BYTES,
            marks={replica: store.mark for replica, store in stores.items()},
            make_room=self.store.space.make_room,
        )
        for replica in lost:
            _log.error("the tables are gone: the replica is filled anew from its peers", replica=replica)
            stores[replica] = self.store.make_anew(replica, mark=self.journal.last)
            recovered.entries.pop(replica, None)
        self.checkpointer = Checkpointer(settings, self.journal, self.memory, self.replicas, self.repair)
        self._writer = JournalWriter(
            self.journal,
            self._loop,
            on_failure=self.fail,
            on_full=self.checkpointer.journal_full,
        )
        self._services = Services(
            self.journal,
            self._writer,
            self.memory,
            ThreadPoolExecutor(_TABLE_THREADS, thread_name_prefix="tables"),
            ThreadPoolExecutor(_READER_THREADS, thread_name_prefix="readers"),
            self.catch_up,
            self.checkpointer.soon,
            self.repair,
            self._forget_damage,
            self.fail,
        )
        upkeep = Upkeep(settings, self.replicas, self.repair, self.store.forget_set_aside, self._forget_damage)
        self.scrubber = Scrubber(
            settings,
            self.replicas,
            self.repair,
            ScrubPeers(self._peers.to, settings.call_timeout_s),
            traffic=self.traffic,
            wall_ms=lambda: time.time_ns() // 1_000_000,
        )
        work = (self.checkpointer.run, self._watch_space, upkeep.tidy, self.scrubber.run)
        self._tasks = [self._loop.create_task(self._guard(run)) for run in work]
        self._writer.start()
        for store in stores.values():
            self._host(store, recovered)

    # ---- replicas

    def replicas(self) -> Iterable[HostedReplica]:
        return list(self._hosted.values())

    def find(self, address: ReplicaAddress) -> HostedReplica:
        """Raises NotFound where this node has no such replica, or has it for another volume or segment."""
        hosted = self.find_replica(address.replica)
        if hosted.address != address:
            raise NotFound(f"replica {address.replica} on node {self.node} is none of {address.volume}")
        return hosted

    def find_replica(self, replica: ReplicaId) -> HostedReplica:
        """Raises NotFound."""
        hosted = self._hosted.get(replica)
        if hosted is None:
            raise NotFound(f"node {self.node} has no replica {replica}")
        return hosted

    async def create(self, address: ReplicaAddress, *, filling: bool, source: bytes = b"") -> bool:
        """False where it is there already. source: what absent blocks come from.

        Raises AlreadyExists where the id is another volume's, Conflict where it was made with another source,
        InvalidRequest.
        """
        if len(source) > _MAX_SOURCE:
            raise InvalidRequest(f"a source of {len(source)} bytes, {_MAX_SOURCE} at most: it is a snapshot's id")
        hosted = self._hosted.get(address.replica)
        if hosted is not None:
            if hosted.address != address:
                raise AlreadyExists(f"replica {address.replica} belongs to {hosted.address.volume}")
            _check_source(hosted.store, source)
            return False
        image = LogImage(filling=Filling(UNKNOWN_FLOOR, ORIGIN, Sequence(0)) if filling else None)
        store = self.store.create_replica(address, image, mark=self.journal.last, source=source)
        follower, effects = Follower.restore(address.replica, store.image, ())
        self._add(store, follower).carry_out(effects)
        _log.info("replica created", replica=address.replica, volume=address.volume, filling=filling)
        return True

    async def delete(self, address: ReplicaAddress) -> bool:
        """False where there is none. Raises NotFound where the id is another volume's."""
        if address.replica not in self._hosted:
            return False
        hosted = self.find(address)
        del self._hosted[address.replica]
        # To its end, also where the caller hangs up: else its directory, and what it holds of the journal, stayed.
        deletion = self._loop.create_task(self._delete(hosted))
        self._deletions.add(deletion)
        deletion.add_done_callback(self._deletions.discard)
        await asyncio.shield(deletion)
        return True

    async def _delete(self, hosted: HostedReplica) -> None:
        self.catch_up.stop(hosted.replica)
        hosted.end_reads_beside()
        await hosted.close()
        await self._loop.run_in_executor(None, self.store.delete_replica, hosted.replica)
        self.repairer.forget(hosted.replica)
        if self.journal.forget(hosted.replica):
            self._writer.room_made()
        _log.info("replica deleted", replica=hosted.replica, volume=hosted.address.volume)

    def repair(self, hosted: HostedReplica, error: Corrupt) -> None:
        """Fetch the blocks that `error` names from peers, in the background; or have the replica filled anew."""
        self.repairer.start(hosted, error)

    def replica_statuses(self) -> Iterator[pb.ReplicaStatus]:
        """One after the other, of those that are there when it comes to them."""
        for replica in tuple(self._hosted):
            if hosted := self._hosted.get(replica):
                yield self._status(hosted)

    async def statuses(self) -> list[pb.ReplicaStatus]:
        """All of them: guests need not wait until a thousand are made, with each heartbeat."""
        found = []
        for status in self.replica_statuses():
            found.append(status)
            if len(found) % _STATUSES_AT_ONCE == 0:
                await asyncio.sleep(0)
        return found

    @property
    def full(self) -> bool:
        """Its disk, or a quota on it: also where only the tables of one replica have found no room."""
        return self.store.space.full or any(hosted.store.short for hosted in self._hosted.values())

    # ---- the end

    def fail(self, error: BaseException) -> None:
        """The disk cannot be trusted: mark every replica as suspect, and end the process.

        Design, section 3, rule 9: what the kernel dropped is not known.
        """
        if self.failed.done():
            return
        _log.critical("storage failed; the replicas here will be filled from their peers", exc_info=error)
        code = 1
        for replica in self._hosted:
            try:
                self.store.mark_suspect(replica)
            except OSError as failure:
                _log.critical("cannot even note that", replica=replica, error=str(failure))
                code = EXIT_DO_NOT_RESTART
        self.failed.set_result(code)

    async def close(self) -> None:
        """Bring what is committed into the tables, and let go of the disk."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*self._deletions, return_exceptions=True)
        self.repairer.stop()
        self.scrubber.note_all()
        for hosted in self.replicas():
            self.catch_up.stop(hosted.replica)
            if not self.failed.done():
                with contextlib.suppress(CairnError):  # it stays in the journal
                    await hosted.checkpoint()
        await self._writer.close()
        for hosted in self.replicas():
            await hosted.close()
        await self._peers.close()
        self.journal.close()
        self.store.close()

    # ---- inside

    def _host(self, store: ReplicaStore, recovered: Recovered) -> None:
        replica = store.address.replica
        damage: Position | None = recovered.damaged.get(replica)
        if self.store.is_suspect(replica):
            damage = UNKNOWN_FLOOR
        follower, effects = Follower.restore(replica, store.image, recovered.entries.get(replica, ()), damage=damage)
        hosted = self._add(store, follower)
        hosted.carry_out(effects)
        if what := self.store.damage_of(replica):
            self.repairer.start(hosted, Corrupt(what))
        if self.store.is_suspect(replica):
            # Once what the follower has just written about it is durable, the journal itself says so.
            hosted.when_durable(lambda: self.store.clear_suspect(replica))

    def _add(self, store: ReplicaStore, follower: Follower) -> HostedReplica:
        follower.full = self.store.space.full
        hosted = HostedReplica(store, follower, self._services)
        self._hosted[hosted.replica] = hosted
        return hosted

    def _note_damage(self, hosted: HostedReplica, what: str) -> None:
        """Also of the next start: a peer that asks for what was lost must not be the first to find out."""
        try:
            self.store.note_damage(hosted.replica, what)
        except OSError as error:  # then it is found again where it is read again
            _log.error("cannot note that tables are damaged", replica=hosted.replica, error=str(error))

    def _forget_damage(self, hosted: HostedReplica) -> None:
        """It is filled anew, or was: a crash may come between that and this."""
        if not hosted.closed:
            self.store.forget_damage(hosted.replica)

    def _status(self, hosted: HostedReplica) -> pb.ReplicaStatus:
        follower = hosted.follower
        return pb.ReplicaStatus(
            target=make_target(hosted.address, follower.epoch, follower.configuration),
            end=from_position(follower.durable_end),
            commit=from_position(follower.commit),
            applied=from_position(hosted.store.applied),
            whole=follower.whole,
            generation=follower.generation,
            unapplied_bytes=follower.unapplied_bytes,
            file_bytes=hosted.store.file_bytes(),
            corrupt_blocks_found=self.repairer.found.get(hosted.replica, 0),
            corrupt_blocks_repaired=self.repairer.repaired.get(hosted.replica, 0),
            damage=self.repairer.damage(hosted),
            scrub=self.scrubber.status(hosted),
            needs_peers=hosted.peers_moved or not hosted.peers,
        )

    async def _watch_space(self) -> None:
        while True:
            full = await self._loop.run_in_executor(None, self.store.space.poll, self.memory.total_bytes)
            for hosted in self._hosted.values():
                short = hosted.store.short or (full and not hosted.store.has_room(self._settings.reserve_bytes))
                if hosted.follower.full != short:
                    _log.warning("space", replica=hosted.replica, full=short)
                hosted.follower.full = short
            if not full:
                await self._prepare_journal()
            await asyncio.sleep(self._settings.heartbeat_s)

    async def _prepare_journal(self) -> None:
        """The journal's next file is made before a write has to wait for it."""
        try:
            await self._loop.run_in_executor(None, self.journal.prepare)
        except NoSpace as error:
            _log.warning("no room for the journal's next file", error=str(error))

    async def _guard(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except Exception as error:
            self.fail(error)


def open_sound(store: NodeStore, replicas: Iterable[ReplicaId]) -> dict[ReplicaId, ReplicaStore]:
    """The stores of the replicas whose tables can be opened; damaged tables are set aside.

    Only that replica is filled anew, with an unknown floor; the others serve. Where nobody knows whose the damaged
    tables are, the whole directory is set aside, and the node has no such replica any more.
    """
    opened = {}
    for replica in replicas:
        try:
            if store.lacks_tables(replica):
                store.check_address(replica)
            else:
                opened[replica] = store.open_replica(replica)
        except (Corrupt, NotFound) as error:  # NotFound: what has its name is no directory
            _set_aside(store, replica, error)
    return opened


def _set_aside(store: NodeStore, replica: ReplicaId, error: Corrupt | NotFound) -> None:
    try:
        store.check_address(replica)
    except Corrupt as nobody_knows:
        place = store.leave_out(replica)
        _log.error(
            "nothing can be made of a replica, which is set aside as a whole: another one has to take its place",
            replica=replica,
            place=str(place),
            error=str(error),
            address=str(nobody_knows),
        )
    else:
        _log.error("the tables cannot be opened, and are set aside", replica=replica, error=str(error))
        store.set_aside(replica)


def _check_source(store: ReplicaStore, source: bytes) -> None:
    """A repeated Create names the same source, or none once that has ended. Raises Conflict."""
    if source != store.origin and (source or store.has_source):
        raise Conflict(
            f"replica {store.address.replica} was made with the source {store.origin!r}, not {source!r}: "
            "delete it first"
        )
