"""Seals a volume's generation for a snapshot, once.

Within one attachment a snapshot that was sealed is not sealed again: who asks gets the first answer, or waits
for it. Where an earlier call may have sealed and nobody knows (its answer was lost with the front-end before,
or the retry limit was reached while its record was on its way), the replicas are asked first, at a position
that covers everything which was sent so far: a generation whose SEAL carries the snapshot's id is the answer.

Before control hears that a snapshot is sealed, members hear that its SEAL is committed (`until_known`): whoever
asked may end the attachment then. Under a barrier that is waited for after it: a member that is slow to hear of
a commit keeps no guest waiting.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from blockstore.domain import ORIGIN, Position
from blockstore.errors import NotFound
from blockstore.units import Epoch, Generation
from blockstore.volume.member_queries import sealed_for
from blockstore.volume.open_volume import OpenVolume

#: Of this attachment: an older one is found at the replicas.
_REMEMBERED: Final = 1024
#: How long members may take to hear that a SEAL is committed, before that is left to the next heartbeat.
_KNOWN_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class SealedSnapshot:
    """position: of the SEAL; its epoch is 0 where the SEAL is of an attachment before. took_us: to a quorum."""

    generation: Generation
    position: Position
    took_us: int = 0


class Sealing:
    """Of one attachment. limit_s: how long the replicas may take to say what they have sealed."""

    def __init__(self, volume: OpenVolume, limit_s: float) -> None:
        self._volume = volume
        self._limit_s = limit_s
        self._sealing: dict[str, asyncio.Task[SealedSnapshot]] = {}
        self._sealed: OrderedDict[str, SealedSnapshot] = OrderedDict()
        self._uncertain: set[str] = set()
        self._newest = ORIGIN
        """Where the last SEAL of this attachment stands."""

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
        """Until members know that all that was sealed here is committed, or for _KNOWN_S."""
        if self._newest != ORIGIN:
            await self._volume.wait_until_known(self._newest, _KNOWN_S)

    async def close(self) -> None:
        tasks = list(self._sealing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _seal(self, snapshot: str, look_first: bool) -> SealedSnapshot:
        if look_first:
            described = await self._volume.members.describe(self._volume.status().end, self._limit_s)
            found = sealed_for(described, snapshot)
            if found is not None:
                generation, sequence = found
                return SealedSnapshot(generation, Position(Epoch(0), sequence))
        self._uncertain.add(snapshot)
        loop = asyncio.get_running_loop()
        began = loop.time()
        sealed = await self._volume.seal(snapshot.encode())
        self._newest = max(self._newest, sealed.position)
        return SealedSnapshot(sealed.generation, sealed.position, round((loop.time() - began) * 1e6))

    def _end(self, snapshot: str, task: "asyncio.Task[SealedSnapshot]") -> None:
        del self._sealing[snapshot]
        if task.cancelled() or task.exception() is not None:
            return
        self._uncertain.discard(snapshot)
        self._sealed[snapshot] = task.result()
        if len(self._sealed) > _REMEMBERED:
            self._sealed.popitem(last=False)
