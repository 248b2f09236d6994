"""Why the last attach of a volume failed: told until it is attached, or for as long as something is still wrong.

A reason of days ago beside a volume whose replicas are all well tells nothing any more; `cairn status` would warn of it
until somebody attaches the volume. So it goes once all has been well for WELL_FOR_S.
"""

import asyncio
from typing import Final

from blockstore.control import transitions
from blockstore.control.catalog import Catalog
from blockstore.control.lag import behind, heard
from blockstore.control.presence import Presence
from blockstore.control.records import Volume
from blockstore.control.roster import Roster
from blockstore.control.transitions import Phase, phase_of
from blockstore.domain import VolumeId
from blockstore.units import Epoch

#: Longer than somebody who has just been refused takes to look why.
WELL_FOR_S: Final = 300.0


class Reasons:
    """Since when volumes with a reason are well, each by the epoch of that."""

    def __init__(self, catalog: Catalog, presence: Presence) -> None:
        self._catalog = catalog
        self._presence = presence
        self._well_since: dict[tuple[VolumeId, Epoch], float] = {}

    async def reconcile(self, roster: Roster) -> None:
        """Clear those that are out of date."""
        now, well = asyncio.get_running_loop().time(), dict[tuple[VolumeId, Epoch], float]()
        for volume in roster.active:
            if not volume.reason or phase_of(volume) is not Phase.AVAILABLE or not self._is_well(volume):
                continue
            key = volume.id, volume.epoch
            well[key] = self._well_since.get(key, now)
            if now - well[key] >= WELL_FOR_S:
                await self._clear(volume)
        self._well_since = well

    def _is_well(self, volume: Volume) -> bool:
        """All of its members are here, whole and sound, and nobody is behind."""
        said = heard(self._presence.replicas_up(), volume)
        members = [each.replica for segment in volume.segments for each in segment.configuration.members]
        good = all(each in said and said[each].whole and not said[each].damage for each in members)
        return good and not behind(self._presence, volume, said)

    async def _clear(self, before: Volume) -> None:
        await self._catalog.change_volume(before.id, lambda now: transitions.forget_reason(now, before.epoch))
