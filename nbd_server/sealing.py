"""Seals a volume's generation for a snapshot, once: in each of its segments.

Within one attachment a snapshot that was sealed is not sealed again: who asks gets the first answer, or waits
for it. Where an earlier call may have sealed and nobody knows (its answer was lost with the front-end before,
or the retry limit was reached while its record was on its way), the replicas are asked first, at a position
that covers everything which was sent so far: a generation whose SEAL carries the snapshot's id is the answer.

Of several segments each has a SEAL and a generation of its own; they show one instant only where no change was
acknowledged from before the first SEAL until all are committed. That is the barrier's to say (nbd_server/hold.py):
who calls this for several segments holds it, or wants no more than the generations.

Before control hears that a snapshot is sealed, members hear that its SEAL is committed (`until_known`): whoever
asked may end the attachment then. Under a barrier that is waited for after it: a member that is slow to hear of
a commit keeps no guest waiting.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from blockstore.domain import Position
from blockstore.errors import NotFound
from blockstore.replica_codec import from_position
from blockstore.rpc import control_pb2 as pb
from blockstore.units import Epoch
from blockstore.volume.member_queries import sealed_for
from blockstore.volume.open_segments import OpenSegments
from blockstore.volume.open_volume import OpenVolume, SealedAt

#: Of this attachment: an older one is found at the replicas.
_REMEMBERED: Final = 1024


@dataclass(frozen=True, slots=True)
class SealedSnapshot:
    """segments: in their order; a position's epoch is 0 where that SEAL is of an attachment before.

    took_us: to a quorum of each.
    """

    segments: tuple[SealedAt, ...]
    took_us: int = 0


class Sealing:
    """Of one attachment. limit_s: how long the replicas may take to say what they have sealed."""

    def __init__(self, volume: OpenSegments, limit_s: float) -> None:
        self._volume = volume
        self._limit_s = limit_s
        self._sealing: dict[str, asyncio.Task[SealedSnapshot]] = {}
        self._sealed: OrderedDict[str, SealedSnapshot] = OrderedDict()
        self._uncertain: set[str] = set()
        self._newest: dict[OpenVolume, Position] = {}
        """Where the last SEAL of this attachment stands, by segment."""

    async def seal(self, snapshot: str, *, again: bool) -> SealedSnapshot:
        """again: an earlier call may have sealed.

        Raises QuorumUnavailable, Fenced; NotFound where the attachment ends meanwhile: the next one tells.
        """
        sealed = self._sealed.get(snapshot)
        if sealed is not None:
            return sealed
        task = self._sealing.get(snapshot)
        if task is None:
            look_first = again or snapshot in self._uncertain
            task = asyncio.get_running_loop().create_task(self._seal(snapshot, look_first))
            self._sealing[snapshot] = task
            task.add_done_callback(lambda ended: self._end(snapshot, ended))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise  # who asked has gone
            raise NotFound(f"the attachment ended while {snapshot} was sealed: ask the next one") from None

    async def until_known(self) -> None:
        """Until members know that all that was sealed here is committed, or not much longer."""
        newest = self._newest.items()
        await asyncio.gather(*(segment.wait_until_known(position) for segment, position in newest))

    async def close(self) -> None:
        tasks = list(self._sealing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _seal(self, snapshot: str, look_first: bool) -> SealedSnapshot:
        segments = tuple(self._volume.segments)  # the volume may get further ones meanwhile
        found: list[SealedAt | None] = [None] * len(segments)
        if look_first:
            found = await asyncio.gather(*(self._find(segment, snapshot) for segment in segments))
        if None not in found:
            return SealedSnapshot(tuple(each for each in found if each))
        self._uncertain.add(snapshot)
        loop = asyncio.get_running_loop()
        began = loop.time()
        # All SEALs are on their way before anything else is done here.
        sealing = [
            segment.seal(snapshot.encode()) for segment, each in zip(segments, found, strict=True) if each is None
        ]
        outcomes = await asyncio.gather(*sealing, return_exceptions=True)
        sealed = iter([_raised(each) for each in outcomes])
        all_sealed = []
        for segment, earlier in zip(segments, found, strict=True):
            at = earlier or next(sealed)
            all_sealed.append(at)
            if earlier is None:
                self._newest[segment] = max(at.position, self._newest.get(segment, at.position))
        return SealedSnapshot(tuple(all_sealed), round((loop.time() - began) * 1e6))

    async def _find(self, segment: OpenVolume, snapshot: str) -> SealedAt | None:
        """Where it was sealed in an attempt before; None where it was not."""
        described = await segment.members.describe(segment.status().end, self._limit_s)
        found = sealed_for(described, snapshot)
        if found is None:
            return None
        generation, sequence = found
        return SealedAt(generation, Position(Epoch(0), sequence))

    def _end(self, snapshot: str, task: "asyncio.Task[SealedSnapshot]") -> None:
        del self._sealing[snapshot]
        if task.cancelled() or task.exception() is not None:
            return
        self._uncertain.discard(snapshot)
        self._sealed[snapshot] = task.result()
        if len(self._sealed) > _REMEMBERED:
            self._sealed.popitem(last=False)


def _raised(outcome: SealedAt | BaseException) -> SealedAt:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def sealed_message(sealed: SealedSnapshot) -> pb.SealVolumeResponse:
    """As control is told."""
    first = sealed.segments[0]
    return pb.SealVolumeResponse(
        generation=first.generation,
        position=from_position(first.position),
        took_us=sealed.took_us,
        segments=[
            pb.SealedSegment(segment=number, generation=each.generation, position=from_position(each.position))
            for number, each in enumerate(sealed.segments)
        ],
    )
