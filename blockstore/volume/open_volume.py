"""One segment of a volume that is attached here: reads and writes in, replicas behind it.

Blocks are counted from the segment's first; most volumes have one segment, and are this. All segments of one that
has more are in blockstore/volume/open_segments.py.

The leader (blockstore.replication) decides; this carries out what it asks for and keeps the futures of
those who wait. Everything runs in one event loop. The clock is the boot-time clock, for leases must
not stand still while a machine sleeps.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import structlog

from blockstore.boot_clock import boot_time_s
from blockstore.config import ShortCircuitMode
from blockstore.domain import Configuration, Position, ReplicaAddress, ReplicaId, SegmentNumber, TablesPlace
from blockstore.errors import CairnError, Conflict, NotFound
from blockstore.record import MAX_OPERATION_BLOCKS, Operation, OperationKind
from blockstore.replication.leader import Leader, LeaderSettings, LeaderStatus, MemberStatus
from blockstore.replication.messages import (
    AppendAnswer,
    Completed,
    Failed,
    FencedBy,
    LeaderEffect,
    Over,
    ReadDone,
    ReadDropped,
    ReadFrom,
    Reconnect,
    Relieved,
    SealAnswer,
    Sealed,
    Send,
    Serving,
)
from blockstore.rpc import replica_pb2
from blockstore.units import BLOCK_SIZE, MAX_RECORD_PAYLOAD, BlockNumber, Generation
from blockstore.volume.block_status import Changed, Shown, StatusQuery, changed_runs, shown_runs
from blockstore.volume.directory import MemberDirectory, Refresh
from blockstore.volume.futures import complete, fail, finished, joined, resolve
from blockstore.volume.member_link import MemberLink
from blockstore.volume.member_queries import MemberQueries
from blockstore.volume.member_session import AbsentRuns
from blockstore.volume.short_circuit import ShortCircuit
from blockstore.volume.ticket import Ticket

_log = structlog.get_logger(__name__)
#: How long members may take to hear that a record is committed, before that is left to the next heartbeat.
_KNOWN_S: Final = 1.0
_MAX_BLOCKS: Final = MAX_RECORD_PAYLOAD // BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class SparseBlocks:
    """What a read brought of a volume whose source has blocks that it lacks itself.

    data: all blocks that were asked for. absent: runs (first, count) of blocks, counted from the first, that have
    no entry: zeroes in `data`, and the source's where that maps them.
    """

    data: memoryview
    absent: AbsentRuns


@dataclass(frozen=True, slots=True)
class SealedAt:
    """A generation that a SEAL closed, and where the SEAL stands in the log."""

    generation: Generation
    position: Position


class OpenVolume:
    """Blocks of one segment, for the NBD server; see nbd_server.volume.Volume for the calls' contract.

    `over` is done, with the error, when this attachment has ended for good: nothing is served after.
    """

    def __init__(
        self,
        ticket: Ticket,
        settings: LeaderSettings,
        call_timeout_s: float,
        refresh: Refresh,
        *,
        short_circuit: ShortCircuitMode = ShortCircuitMode.NEVER,
    ) -> None:
        """short_circuit: whether the tables of members on this machine are read without their nodes."""
        loop = asyncio.get_running_loop()
        self.volume = ticket.volume
        self.epoch = ticket.epoch
        self.over: asyncio.Future[CairnError] = loop.create_future()
        self._size_bytes = ticket.size_bytes
        self._loop = loop
        self._heartbeat_s = settings.heartbeat_s
        self._serving: asyncio.Future[None] = loop.create_future()
        self._heard = asyncio.Event()
        """Set by each answer of a member, and at the end."""
        self._arrived: dict[int, memoryview | SparseBlocks | replica_pb2.BlockStatusResponse] = {}
        self._naming_absent: set[asyncio.Future[Any]] = set()
        """Reads whose caller is told what is absent. By read: one may end after the source is needed no more."""
        self._generations: dict[str, Generation] = {}
        """That snapshots sealed; it never changes."""
        self._queries: dict[object, StatusQuery] = {}
        """Reads that ask what blocks are, not for their content."""
        self._leader = Leader(
            ticket.epoch,
            ticket.configuration,
            settings,
            boot_time_s(),
            accept_loss=ticket.accept_loss,
            loss_epochs=ticket.loss_epochs,
        )
        self._gathering: asyncio.TimerHandle | None = None
        self._directory = MemberDirectory(ticket, refresh)
        self.members = MemberQueries(self._whole_members, ticket.epoch, ticket.configuration.number, call_timeout_s)
        self._segment = ticket.segment
        self._call_timeout_s = call_timeout_s
        self._short_circuit: ShortCircuit | None = None
        if short_circuit is not ShortCircuitMode.NEVER:
            always = short_circuit is ShortCircuitMode.ALWAYS
            self._short_circuit = ShortCircuit(self._leader, boot_time_s, 2 * settings.heartbeat_s, always=always)
        self._links: dict[ReplicaId, MemberLink] = {}
        self._dialling: dict[ReplicaId, asyncio.Task[None]] = {}
        self._hanging_up: set[asyncio.Task[None]] = set()
        self._link_up(ticket.configuration)
        self._ticking = loop.create_task(self._tick())

    # ---- attachment

    async def wait_until_served(self) -> None:
        """Raises what ended this attachment."""
        await asyncio.shield(self._serving)

    @property
    def serving(self) -> bool:
        return self._serving.done() and not self.over.done()

    @property
    def why(self) -> str:
        """What it waits for; empty while it serves with every member."""
        away = [f"{replica}: {link.why}" for replica, link in self._links.items() if link.why]
        return "; ".join(filter(None, [self._leader.status().why, *away]))

    def status(self) -> LeaderStatus:
        return self._leader.status()

    def link_trouble(self, replica: ReplicaId) -> str:
        """Why there is no connection to this member; empty where there is one."""
        return self._links[replica].why

    def _whole_members(self) -> list[tuple[ReplicaAddress, str]]:
        """The members that have every committed record, and where they are."""
        status = self._leader.status()
        whole = [
            each.replica
            for each in status.members
            if each.sealed and each.whole and each.matched.sequence >= status.commit.sequence
        ]
        return [(self._links[replica].address, self._directory.peer(replica).address) for replica in whole]

    async def close(self) -> None:
        """Let go: what is not answered by now is not. The next attachment finds every acknowledged write."""
        if not self.over.done():
            _log.info("attachment closed", volume=self.volume, epoch=self.epoch)
            self._conclude(Conflict(f"{self.volume} was detached"))
        if self._gathering is not None:
            self._gathering.cancel()
        tasks = [*self._dialling.values(), *self._hanging_up, self._ticking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._short_circuit is not None:
            self._short_circuit.close()
        # Their errors keep the frames in which the calls to members are.
        self._dialling.clear()
        self._hanging_up.clear()

    # ---- members

    @property
    def segment(self) -> SegmentNumber:
        """Which one of the volume's this is."""
        return self._segment

    @property
    def short_circuit_reads(self) -> int:
        """How many reads were answered out of a member's tables on this machine."""
        return 0 if self._short_circuit is None else self._short_circuit.reads

    @property
    def configuration(self) -> Configuration:
        """Its members."""
        return self._leader.configuration

    @property
    def settled(self) -> int:
        """The number of the configuration whose quorum holds all that is committed; 0 where none does for sure."""
        return self._leader.settled

    def reconfigure(self, configuration: Configuration, addresses: Mapping[ReplicaId, str]) -> None:
        """Go on under this one, which control has put into the volume's record. What is older changes nothing."""
        self._directory.learn(configuration, addresses)
        before = self._leader.configuration
        effects = self._leader.reconfigure(configuration, boot_time_s())
        after = self._leader.configuration
        if after != before:
            members = [member.replica for member in after.everyone]
            _log.info("members change", volume=self.volume, configuration=after.number, members=members)
            self._link_up(after)
        self._carry_out(effects)
        self._heard.set()

    def _link_up(self, configuration: Configuration) -> None:
        """A link to everyone, and to nobody else."""
        replicas = [member.replica for member in configuration.everyone]
        for gone in [replica for replica in self._links if replica not in replicas]:
            del self._links[gone]
            task = self._dialling.pop(gone)
            task.cancel()
            self._hanging_up.add(task)
            task.add_done_callback(self._hanging_up.discard)
            if self._short_circuit is not None:
                self._short_circuit.forget(gone)
        for replica in replicas:
            if replica not in self._links:
                address = ReplicaAddress(self.volume, self._segment, replica)
                link = self._links[replica] = MemberLink(address, self, self._directory, self._call_timeout_s)
                self._dialling[replica] = self._loop.create_task(link.run())

    # ---- I/O

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def grow(self, size_bytes: int) -> None:
        """A volume never shrinks."""
        self._size_bytes = max(size_bytes, self._size_bytes)

    def read(self, start: int, count: int) -> asyncio.Future[bytes | memoryview]:
        if count <= _MAX_BLOCKS:
            return self._read(start, count)
        parts = [
            self._read(at, min(_MAX_BLOCKS, start + count - at)) for at in range(start, start + count, _MAX_BLOCKS)
        ]
        return cast("asyncio.Future[bytes | memoryview]", self._loop.create_task(joined(parts)))

    def write(self, start: int, data: bytes | bytearray | memoryview) -> asyncio.Future[None]:
        size = len(data)
        if size <= MAX_RECORD_PAYLOAD:
            return self._submit(OperationKind.WRITE, start, size // BLOCK_SIZE, data)
        view = memoryview(data)
        return self._all(
            self._submit(
                OperationKind.WRITE,
                start + at // BLOCK_SIZE,
                min(MAX_RECORD_PAYLOAD, size - at) // BLOCK_SIZE,
                view[at : at + MAX_RECORD_PAYLOAD],
            )
            for at in range(0, size, MAX_RECORD_PAYLOAD)
        )

    def trim(self, start: int, count: int) -> asyncio.Future[None]:
        return self._submit_long(OperationKind.TRIM, start, count)

    def zero(self, start: int, count: int, *, allocate: bool) -> asyncio.Future[None]:
        return self._submit_long(OperationKind.ZERO if allocate else OperationKind.TRIM, start, count)

    @property
    def zero_is_fast(self) -> bool:
        """A record without a payload, however many blocks it names."""
        return True

    def cache(self, start: int, count: int) -> asyncio.Future[None]:
        """All that there is lies on the members' disks already."""
        return self._nothing_to_do()

    def flush(self) -> asyncio.Future[None]:
        """What was answered is on a quorum's disks already."""
        return self._nothing_to_do()

    def _nothing_to_do(self) -> asyncio.Future[None]:
        done: asyncio.Future[None] = self._loop.create_future()
        done.set_result(None)
        return done

    # ---- snapshots and the source

    def read_present(self, start: int, count: int) -> "asyncio.Future[SparseBlocks | bytes | memoryview]":
        """At most MAX_RECORD_PAYLOAD; says which blocks are absent, where the member that answers has a source."""
        assert count <= _MAX_BLOCKS
        future = self._read(start, count)
        self._naming_absent.add(future)
        future.add_done_callback(self._naming_absent.discard)
        return cast("asyncio.Future[SparseBlocks | bytes | memoryview]", future)

    def block_status(
        self, start: int, count: int, query: StatusQuery
    ) -> "asyncio.Future[replica_pb2.BlockStatusResponse]":
        """A read that asks what these blocks are: the same member, leases and commit as for any other."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self._queries[future] = query
        future.add_done_callback(self._queries.pop)
        self._carry_out(self._leader.read(future, BlockNumber(start), count, boot_time_s()))
        return future

    def shown(self, start: int, count: int) -> "asyncio.Future[list[Shown]]":
        return self._loop.create_task(self._shown(start, count))

    async def _shown(self, start: int, count: int) -> list[Shown]:
        return shown_runs(await self.block_status(start, count, StatusQuery()))

    def changed(self, start: int, count: int, snapshot: str) -> "asyncio.Future[list[Changed]]":
        return self._loop.create_task(self._changed(start, count, snapshot))

    async def _changed(self, start: int, count: int, snapshot: str) -> list[Changed]:
        generation = self._generations.get(snapshot)
        if generation is None:
            await self.snapshots()
            generation = self._generations.get(snapshot)
        if generation is None:
            raise NotFound(f"{self.volume} keeps no snapshot {snapshot}: what changed since cannot be told")
        return changed_runs(await self.block_status(start, count, StatusQuery(generation)))

    async def snapshots(self) -> dict[str, Generation]:
        """The snapshots that the members keep, oldest first, by what was sealed for each. Raises QuorumUnavailable."""
        described = await self.members.describe(self._leader.status().commit, self._call_timeout_s)
        kept: dict[str, Generation] = {}
        for each in described.sealed:
            if each.argument in each.pins:
                kept.setdefault(each.argument.decode(errors="replace"), Generation(each.generation))
        self._generations.update(kept)
        return kept

    def fill(self, start: int, data: bytes | memoryview) -> asyncio.Future[None]:
        """Blocks of the source, at most MAX_RECORD_PAYLOAD: they lie below whatever the guest has written."""
        return self._submit(OperationKind.FILL, start, len(data) // BLOCK_SIZE, data)

    def discard(self, start: int, count: int) -> asyncio.Future[None]:
        """A trim of blocks that the source does not map: nothing has to stay in their place."""
        return self._submit_long(OperationKind.DISCARD, start, count)

    def hydrated(self) -> asyncio.Future[None]:
        """The source is needed no more. From this call on nothing can be filled."""
        return self._control(Operation(OperationKind.HYDRATED))

    def seal(self, argument: bytes) -> asyncio.Future[SealedAt]:
        """Close the current generation, and pin it. argument: the snapshot's id."""
        return self._control(Operation(OperationKind.SEAL, argument=argument))

    async def wait_until_known(self, position: Position) -> None:
        """Until every whole member that is here knows that `position` is committed, or for _KNOWN_S.

        A record that nobody but this front-end knows to be committed takes no effect before the next attachment.
        """
        try:
            async with asyncio.timeout(_KNOWN_S):
                await self._until(lambda: self._is_known(position))
        except TimeoutError:
            _log.warning("members have not heard of a commit", volume=self.volume, position=tuple(position))

    async def wait_for_slow_members(self, lag_bytes: int) -> None:
        """Until none that is here and whole is further behind: for who writes in the background.

        A member that is left behind by more than the log retains has to copy tables. One that stands still is not here
        for long: its connection is probed.
        """
        await self._until(lambda: all((member.lag_bytes or 0) <= lag_bytes for member in self._whole_here()))

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Looked at again with each answer of a member; or until the end."""
        while not self.over.done() and not condition():
            self._heard.clear()
            await self._heard.wait()

    def _is_known(self, position: Position) -> bool:
        here = self._whole_here()
        return bool(here) and all(member.commit >= position for member in here)

    def _whole_here(self) -> list[MemberStatus]:
        """The members that are here and whole."""
        return [member for member in self._leader.status().members if member.sealed and member.whole]

    def unpin(self, generation: Generation, argument: bytes) -> asyncio.Future[None]:
        """Nothing more is wanted of a sealed generation on behalf of this snapshot; idempotent."""
        return self._control(Operation(OperationKind.UNPIN, BlockNumber(generation), argument=argument))

    def _control(self, operation: Operation) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        self._carry_out(self._leader.submit(future, operation, boot_time_s()))
        return future

    def _read(self, start: int, count: int) -> asyncio.Future[bytes | memoryview]:
        future: asyncio.Future[bytes | memoryview] = self._loop.create_future()
        found = None if self._short_circuit is None else self._short_circuit.read(start, count)
        if found is not None:
            future.set_result(found)
            return future
        self._carry_out(self._leader.read(future, BlockNumber(start), count, boot_time_s()))
        return future

    def _submit(
        self, kind: OperationKind, start: int, count: int, data: bytes | bytearray | memoryview = b""
    ) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        operation = Operation(kind, BlockNumber(start), count, cast(bytes, data))
        self._carry_out(self._leader.submit(future, operation, boot_time_s()))
        return future

    def _submit_long(self, kind: OperationKind, start: int, count: int) -> asyncio.Future[None]:
        if count <= MAX_OPERATION_BLOCKS:
            return self._submit(kind, start, count)
        steps = range(start, start + count, MAX_OPERATION_BLOCKS)
        return self._all(self._submit(kind, at, min(MAX_OPERATION_BLOCKS, start + count - at)) for at in steps)

    def _all(self, parts: Iterable[asyncio.Future[None]]) -> asyncio.Future[None]:
        """Done when all are; with the first error where one failed."""
        return cast("asyncio.Future[None]", self._loop.create_task(finished(list(parts))))

    # ---- what links tell

    def connected(self, replica: ReplicaId) -> None:
        self._carry_out(self._leader.connected(replica, boot_time_s()))

    def tables_found(self, replica: ReplicaId, place: TablesPlace) -> None:
        if self._short_circuit is not None:
            self._short_circuit.learn(replica, place)

    def disconnected(self, replica: ReplicaId) -> None:
        if self._short_circuit is not None:
            self._short_circuit.forget(replica)
        self._carry_out(self._leader.disconnected(replica, boot_time_s()))
        self._heard.set()

    def answered(self, replica: ReplicaId, message: SealAnswer | AppendAnswer | FencedBy) -> None:
        now = boot_time_s()
        self._carry_out(self._leader.answered(replica, message, now))
        self._gather(now)
        self._heard.set()

    def read_arrived(self, attempt: int, data: memoryview) -> None:
        self._arrived[attempt] = data
        self._carry_out(self._leader.read_arrived(attempt, boot_time_s()))

    def read_arrived_in_part(self, attempt: int, data: memoryview, absent: AbsentRuns) -> None:
        self._arrived[attempt] = SparseBlocks(data, absent)
        self._carry_out(self._leader.read_arrived(attempt, boot_time_s()))

    def status_arrived(self, attempt: int, response: replica_pb2.BlockStatusResponse) -> None:
        self._arrived[attempt] = response
        self._carry_out(self._leader.read_arrived(attempt, boot_time_s()))

    def read_failed(self, attempt: int, error: CairnError) -> None:
        self._carry_out(self._leader.read_failed(attempt, error, boot_time_s()))

    def _gather(self, now: float) -> None:
        """Have the leader told when no more writes are to be waited for."""
        until = self._leader.gathers_until
        if until is not None and self._gathering is None:
            self._gathering = self._loop.call_later(until - now, self._send_gathered)

    def _send_gathered(self) -> None:
        self._gathering = None
        now, until = boot_time_s(), self._leader.gathers_until
        if until is not None and until > now:
            self._gather(now)  # it was set for a commit before
        else:
            self._carry_out(self._leader.send_gathered(now))

    # ---- what the leader asks for

    def _carry_out(self, effects: Iterable[LeaderEffect]) -> None:
        for effect in effects:
            match effect:
                case Send(replica, message):
                    self._links[replica].send(message)
                case Reconnect(replica):
                    self._links[replica].reconnect()
                case Completed(tickets):
                    complete(tickets)
                case ReadFrom():
                    self._ask(effect)
                case ReadDone(ticket, attempt):
                    self._read_done(ticket, self._arrived.pop(attempt))
                case ReadDropped(attempt):
                    self._arrived.pop(attempt, None)
                case Failed(tickets, error):
                    fail(tickets, error)
                case Sealed(ticket, generation, position):
                    resolve(ticket, SealedAt(generation, position))
                case Serving():
                    _log.info("volume is served", volume=self.volume, epoch=self.epoch)
                    resolve(self._serving, None)
                case Relieved():
                    pass  # the NBD server's own limits hold its clients back
                case Over(error):
                    self._end(error)

    def _ask(self, effect: ReadFrom) -> None:
        query = self._queries.get(effect.ticket) if self._queries else None
        if query is None:
            self._links[effect.replica].read(effect)
        else:
            self._links[effect.replica].ask(effect, query)

    def _read_done(self, ticket: object, found: memoryview | SparseBlocks | replica_pb2.BlockStatusResponse) -> None:
        if isinstance(found, SparseBlocks) and ticket not in self._naming_absent:
            found = found.data
        resolve(ticket, found)

    def _end(self, error: CairnError) -> None:
        _log.warning("attachment ended", volume=self.volume, epoch=self.epoch, error=str(error))
        self._conclude(error)

    def _conclude(self, error: CairnError) -> None:
        fail([self._serving], error)
        self._serving.exception()  # nobody has to wait for it
        if not self.over.done():
            self.over.set_result(error)
        self._heard.set()

    async def _tick(self) -> None:
        while True:
            self._carry_out(self._leader.tick(boot_time_s()))
            for link in self._links.values():
                link.check()
            if self._short_circuit is not None:
                self._short_circuit.check()
            await asyncio.sleep(self._heartbeat_s / 2)
