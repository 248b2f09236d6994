"""How far each replica is known to have acked (design, section 3, rule 10).

A whole replica's log never ends below what it once acked. One that does is an old copy put back, and
must neither vote with what it holds nor serve it. So the highest position ever told for a replica, by
the front-end that got its acks or by the node itself, is kept in the metastore and handed to whoever
opens the volume and to the node. Invariant: a position here never falls. They are written behind,
once a reconcile pass: all that a crash loses is told again with the next heartbeat.
"""

from blockstore.control.catalog import Catalog, tombstones_of
from blockstore.control.records import Known, KnownPositions, Volume
from blockstore.domain import ORIGIN, Position, ReplicaId, VolumeId
from blockstore.errors import CairnError, NotFound
from blockstore.units import Epoch, Sequence


class Floors:
    """The positions of all replicas, in memory and in the catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._known: dict[VolumeId, dict[ReplicaId, Position]] = {}
        self._unsaved: set[VolumeId] = set()

    async def load(self) -> None:
        """What was kept; before anything is learned."""
        for record in await self._catalog.known_positions():
            self._known[record.volume] = {
                each.replica: Position(Epoch(each.epoch), Sequence(each.sequence)) for each in record.positions
            }

    def of(self, volume: VolumeId, replica: ReplicaId) -> Position:
        """The highest position known for it, ORIGIN where there is none."""
        return self._known.get(volume, {}).get(replica, ORIGIN)

    def learn(self, volume: Volume, replica: ReplicaId, position: Position) -> None:
        """A whole replica has durably all up to `position`. What cannot be so is not believed."""
        if position <= self.of(volume.id, replica):
            return  # as nearly all that is told: each heartbeat tells it of every replica
        if position.epoch > volume.epoch or all(replica != each.replica for each in tombstones_of(volume)):
            return
        self._known.setdefault(volume.id, {})[replica] = position
        self._unsaved.add(volume.id)

    def forget(self, volume: VolumeId) -> None:
        """The volume is gone, and its replicas' ids are never used again."""
        self._known.pop(volume, None)
        self._unsaved.discard(volume)

    async def save(self) -> None:
        """Write what was learned since the last time. Raises NoSpace: what is left is for the next time."""
        for volume in sorted(self._unsaved):
            self._unsaved.discard(volume)
            learned = self._known.get(volume, {})
            positions = tuple(Known(replica, *position) for replica, position in sorted(learned.items()))
            try:
                if not await self._catalog.put_known_positions(KnownPositions(volume, positions)):
                    self._unsaved.add(volume)
            except NotFound:
                self.forget(volume)
            except CairnError:
                self._unsaved.add(volume)
                raise
