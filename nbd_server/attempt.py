"""One volume at one epoch: all of its segments opened, given their source where they still need one, and exported.

The device asks the segment itself where there is one; a volume of several has a SegmentedBlocks between them. Whom it
asks is decided anew whenever a segment is hydrated, or the volume got further segments: the bytes stay the same.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial

from blockstore.domain import VolumeId
from blockstore.errors import CairnError, Corrupt, Fenced
from blockstore.replica_codec import from_position
from blockstore.rpc import control_pb2 as pb
from blockstore.units import format_size
from blockstore.volume.control_messages import addresses_of, member_reports, to_configuration
from blockstore.volume.guest_activity import GuestActivity
from blockstore.volume.open_segments import OpenSegments
from blockstore.volume.open_volume import OpenVolume
from blockstore.volume.pace import Pace
from blockstore.volume.segmented_blocks import Blocks, SegmentedBlocks
from blockstore.volume.source_client import Source
from nbd_server.attached_segment import AttachedSegment, HydrationShare, whole_report
from nbd_server.device import Device
from nbd_server.exports import Export
from nbd_server.hold import Barriers
from nbd_server.pace import Change
from nbd_server.sealing import Sealing


class Attempt:
    """See the module. source: None where the volume has none. retry_limit_s: how long a guest waits for what it has.

    guests_wait: whether any guest of this process has a request in flight.
    """

    def __init__(
        self,
        message: pb.OpenTicket,
        segments: Sequence[OpenVolume],
        source: Source | None,
        *,
        retry_limit_s: float,
        call_timeout_s: float,
        guests_wait: Callable[[], bool],
    ) -> None:
        self.volume = OpenSegments(segments)
        self.epoch: int = message.epoch
        self.maintenance: bool = message.maintenance
        self.exports: list[Export] = []
        self.served: asyncio.Task[None]
        """Done when the volume is served; with the error where the attempt has ended before."""
        self.growing = asyncio.Lock()
        """Held while it is given further segments."""
        self._message = message
        self._retry_limit_s = retry_limit_s
        self._call_timeout_s = call_timeout_s
        activity = GuestActivity(guests_wait)
        self._share = HydrationShare(activity, Pace(activity), asyncio.Lock())
        parts = _parts_of(source, self.volume)
        self.segments = [self._attached(each, part) for each, part in zip(segments, parts, strict=True)]
        self.device = Device(self._blocks())
        self.barriers = Barriers(self.device)
        self.sealing = Sealing(self.volume, call_timeout_s)

    def _attached(self, volume: OpenVolume, source: Source | None) -> AttachedSegment:
        return AttachedSegment(
            volume,
            source,
            self._share,
            lambda: self.device.replace_volume(self._blocks()),
            retry_limit_s=self._retry_limit_s,
            call_timeout_s=self._call_timeout_s,
        )

    def _blocks(self) -> Blocks:
        """Whom the device asks now."""
        if len(self.segments) == 1:
            return self.segments[0].blocks
        return SegmentedBlocks([each.blocks for each in self.segments], self.volume.starts, self.volume.over)

    # ---- life

    async def open(self) -> None:
        """Returns once guests may be served. Raises what ended the attempt."""
        await self.volume.wait_until_served()
        await asyncio.gather(*(each.find_source(self._message.hydration) for each in self.segments))

    async def extend(self, last_size_bytes: int, further: Sequence[OpenVolume]) -> None:
        """The last segment has this size now, and these follow it; a source has nothing there. Raises as they do."""
        await self.volume.extend(last_size_bytes, further)
        self.segments += [self._attached(each, None) for each in further]
        self.device.replace_volume(self._blocks())

    def make_exports(self, snapshot_names: Callable[[VolumeId], Awaitable[Mapping[str, int]]] | None) -> list[Export]:
        """Under its id, and its name if it has one: one device, so that both see one order of changes.

        None for maintenance: control's own work is no guest.
        """
        if self.maintenance:
            return []
        description = (
            f"Cairn volume {self._message.volume}, {format_size(self._message.size_bytes)}, epoch {self.epoch}"
        )
        names = tuple(dict.fromkeys(filter(None, (self._message.volume, self._message.name))))
        read_only, client = self._message.read_only, self._message.client
        ask = partial(snapshot_names, self.volume.volume) if snapshot_names is not None else None
        return [
            Export(name, self.device, description, read_only, client, aliases=names, snapshot_names=ask)
            for name in names
        ]

    async def close(self) -> None:
        """Let go of the volume; its clients are gone."""
        await self.sealing.close()
        await asyncio.gather(*(each.stop() for each in self.segments))
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

    # ---- control

    def heed(self, current: pb.CurrentAttachment) -> None:
        """What control wants of its members and its hydration now."""
        for segment in current.segments:
            for each in self.volume.segments:
                if segment.number == each.segment:
                    each.reconfigure(to_configuration(segment.configuration), addresses_of([segment]))
        for attached in self.segments:
            attached.heed(current)

    def report(self) -> pb.VolumeReport:
        state, why = self._state()
        return pb.VolumeReport(
            volume=self.volume.volume,
            epoch=self.epoch,
            state=state,
            why=why,
            commit=from_position(self.volume.first.status().commit),
            size_bytes=self.volume.size_bytes,
            members=[report for each in self.volume.segments for report in member_reports(each)],
            hydration=self.hydration,
            hydrated=all(each.hydrated for each in self.segments),
            settled={each.segment: each.settled for each in self.volume.segments},
            lacks_room=self.volume.lacks_room,
        )

    def changes_of_members(self) -> Iterator[Change]:
        """Those that are under way; none where it is not served, for each step rests on that."""
        if self.is_served:
            for each in self.volume.segments:
                if each.configuration.is_changing:
                    yield self.volume.volume, each.segment, each.configuration

    @property
    def hydration(self) -> pb.Hydration | None:
        """How far it is; None where none has begun."""
        return whole_report(self.segments)

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


def _parts_of(source: Source | None, volume: OpenSegments) -> list[Source | None]:
    """Of each segment its part of the source."""
    if source is None:
        return [None] * len(volume.segments)
    if len(volume.segments) == 1:
        return [source]
    return [
        source.part(start, segment.size_bytes) for start, segment in zip(volume.starts, volume.segments, strict=True)
    ]
