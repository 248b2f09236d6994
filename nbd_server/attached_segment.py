"""One segment of a volume that is attached here: open, and given its part of the source where it still needs one.

A segment whose ticket has a source is hydrated already where its replicas say, at this epoch's first commit, that
they have none any more; control may not have heard of it. So they are asked before anything else: content of the
source that came after that would bring back what a guest has trimmed. Else a HydratingVolume stands in front of
the segment until the background pass is through. Each segment is hydrated by itself, and its log says so by itself.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from blockstore.errors import Conflict, QuorumUnavailable
from blockstore.rpc import control_pb2 as pb
from blockstore.volume.guest_activity import GuestActivity
from blockstore.volume.hydrating_volume import HydratingVolume
from blockstore.volume.hydration import Hydration
from blockstore.volume.open_volume import OpenVolume
from blockstore.volume.pace import Pace
from blockstore.volume.segmented_blocks import Blocks
from blockstore.volume.source_client import Source, SourceClient

_log = structlog.get_logger(__name__)
#: How long the members may take to say whether they have a source, before that is tried again.
_DESCRIBE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class HydrationShare:
    """What the segments of a volume hydrate by together: one rate, one guest to give way to, one copying at a time."""

    activity: GuestActivity
    pace: Pace
    turn: asyncio.Lock


class AttachedSegment:
    """source: this segment's part; None where it has none. changed: called when `blocks` is another way from now on.

    retry_limit_s: how long a guest waits for what the source has.
    """

    def __init__(
        self,
        volume: OpenVolume,
        source: Source | None,
        share: HydrationShare,
        changed: Callable[[], None],
        *,
        retry_limit_s: float,
        call_timeout_s: float,
    ) -> None:
        self.volume = volume
        self.hydrated = source is None
        self.hydrating: HydratingVolume | None = None
        self.hydration: Hydration | None = None
        self._source = source
        self._share = share
        self._changed = changed
        self._retry_limit_s = retry_limit_s
        self._call_timeout_s = call_timeout_s
        self._leaving: asyncio.Task[None] | None = None

    @property
    def blocks(self) -> Blocks:
        """Whom to ask for its blocks now."""
        return self.volume if self.hydrating is None or self.hydrated else self.hydrating

    async def find_source(self, wanted: pb.Hydration) -> None:
        """Once it is served, and before a guest is. Raises what ended the attachment."""
        if self._source is None:
            return
        while True:
            try:
                described = await self.volume.members.describe(self.volume.status().commit, _DESCRIBE_S)
                break
            except QuorumUnavailable as error:
                _log.warning("cannot tell whether it is hydrated", volume=self.volume.volume, error=str(error))
                if self.volume.over.done():
                    raise self.volume.over.result() from error
        if not described.source:
            self.hydrated = True
        elif described.source != self._source.snapshot.encode():
            raise Conflict(
                f"{self.volume.volume} was made from {described.source!r}, and control says {self._source.snapshot}"
            )
        else:
            self._hydrate(SourceClient(self._source, self._call_timeout_s), wanted)

    def heed(self, current: pb.CurrentAttachment) -> None:
        """What control wants of the hydration now."""
        if self.hydrating is not None and self.hydration is not None:
            if current.HasField("hydration"):
                self.hydration.set(current.hydration)
            self.hydrating.client.set_addresses(current.source.addresses)

    async def stop(self) -> None:
        """Before the segment itself is closed: its guests are gone."""
        if self.hydration is not None:
            await self.hydration.close()
        if self._leaving is not None:
            self._leaving.cancel()
            await asyncio.gather(self._leaving, return_exceptions=True)
        if self.hydrating is not None:
            await self.hydrating.abandon()

    def _hydrate(self, client: SourceClient, wanted: pb.Hydration) -> None:
        hydrating = HydratingVolume(self.volume, client, self._retry_limit_s, self._share.activity)
        self.hydrating = hydrating
        self._changed()
        self.hydration = Hydration(self.volume, hydrating, self._share.pace, self._share.turn)
        self.hydration.set(wanted)
        self.hydration.hydrated.add_done_callback(lambda done: self._step_aside(hydrating))

    def _step_aside(self, hydrating: HydratingVolume) -> None:
        self.hydrated = True
        self._changed()
        self._leaving = asyncio.get_running_loop().create_task(hydrating.close())


def whole_report(segments: list[AttachedSegment]) -> pb.Hydration | None:
    """How far the hydration of a volume is; None where none has begun.

    Of segments that were hydrated before this attachment nothing is counted.
    """
    reports = [each.hydration.report() for each in segments if each.hydration is not None]
    if not reports:
        return None
    return pb.Hydration(
        blocks_total=sum(each.blocks_total for each in reports),
        blocks_done=sum(each.blocks_done for each in reports),
        rate_bytes=reports[0].rate_bytes,
        paused=reports[0].paused,
        rate_now_bytes=reports[0].rate_now_bytes,
        why=next((each.why for each in reports if each.why), ""),
    )
