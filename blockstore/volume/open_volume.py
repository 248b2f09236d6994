"""A volume that is attached here: reads and writes in, replicas behind it.

The leader (blockstore.replication) decides; this carries out what it asks for and keeps the futures of
those who wait. Everything runs in one event loop. The clock is the boot-time clock, for leases must
not stand still while a machine sleeps.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

import structlog

from blockstore.domain import ORIGIN, Configuration, Position, ReplicaAddress, ReplicaId, SegmentNumber, VolumeId
from blockstore.errors import CairnError, Conflict
from blockstore.record import Operation, OperationKind
from blockstore.replica_codec import peer_of
from blockstore.replication.leader import Leader, LeaderSettings, LeaderStatus
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
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import BLOCK_SIZE, MAX_RECORD_PAYLOAD, BlockNumber, Epoch, Generation
from blockstore.volume.member_link import MemberLink

_log = structlog.get_logger(__name__)
_MAX_BLOCKS: Final = MAX_RECORD_PAYLOAD // BLOCK_SIZE
#: Control is not asked more often than this where members are.
_REFRESH_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """All that it takes to open a volume. addresses, known: by replica, of all members.

    known: the highest position that control was ever told for a replica.
    """

    volume: VolumeId
    segment: SegmentNumber
    size_bytes: int
    epoch: Epoch
    configuration: Configuration
    addresses: dict[ReplicaId, str]
    known: dict[ReplicaId, Position]
    accept_loss: bool = False


Refresh = Callable[[], Awaitable[dict[ReplicaId, str]]]
"""Asks control where the members are now."""


def boot_time_s() -> float:
    """Seconds on the clock that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class OpenVolume:
    """Blocks of one volume, for the NBD server; see nbd_server.volume.Volume for the calls' contract.

    `over` is done, with the error, when this attachment has ended for good: nothing is served after.
    """

    def __init__(self, ticket: Ticket, settings: LeaderSettings, call_timeout_s: float, refresh: Refresh) -> None:
        loop = asyncio.get_running_loop()
        self.volume = ticket.volume
        self.epoch = ticket.epoch
        self.over: asyncio.Future[CairnError] = loop.create_future()
        self._size_bytes = ticket.size_bytes
        self._loop = loop
        self._heartbeat_s = settings.heartbeat_s
        self._serving: asyncio.Future[None] = loop.create_future()
        self._arrived: dict[int, memoryview] = {}
        self._leader = Leader(
            ticket.epoch, ticket.configuration, settings, boot_time_s(), accept_loss=ticket.accept_loss
        )
        directory = _Directory(ticket, refresh)
        self._links = {
            member.replica: MemberLink(
                ReplicaAddress(ticket.volume, ticket.segment, member.replica), self, directory, call_timeout_s
            )
            for member in ticket.configuration.members
        }
        self._tasks = [loop.create_task(link.run()) for link in self._links.values()]
        self._tasks.append(loop.create_task(self._tick()))

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

    async def close(self) -> None:
        """Let go: what is not answered by now is not. The next attachment finds every acknowledged write."""
        if not self.over.done():
            self._end(Conflict(f"{self.volume} was detached"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()  # their errors keep the frames in which the calls to members are

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
        return cast("asyncio.Future[bytes | memoryview]", self._loop.create_task(_joined(parts)))

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
        return self._submit(OperationKind.TRIM, start, count)

    def zero(self, start: int, count: int, *, allocate: bool) -> asyncio.Future[None]:
        return self._submit(OperationKind.ZERO if allocate else OperationKind.TRIM, start, count)

    def flush(self) -> asyncio.Future[None]:
        """What was answered is on a quorum's disks already."""
        done: asyncio.Future[None] = self._loop.create_future()
        done.set_result(None)
        return done

    def seal(self, argument: bytes) -> asyncio.Future[Generation]:
        """Close the current generation; done with its number. argument: the snapshot's id."""
        future: asyncio.Future[Generation] = self._loop.create_future()
        self._carry_out(self._leader.submit(future, Operation(OperationKind.SEAL, argument=argument), boot_time_s()))
        return future

    def _read(self, start: int, count: int) -> asyncio.Future[bytes | memoryview]:
        future: asyncio.Future[bytes | memoryview] = self._loop.create_future()
        self._carry_out(self._leader.read(future, BlockNumber(start), count, boot_time_s()))
        return future

    def _submit(
        self, kind: OperationKind, start: int, count: int, data: bytes | bytearray | memoryview = b""
    ) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        operation = Operation(kind, BlockNumber(start), count, cast(bytes, data))
        self._carry_out(self._leader.submit(future, operation, boot_time_s()))
        return future

    def _all(self, parts: Iterable[asyncio.Future[None]]) -> asyncio.Future[None]:
        """Done when all are; with the first error where one failed."""
        return cast("asyncio.Future[None]", self._loop.create_task(_gathered(list(parts))))

    # ---- what links tell

    def connected(self, replica: ReplicaId) -> None:
        self._carry_out(self._leader.connected(replica, boot_time_s()))

    def disconnected(self, replica: ReplicaId) -> None:
        self._carry_out(self._leader.disconnected(replica, boot_time_s()))

    def answered(self, replica: ReplicaId, message: SealAnswer | AppendAnswer | FencedBy) -> None:
        self._carry_out(self._leader.answered(replica, message, boot_time_s()))

    def read_arrived(self, attempt: int, data: memoryview) -> None:
        self._arrived[attempt] = data
        self._carry_out(self._leader.read_arrived(attempt, boot_time_s()))

    def read_failed(self, attempt: int, error: CairnError) -> None:
        self._carry_out(self._leader.read_failed(attempt, error, boot_time_s()))

    # ---- what the leader asks for

    def _carry_out(self, effects: Iterable[LeaderEffect]) -> None:
        for effect in effects:
            match effect:
                case Send(replica, message):
                    self._links[replica].send(message)
                case Reconnect(replica):
                    self._links[replica].reconnect()
                case Completed(tickets):
                    _complete(tickets)
                case ReadFrom():
                    self._links[effect.replica].read(effect)
                case ReadDone(ticket, attempt):
                    _resolve(ticket, self._arrived.pop(attempt))
                case ReadDropped(attempt):
                    self._arrived.pop(attempt, None)
                case Failed(tickets, error):
                    _fail(tickets, error)
                case Sealed(ticket, generation):
                    _resolve(ticket, generation)
                case Serving():
                    _log.info("volume is served", volume=self.volume, epoch=self.epoch)
                    _resolve(self._serving, None)
                case Relieved():
                    pass  # the NBD server's own limits hold its clients back
                case Over(error):
                    self._end(error)

    def _end(self, error: CairnError) -> None:
        _log.warning("attachment ended", volume=self.volume, epoch=self.epoch, error=str(error))
        _fail([self._serving], error)
        self._serving.exception()  # nobody has to wait for it
        if not self.over.done():
            self.over.set_result(error)

    async def _tick(self) -> None:
        while True:
            self._carry_out(self._leader.tick(boot_time_s()))
            for link in self._links.values():
                link.check()
            await asyncio.sleep(self._heartbeat_s / 2)


class _Directory:
    """Where the members are: as the ticket said, then as control says."""

    def __init__(self, ticket: Ticket, refresh: Refresh) -> None:
        self._ticket = ticket
        self._addresses = dict(ticket.addresses)
        self._refresh = refresh
        self._asked_at = boot_time_s()

    def peer(self, replica: ReplicaId) -> pb.Peer:
        member = next(each for each in self._ticket.configuration.members if each.replica == replica)
        return peer_of(member, self._addresses.get(replica, ""))

    def peers(self) -> list[pb.Peer]:
        return [self.peer(member.replica) for member in self._ticket.configuration.members]

    def known(self, replica: ReplicaId) -> Position:
        return self._ticket.known.get(replica, ORIGIN)

    async def refresh(self) -> None:
        if boot_time_s() - self._asked_at < _REFRESH_S:
            return
        self._asked_at = boot_time_s()
        try:
            self._addresses.update(await self._refresh())
        except CairnError as error:
            _log.warning("cannot ask control where members are", volume=self._ticket.volume, error=str(error))


def _resolve(ticket: object, value: Any) -> None:
    future = cast("asyncio.Future[Any]", ticket)
    if not future.done():
        future.set_result(value)


def _complete(tickets: Iterable[object]) -> None:
    for ticket in tickets:
        _resolve(ticket, None)


def _fail(tickets: Iterable[object], error: CairnError) -> None:
    for ticket in tickets:
        future = cast("asyncio.Future[Any]", ticket)
        if not future.done():
            future.set_exception(error)


async def _gathered(parts: list[asyncio.Future[None]]) -> None:
    await asyncio.wait(parts)
    for part in parts:
        part.result()


async def _joined(parts: list[asyncio.Future[bytes | memoryview]]) -> bytes:
    await asyncio.wait(parts)
    return b"".join([part.result() for part in parts])
