"""What is known of restored volumes: where their source is served, and how far the copying out of it is.

The source itself, its rate and whether it is paused stand in the volume's record; how far it is comes
with the heartbeats of the front-end that has the volume, and is in memory only.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from blockstore.control.presence import Presence
from blockstore.control.records import Volume
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.control.transitions import place_of
from blockstore.domain import VolumeId
from blockstore.rpc import control_pb2

NO_DAEMON: Final = "no snapshotd is up: start one with `cairn snapshotd run`"


@dataclass(frozen=True, slots=True)
class HydrationView:
    """As it is known now. addresses: of the daemons that are up. waits: why volumes are not copied to."""

    addresses: tuple[str, ...] = ()
    progress: Mapping[VolumeId, control_pb2.Hydration] = field(default_factory=dict)
    waits: Mapping[VolumeId, str] = field(default_factory=dict)

    def source(self, volume: Volume) -> control_pb2.Source | None:
        """What the volume's absent blocks come from, and where that is served."""
        if volume.source is None:
            return None
        return control_pb2.Source(
            snapshot=volume.source.snapshot,
            root=bytes.fromhex(volume.source.root),
            size_bytes=volume.source.size_bytes,
            addresses=self.addresses,
        )

    def hydration(self, volume: Volume) -> control_pb2.Hydration | None:
        """How far it is, and why it stands still if it does."""
        if volume.source is None:
            return None
        heard = self.progress.get(volume.id, control_pb2.Hydration())
        why = self._why(volume)
        return control_pb2.Hydration(
            blocks_total=heard.blocks_total,
            blocks_done=heard.blocks_done,
            rate_bytes=volume.source.rate_bytes,
            paused=volume.source.paused,
            rate_now_bytes=0 if why else heard.rate_now_bytes,
            why=why,
        )

    def trouble(self, volume: Volume) -> str:
        """Why it stands still although it should not; empty where all is as it was set up, or waits for its turn."""
        if volume.source is None or volume.source.paused:
            return ""
        if not self.addresses:
            return NO_DAEMON
        if place_of(volume) is None:
            return self.waits.get(volume.id, "")
        return self.progress.get(volume.id, control_pb2.Hydration()).why

    def _why(self, volume: Volume) -> str:
        assert volume.source is not None
        if volume.source.paused:
            return "paused"
        return self.trouble(volume) or ("" if place_of(volume) else "waits for its turn to be opened")


class Hydrations:
    """The last words on each restored volume."""

    def __init__(self, snapshots: SnapshotCatalog, presence: Presence) -> None:
        self._snapshots = snapshots
        self._presence = presence
        self._progress: dict[VolumeId, control_pb2.Hydration] = {}
        self._waits: dict[VolumeId, str] = {}

    async def view(self) -> HydrationView:
        """As it is known now."""
        return HydrationView(await self.addresses(), dict(self._progress), dict(self._waits))

    async def addresses(self) -> tuple[str, ...]:
        """Of the daemons that are up."""
        return tuple(each.address for each in await self._snapshots.daemons() if self._presence.is_up(each.id))

    async def may_be_served(self) -> bool:
        """A daemon is up, or there is one that may not have been heard yet, right after a start of control."""
        daemons = await self._snapshots.daemons()
        return any(self._presence.is_up(each.id) for each in daemons) or bool(daemons and self._presence.settling_s())

    def learn(self, volume: VolumeId, said: control_pb2.Hydration) -> None:
        """What the front-end that has the volume says."""
        self._progress[volume] = said

    def waits(self, volume: VolumeId, why: str) -> None:
        """Why nobody can have it open for the copying; empty where nothing stands in the way."""
        if why:
            self._waits[volume] = why
        else:
            self._waits.pop(volume, None)

    def keep_only(self, volumes: Collection[VolumeId]) -> None:
        """Of the others nothing needs to be known any more."""
        for known in (self._progress, self._waits):
            for volume in known.keys() - set(volumes):
                del known[volume]
