"""One replica on its node: carries out what the follower asks for, in order.

The follower decides, the store and the journal do. Everything here runs in the node's event loop,
save what touches the tables for long: a checkpoint or a copy runs in a thread, one at a time for
each replica. Meanwhile events go on; only ResetLog, and whatever follows it, waits for the thread.

Invariant: `mark` and the follower's image move in one step of the loop, so that an image always
reflects every journal entry up to its mark.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, cast

import structlog

from blockstore.domain import Position, ReplicaAddress, ReplicaId, TablesPlace
from blockstore.errors import CairnError, Corrupt, NoSpace, NotFound, QuorumUnavailable
from blockstore.log import LogEntry, RecordEntry, SealEntry
from blockstore.node.journal_writer import JournalWriter
from blockstore.node.memory import MemoryBudget
from blockstore.replication.follower import Follower
from blockstore.replication.messages import (
    Answer,
    Append,
    AppendAnswer,
    Checkpoint,
    Commit,
    FencedBy,
    FetchDelta,
    FetchLog,
    FollowerEffect,
    Persist,
    ResetLog,
    SealAnswer,
    SealEpoch,
)
from blockstore.rpc import replica_pb2 as pb
from blockstore.storage.fence import NO_EPOCH, Fence, this_host
from blockstore.storage.journal import Journal, JournalEntry
from blockstore.storage.reads import BlockVersion
from blockstore.storage.replica_store import ReplicaStore
from blockstore.storage.tables import StorageFailed
from blockstore.units import Epoch

_log = structlog.get_logger(__name__)
AnswerMessage = SealAnswer | AppendAnswer | FencedBy


class Reply(Hashable, Protocol):
    """Where an answer goes. It may be gone by then."""

    def deliver(self, message: AnswerMessage) -> None: ...


class CatchesUp(Protocol):
    """Fetches from peers on a replica's behalf."""

    def start(self, hosted: "HostedReplica", effect: FetchLog | FetchDelta) -> None: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What a node's replicas share.

    tables: the threads that touch LMDB for long. readers: those that read it beside the guests.
    checkpoint_soon: called whenever a replica's unapplied bytes have grown; urgent where something waits
    for the checkpoint. damaged: called with what a copy from a peer found damaged here. fills_anew: called once it is
    durable that one which had lost content gives its tables up. fail: ends the node.
    """

    journal: Journal
    writer: JournalWriter
    memory: MemoryBudget
    tables: Executor
    readers: Executor
    catch_up: CatchesUp
    checkpoint_soon: Callable[["HostedReplica", bool], None]
    damaged: Callable[["HostedReplica", Corrupt], None]
    fills_anew: Callable[["HostedReplica"], None]
    fail: Callable[[BaseException], None]


class HostedReplica:
    """A follower, its store, and its share of the node's journal."""

    def __init__(self, store: ReplicaStore, follower: Follower, services: Services) -> None:
        self.store = store
        self.follower = follower
        self.address: ReplicaAddress = store.address
        self.peers: dict[ReplicaId, str] = {}
        """The addresses of the members' nodes, as a leader or control last gave them; empty where nobody knows."""
        self.peers_moved = False
        """None of them answers where it was: somebody should say where they are now."""
        self.dirty_since: float | None = None
        """Loop time at which the oldest record was committed that no checkpoint has applied."""
        self.closed = False
        self._services = services
        self._fence = _fence_of(store)
        self._mark = store.mark
        self._end = Position(max(follower.end.epoch, follower.epoch), follower.end.sequence)
        self._tables = asyncio.Lock()
        self._deferred: deque[FollowerEffect] = deque()

    @property
    def replica(self) -> ReplicaId:
        return self.address.replica

    # ---- events

    def carry_out(self, effects: Iterable[FollowerEffect]) -> None:
        """What the follower said, in order. Nothing of a replica that was closed."""
        if self.closed:
            return
        for effect in effects:
            if self._deferred or (isinstance(effect, ResetLog) and self._tables.locked()):
                self._deferred.append(effect)
            else:
                self._carry_out(effect)
        self._services.memory.update(self.replica, self.follower.unapplied_bytes)

    def append(self, reply: Reply, message: Append) -> None:
        damaged = self.follower.damaged
        self.carry_out(self.follower.append(reply, message))
        if damaged and not self.follower.damaged:
            _log.error("the replica is filled anew, as its leader says", replica=self.replica)
            self.when_durable(lambda: self._services.fills_anew(self))

    async def seal(self, message: SealEpoch) -> SealAnswer | FencedBy:
        """Everything that was accepted before is durable and counted in the answer.

        Raises NoSpace where those who read the tables beside the node cannot be told of it: nothing is sealed then.
        """
        reply = _OneReply()
        if message.epoch >= self.follower.epoch and not self.closed:
            self._put_fence(message.epoch)
        self.carry_out(self.follower.seal(reply, message))
        return cast(SealAnswer | FencedBy, await reply.future)

    def refuse_read(self, epoch: Epoch, configuration: int, commit: Position) -> CairnError | None:
        """None where this replica may answer a read at `commit`, and then has made it visible."""
        try:
            self.carry_out(self.follower.read(epoch, configuration, commit))
        except CairnError as error:
            return error
        return None

    @property
    def place(self) -> TablesPlace | None:
        """Where who runs on this machine can read the tables by itself; None where nobody can."""
        if self._fence is None:
            return None
        return TablesPlace(this_host(), str(self.store.directory.absolute()), self._fence.identity)

    def end_reads_beside(self) -> None:
        """The replica goes: nobody reads its tables any more."""
        with suppress(OSError):  # a deletion is what makes room
            if self._fence is not None:
                self._fence.put(NO_EPOCH)

    def _put_fence(self, epoch: Epoch) -> None:
        try:
            if self._fence is not None:
                self._fence.put(epoch)
        except OSError as error:
            raise NoSpace(f"the fence of {self.replica} cannot be written: {error}; free disk space there") from error

    def set_peers(self, peers: Iterable[pb.Peer]) -> None:
        """Where members are now; empty where that is not known."""
        for peer in peers:
            replica = ReplicaId(peer.replica)
            self.peers[replica] = peer.address or self.peers.get(replica, "")
            self.peers_moved = self.peers_moved and not peer.address

    def set_members(self, peers: Iterable[pb.Peer]) -> None:
        """The same, of all other members: who was one is none any more."""
        told = list(peers)
        for former in self.peers.keys() - {peer.replica for peer in told}:
            del self.peers[former]
        self.set_peers(told)

    def when_durable(self, call: Callable[[], None]) -> None:
        """Call once everything that was given to the journal so far is on disk."""
        self._services.writer.submit([], lambda _: call())

    # ---- tables

    async def checkpoint(self) -> None:
        """Bring all that is committed into the tables, and give up the journal below.

        That also where the tables are damaged and can apply nothing: they keep the log then. Raises Corrupt.
        """
        async with self._exclusive():
            if self.closed:
                return
            image, mark = self.follower.image(), self._mark
            dirty_since, self.dirty_since = self.dirty_since, None
            try:
                await self.in_thread(self.store.checkpoint, image, mark)
            except BaseException as error:
                self.dirty_since = dirty_since
                if isinstance(error, Corrupt):
                    await self._keep_log()
                raise
            self.carry_out(self.follower.checkpointed(image))
        self._release(mark)

    async def _keep_log(self) -> None:
        """Else the journal could not reuse the files that hold it, and the node's other replicas would wait."""
        image, mark = self.follower.image_of_log(), self._mark
        await self.in_thread(self.store.keep_log, image, mark)
        self.carry_out(self.follower.checkpointed(image))
        self._release(mark)

    def _release(self, mark: int) -> None:
        if self._services.journal.release(self.replica, mark):
            self._services.writer.room_made()

    async def copy(
        self, attempt: int, stated: Position, meta: bytes | None, extents: list[list[bytes]], *, absent: bool = False
    ) -> bool:
        """Write what a peer sent, as it was at `stated`. False where this attempt is over.

        absent: the extents are those of which it had nothing when the attempt began, at `stated`. Raises Corrupt
        where what came is damaged, or what it should be laid under.
        """
        async with self._exclusive():
            image = None if self.closed else self.follower.accept_copy(attempt, stated, absent=absent)
            if image is None:
                return False
            with self._telling_damage():
                await self.in_thread(self.store.write_copy, meta, extents, stated, image)
        return True

    async def held_extents(self) -> set[int]:
        """The extents of which there is anything here. Raises Corrupt."""
        with self._telling_damage():
            held: set[int] = await self.in_thread(self.store.held_extents)
        return held

    @contextmanager
    def _telling_damage(self) -> Iterator[None]:
        """Tables that nothing can be copied to are given up before the next try."""
        try:
            yield
        except Corrupt as error:
            if self.store.damage:
                self._services.damaged(self, error)
            raise

    async def repair(self, version: BlockVersion, block: bytes) -> bool:
        """Whether `block` passed the checksum that is kept for this version, and stands in the tables now."""
        async with self._exclusive():
            if self.closed:
                return False
            return bool(await self.in_thread(self.store.repairs.mend, *version, block))

    @asynccontextmanager
    async def reading_tables(self) -> AsyncIterator[None]:
        """While inside, no checkpoint moves the store's applied position."""
        async with self._exclusive():
            yield

    def check_serves(self) -> None:
        """Raises NotFound where it was deleted, QuorumUnavailable while it fills."""
        if self.closed:
            raise NotFound(f"replica {self.replica} was deleted")
        if not self.follower.whole:
            raise QuorumUnavailable(f"replica {self.replica} is filling: ask another one")

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run it in a thread that may touch the tables; cancelled, this still waits for the thread."""
        return await self._run_in(self._services.tables, function, *arguments)

    async def in_reader(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """As in_thread, for what only reads and may wait for the disk."""
        return await self._run_in(self._services.readers, function, *arguments)

    async def _run_in(self, threads: Executor, function: Callable[..., Any], *arguments: Any) -> Any:
        running = asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait((running,))
            raise
        except StorageFailed as error:
            self._services.fail(error)
            raise

    async def close(self) -> None:
        """Waits for what is in a thread; the store is closed afterwards."""
        self.closed = True
        async with self._tables:
            await self.in_thread(self.store.close)  # which waits for a compaction
        if self._fence is not None:
            self._fence.close()
            self._fence = None
        self._services.memory.update(self.replica, 0)

    @asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        """Alone with the tables. What was deferred follows however it ends: no image may come before it."""
        try:
            async with self._tables:
                yield
        finally:
            deferred, self._deferred = self._deferred, deque()
            self.carry_out(deferred)

    # ---- effects

    def _carry_out(self, effect: FollowerEffect) -> None:
        match effect:
            case Persist(number, entries):
                self._persist(number, entries)
            case Answer(origin, message):
                cast(Reply, origin).deliver(message)
            case Commit(records):
                self.store.commit(records)
                if self.dirty_since is None:
                    self.dirty_since = asyncio.get_running_loop().time()
                self._services.checkpoint_soon(self, False)
            case ResetLog():
                self.store.reset()
            case FetchLog() | FetchDelta():
                self._services.catch_up.start(self, effect)
            case Checkpoint():
                self._services.checkpoint_soon(self, True)

    def _persist(self, number: int, entries: tuple[LogEntry, ...]) -> None:
        self._services.writer.submit(
            [JournalEntry(self.replica, entry, self._end_with(entry)) for entry in entries],
            lambda last: self._persisted(number, last),
        )

    def _end_with(self, entry: LogEntry) -> Position:
        """At or above what may be acked with it, never falling: a truncate stands beside what replaces the tail.

        A seal counts: whoever loses it must not be made whole by a leader that it shuts out.
        """
        if isinstance(entry, RecordEntry):
            self._end = max(self._end, entry.record.position)
        elif isinstance(entry, SealEntry):
            self._end = max(self._end, Position(entry.epoch, self._end.sequence))
        return self._end

    def _persisted(self, number: int, last: int) -> None:
        if not self.closed:
            self._mark = last
            self.carry_out(self.follower.persisted(number))


def _fence_of(store: ReplicaStore) -> Fence | None:
    """None where none can be made, as on a full disk: then nobody reads the tables beside the node."""
    try:
        return Fence(store.directory)
    except OSError as error:
        _log.warning("nobody can read these tables beside the node", replica=store.address.replica, error=str(error))
        return None


class _OneReply:
    """The answer to one call."""

    def __init__(self) -> None:
        self.future: asyncio.Future[AnswerMessage] = asyncio.get_running_loop().create_future()

    def deliver(self, message: AnswerMessage) -> None:
        if not self.future.done():
            self.future.set_result(message)
