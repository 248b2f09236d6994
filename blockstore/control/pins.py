"""Giving generations up that no snapshot needs any more, so that the nodes merge them.

The newest completed snapshot of a volume stays pinned: it is the base of the next list of changes.
What is older, deleted or was never finished leaves a pin to be taken away in the catalog (in the
transaction that made it so), until a front-end has done it, and stays while a client reads it. Source: design,
section 4.
"""

from contextlib import suppress

import structlog

from blockstore.control import snapshot_transitions
from blockstore.control.catalog import Catalog
from blockstore.control.peers import Peers
from blockstore.control.presence import Presence
from blockstore.control.reconcile import MOVED_ON, Reconciler
from blockstore.control.roster import Roster
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.control.snapshot_reading import readers_are_known
from blockstore.control.snapshot_records import Pin, Snapshot
from blockstore.control.transitions import place_of

_log = structlog.get_logger(__name__)


class Unpinning:
    """The pins to be taken away."""

    def __init__(
        self,
        catalog: Catalog,
        snapshots: SnapshotCatalog,
        presence: Presence,
        peers: Peers,
        reconciler: Reconciler,
    ) -> None:
        self._catalog = catalog
        self._snapshots = snapshots
        self._presence = presence
        self._peers = peers
        self._reconciler = reconciler

    async def reconcile(self, roster: Roster) -> None:
        """Find pins that nobody needs, and take away those whose volume is served."""
        for snapshot in (await self._snapshots.index()).superseded():
            await self._give_up(snapshot)
        served = {volume.id for volume in roster.active if place_of(volume)}
        known = await readers_are_known(self._catalog, self._presence)
        for pin in await self._snapshots.pins():
            if pin.volume in served:
                if known and pin.snapshot not in self._presence.read_now():
                    self._start(pin)
            elif not await self._catalog.has_volume(pin.volume):
                await self._snapshots.remove_pin(pin)

    async def _give_up(self, snapshot: Snapshot) -> None:
        with suppress(*MOVED_ON):  # Deleted meanwhile, it has given its pin up so.
            await self._snapshots.change([snapshot.id], snapshot_transitions.unpinned)

    def _start(self, pin: Pin) -> None:
        self._reconciler.steps.start(("unpin", pin.snapshot), f"pin of {pin.snapshot}", lambda: self._take_away(pin))

    async def _take_away(self, pin: Pin) -> None:
        place = place_of(await self._catalog.volume(pin.volume))
        if place is None:
            return
        front_end = await self._catalog.front_end(place.front_end)
        generations = [pin.generation, *pin.further_generations]
        if not pin.generation:
            # Whether it was sealed is not known, or where. Sealed it is known, and can be given up.
            answer = await self._peers.seal_volume(
                front_end, pin.volume, place.epoch, pin.snapshot, again=True, given_up=True
            )
            generations = [each.generation for each in answer.segments] or [answer.generation]
        await self._peers.unpin_generations(front_end, pin.volume, place.epoch, generations, pin.snapshot)
        await self._snapshots.remove_pin(pin)
        _log.info("a generation is given up", volume=pin.volume, generations=generations, snapshot=pin.snapshot)
