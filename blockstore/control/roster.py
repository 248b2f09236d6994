"""The volumes that a pass looks at. Pure.

Of a thousand volumes nearly all are at rest: detached, with nothing under way by their records. Most works have nothing
to do with those, and a pass is made at each change of anything; so they are told apart once for each change of a
volume, and not once for each work in each pass.
"""

from collections.abc import Mapping
from functools import cached_property

from blockstore.control.records import Volume
from blockstore.domain import VolumeId, VolumeState


class Roster:
    """All volumes at one time, by id. active: without those that are at rest."""

    def __init__(self, volumes: tuple[Volume, ...]) -> None:
        self.volumes = volumes
        self.active = tuple(volume for volume in volumes if not is_at_rest(volume))

    @cached_property
    def by_id(self) -> Mapping[VolumeId, Volume]:
        """All of them."""
        return {volume.id: volume for volume in self.volumes}


def is_at_rest(volume: Volume) -> bool:
    """Detached, and its record alone names nothing to be done, or to be watched."""
    return (
        volume.state is VolumeState.AVAILABLE
        and volume.maintenance is None
        and volume.source is None
        and volume.growing is None
        and not volume.reason
        and not any(segment.configuration.is_changing for segment in volume.segments)
    )
