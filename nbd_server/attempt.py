"""One volume at one epoch: opened, given its source where it still needs one, and exported.

A volume whose ticket has a source is hydrated already where the replicas say, at this epoch's first commit, that
they have none any more; control may not have heard of it. So they are asked before anything else: content of the
source that came after that would bring back what a guest has trimmed. Else a HydratingVolume stands in front
of the volume until the background pass is through; then the device asks the volume itself again.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from blockstore.errors import CairnError, Conflict, Corrupt, Fenced, QuorumUnavailable
from blockstore.replica_codec import from_position
from blockstore.rpc import control_pb2 as pb
from blockstore.units import format_size
from blockstore.volume.control_messages import addresses_of, member_reports, to_configuration
from blockstore.volume.guest_activity import GuestActivity
from blockstore.volume.hydrating_volume import HydratingVolume
from blockstore.volume.hydration import Hydration
from blockstore.volume.open_volume import OpenVolume
from blockstore.volume.source_client import Source, SourceClient
from nbd_server.device import Device
from nbd_server.exports import Export
from nbd_server.hold import Barriers
from nbd_server.sealing import Sealing

_log = structlog.get_logger(__name__)
#: How long the members may take to say whether they have a source, before that is tried again.
_DESCRIBE_S: Final = 10.0


class Attempt:
    """See the module. source: None where the volume has none. retry_limit_s: how long a guest waits for what it has.

    guests_wait: whether any guest of this process has a request in flight.
    """

    def __init__(
        self,
        message: pb.OpenTicket,
        volume: OpenVolume,
        source: Source | None,
        *,
        retry_limit_s: float,
        call_timeout_s: float,
        guests_wait: Callable[[], bool],
    ) -> None:
        self.volume = volume
        self.epoch: int = message.epoch
        self.maintenance: bool = message.maintenance
        self.exports: list[Export] = []
        self.served: asyncio.Task[None]
        """Done when the volume is served; with the error where the attempt has ended before."""
        self.device = Device(volume)
        self.barriers = Barriers(self.device)
        self.sealing = Sealing(volume, call_timeout_s)
        self._message = message
        self._retry_limit_s = retry_limit_s
        self._call_timeout_s = call_timeout_s
        self._guests_wait = guests_wait
        self._source = source
        self._hydrated = source is None
        self._hydrating: HydratingVolume | None = None
        self._hydration: Hydration | None = None
        self._leaving: asyncio.Task[None] | None = None

    # ---- life

    async def open(self) -> None:
        """Returns once guests may be served. Raises what ended the attempt."""
        await self.volume.wait_until_served()
        if self._source is not None:
            await self._find_source(self._source)

    def make_exports(self) -> list[Export]:
        """Under its id, and its name if it has one: one device, so that both see one order of changes.

        None for maintenance: control's own work is no guest.
        """
        if self.maintenance:
            return []
        description = (
            f"Cairn volume {self._message.volume}, {format_size(self._message.size_bytes)}, epoch {self.epoch}"
        )
        names = dict.fromkeys(filter(None, (self._message.volume, self._message.name)))
        read_only, client = self._message.read_only, self._message.client
        return [Export(name, self.device, description, read_only=read_only, client=client) for name in names]

    async def close(self) -> None:
        """Let go of the volume; its clients are gone."""
        await self.sealing.close()
        if self._hydration is not None:
            await self._hydration.close()
        if self._leaving is not None:
            self._leaving.cancel()
            await asyncio.gather(self._leaving, return_exceptions=True)
        if self._hydrating is not None:
            await self._hydrating.abandon()
        await self.volume.close()

    @property
    def fate(self) -> CairnError | None:
        """Why it ended for good; None while it has not."""
        return self.volume.over.result() if self.volume.over.done() else None

    @property
    def failure(self) -> BaseException | None:
        """Why it is not served and will not be: its end, or what opening it raised."""
        if self.fate is not None or not self.served.done() or self.served.cancelled():
            return self.fate
        return self.served.exception()

    @property
    def is_served(self) -> bool:
        """It was opened, and has not ended."""
        return self.served.done() and not self.served.cancelled() and self.failure is None

    # ---- the source

    async def _find_source(self, source: Source) -> None:
        while True:
            try:
                described = await self.volume.members.describe(self.volume.status().commit, _DESCRIBE_S)
                break
            except QuorumUnavailable as error:
                _log.warning("cannot tell whether it is hydrated", volume=self.volume.volume, error=str(error))
                if self.fate is not None:
                    raise self.fate from error
        if not described.source:
            self._hydrated = True
        elif described.source != source.snapshot.encode():
            raise Conflict(
                f"{self.volume.volume} was made from {described.source!r}, and control says {source.snapshot}"
            )
        else:
            client, activity = SourceClient(source, self._call_timeout_s), GuestActivity(self._guests_wait)
            self._hydrate(HydratingVolume(self.volume, client, self._retry_limit_s, activity))

    def _hydrate(self, hydrating: HydratingVolume) -> None:
        self._hydrating = hydrating
        self.device.replace_volume(hydrating)
        self._hydration = Hydration(self.volume, hydrating)
        self._hydration.set(self._message.hydration)
        self._hydration.hydrated.add_done_callback(lambda done: self._step_aside(hydrating))

    def _step_aside(self, hydrating: HydratingVolume) -> None:
        self._hydrated = True
        self.device.replace_volume(self.volume)
        self._leaving = asyncio.get_running_loop().create_task(hydrating.close())

    # ---- control

    def heed(self, current: pb.CurrentAttachment) -> None:
        """What control wants of it now."""
        self.volume.grow(current.size_bytes)
        for segment in current.segments:
            if segment.number == self.volume.segment:
                self.volume.reconfigure(to_configuration(segment.configuration), addresses_of([segment]))
        if self._hydrating is not None and self._hydration is not None:
            if current.HasField("hydration"):
                self._hydration.set(current.hydration)
            self._hydrating.client.set_addresses(current.source.addresses)

    def report(self) -> pb.VolumeReport:
        state, why = self._state()
        status = self.volume.status()
        return pb.VolumeReport(
            volume=self.volume.volume,
            epoch=self.epoch,
            state=state,
            why=why,
            commit=from_position(status.commit),
            size_bytes=self.volume.size_bytes,
            members=member_reports(self.volume),
            hydration=None if self._hydration is None else self._hydration.report(),
            hydrated=self._hydrated,
            settled={self.volume.segment: self.volume.settled},
        )

    def _state(self) -> tuple[pb.ServingState.ValueType, str]:
        match self.failure:
            case None if self.is_served:
                return pb.SERVING_STATE_SERVING, self.volume.why
            case None:
                return pb.SERVING_STATE_OPENING, self.volume.why
            case Fenced() as error:
                return pb.SERVING_STATE_FENCED, str(error)
            case Corrupt() as error:
                return pb.SERVING_STATE_LOST, str(error)
            case error:
                return pb.SERVING_STATE_FAILED, str(error)
