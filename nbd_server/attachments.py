"""The volumes that are attached to this front-end, each as one attempt by epoch.

An attempt opens a volume at its epoch, exports it under its id and its name once it is served (unless it is
for maintenance), and ends for good when it is closed, replaced by one of a newer epoch, or over (fenced, or
with records lost). No epoch is ever opened twice. A fenced attempt takes no new clients, but leaves those that it
has: each of their requests fails with ESHUTDOWN, so that they hear of it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping

import structlog

from blockstore.config import ShortCircuitMode
from blockstore.domain import ReplicaId, VolumeId
from blockstore.errors import Fenced, NotFound
from blockstore.replication.leader import LeaderSettings
from blockstore.rpc import control_pb2 as pb
from blockstore.volume.control_messages import addresses_of, to_source, to_tickets
from blockstore.volume.open_volume import OpenVolume
from blockstore.volume.ticket import Ticket
from nbd_server.attempt import Attempt
from nbd_server.server import NbdServer

_log = structlog.get_logger(__name__)

AskControl = Callable[[VolumeId, int], Awaitable[pb.OpenTicket]]
"""GetAttachment of a volume at an epoch."""


class Attachments:
    """All attempts of this process, the latest of each volume."""

    def __init__(
        self,
        server: NbdServer,
        settings: LeaderSettings,
        call_timeout_s: float,
        ask_control: AskControl,
        *,
        short_circuit: ShortCircuitMode = ShortCircuitMode.NEVER,
    ) -> None:
        """short_circuit: as OpenVolume's."""
        self._server = server
        self._settings = settings
        self._call_timeout_s = call_timeout_s
        self._short_circuit = short_circuit
        self._ask_control = ask_control
        self._attempts: dict[VolumeId, Attempt] = {}
        self._closed: dict[VolumeId, int] = {}
        """The highest epoch that was closed here."""
        self._turn: dict[VolumeId, asyncio.Lock] = {}
        self.snapshot_names: Callable[[VolumeId], Awaitable[Mapping[str, int]]] | None = None
        """Asks control what a volume's snapshots are called; see SnapshotNames of nbd_server/exports.py."""

    def __iter__(self) -> Iterator[Attempt]:
        return iter(list(self._attempts.values()))

    def reports(self) -> Iterator[pb.VolumeReport]:
        """What control is to know of each."""
        for attempt in self:
            report = attempt.report()
            report.clients = self._server.clients_of(attempt.exports)
            yield report

    def find(self, volume: VolumeId) -> Attempt | None:
        return self._attempts.get(volume)

    def served(self, volume: str, epoch: int) -> Attempt:
        """The attempt of exactly that epoch. Raises NotFound where it is not served here (any more)."""
        attempt = self._attempts.get(VolumeId(volume))
        if attempt is None or attempt.epoch != epoch or not attempt.is_served:
            raise NotFound(f"{volume} is not served here at epoch {epoch}")
        return attempt

    async def open(self, message: pb.OpenTicket) -> None:
        """Serve the volume at the ticket's epoch; returns once it is served.

        An attempt goes on when the caller has gone. Raises Fenced for an epoch that is over here, and
        what ended the attempt.
        """
        volume = VolumeId(message.volume)
        async with self._turn.setdefault(volume, asyncio.Lock()):
            attempt = self._attempts.get(volume)
            highest = max(attempt.epoch if attempt else 0, self._closed.get(volume, 0) + 1)
            if message.epoch < highest:
                raise Fenced(f"epoch {message.epoch} of {volume} is over at this front-end")
            if attempt is None or attempt.epoch < message.epoch:
                if attempt is not None:
                    await self._end(attempt)
                attempt = self._begin(message)
        try:
            await asyncio.shield(attempt.served)
        except asyncio.CancelledError:
            if not attempt.served.cancelled():
                raise  # who asked has gone
            raise Fenced(f"epoch {attempt.epoch} of {volume} was ended here before it was served") from None

    async def close(self, volume: VolumeId, epoch: int) -> bool:
        """End the attempt of that epoch or an older one, and disconnect its clients. False where none is open."""
        async with self._turn.setdefault(volume, asyncio.Lock()):
            self._closed[volume] = max(epoch, self._closed.get(volume, 0))
            attempt = self._attempts.get(volume)
            if attempt is None or attempt.epoch > epoch:
                return False
            await self._end(attempt)
            del self._attempts[volume]
            return True

    async def close_all(self) -> None:
        for volume, attempt in list(self._attempts.items()):
            await self.close(volume, attempt.epoch)

    async def grow(self, attempt: Attempt, size_bytes: int) -> None:
        """Show what control says that the volume has grown to: in its last segment, and by further ones.

        Raises what keeps control or a new segment away; the volume is as before then.
        """
        async with attempt.growing:
            if size_bytes <= attempt.volume.size_bytes or not attempt.is_served:
                return
            known = len(attempt.volume.segments)
            tickets = to_tickets(await self._ask_control(attempt.volume.volume, attempt.epoch))
            further = [self._open_segment(each) for each in tickets[known:]]
            await attempt.extend(tickets[known - 1].size_bytes, further)
            _log.info(
                "volume has grown", volume=attempt.volume.volume, size_bytes=attempt.volume.size_bytes, new=len(further)
            )

    def _open_segment(self, ticket: Ticket) -> OpenVolume:
        async def refresh() -> dict[ReplicaId, str]:
            return addresses_of((await self._ask_control(ticket.volume, ticket.epoch)).segments)

        return OpenVolume(ticket, self._settings, self._call_timeout_s, refresh, short_circuit=self._short_circuit)

    def _begin(self, message: pb.OpenTicket) -> Attempt:
        tickets = to_tickets(message)
        source = to_source(message.source) if message.HasField("source") else None
        attempt = Attempt(
            message,
            [self._open_segment(each) for each in tickets],
            source,
            retry_limit_s=self._settings.retry_limit_s,
            call_timeout_s=self._call_timeout_s,
            guests_wait=self._guests_wait,
        )
        attempt.served = asyncio.get_running_loop().create_task(self._serve(attempt))
        attempt.served.add_done_callback(_retrieved)
        attempt.volume.over.add_done_callback(lambda _: self._take_out(attempt))
        self._attempts[attempt.volume.volume] = attempt
        return attempt

    def _guests_wait(self) -> bool:
        return self._server.in_flight_requests > 0

    async def _serve(self, attempt: Attempt) -> None:
        await attempt.open()
        for export in attempt.make_exports(self.snapshot_names):
            self._server.exports.add(export)
            attempt.exports.append(export)

    def _take_out(self, attempt: Attempt) -> None:
        """New clients do not find it any more."""
        for export in attempt.exports:
            if self._server.exports.find(export.name) is export:
                self._server.exports.remove(export.name)

    async def _end(self, attempt: Attempt) -> None:
        attempt.served.cancel()
        self._take_out(attempt)
        attempt.barriers.close()
        await asyncio.gather(*(self._server.end_connections(export) for export in attempt.exports))
        await attempt.close()


def _retrieved(task: "asyncio.Task[None]") -> None:
    """Who waits for it hears of its end; where nobody does, the report to control says it."""
    if not task.cancelled() and task.exception() is not None:
        _log.warning("a volume could not be served", error=str(task.exception()))
