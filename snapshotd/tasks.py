"""What this daemon does for control: keeps itself known, ships what it is given, deletes roots that nobody needs.

Control's answer to each heartbeat is all that is to be shipped here: what is new in it is begun, what is missing is
given up, and what was retried since is begun anew, for it may be a change of another base. It comes when there is
news, or a heartbeat later. It may be older than the end of a ship, so what ended since the question was asked is not
begun again by it.
"""

import asyncio
from typing import Final

import structlog

from blockstore.config import SnapshotdSettings
from blockstore.errors import CairnError, Fenced
from blockstore.heartbeat import beat
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.volume.sealed_segment import NodeChannels
from snapshotd.control_client import ControlClient
from snapshotd.pack_store import PackStore
from snapshotd.reader import SnapshotReader
from snapshotd.root_objects import roots_of
from snapshotd.ship import Ship, ShipParts
from snapshotd.totals import ShipTotals

_log = structlog.get_logger(__name__)

#: Ships that read and hash at once: each holds some 20 MiB besides its packs.
_ATTEMPTS: Final = 8
#: Behind a root that could not be deleted: control names it with each heartbeat.
_DROP_PAUSE_S: Final = 5.0
#: A heartbeat does not wait longer for a store whose owner is looked at.
_OWNER_TIMEOUT_S: Final = 1.0


class Tasks:
    """`address` is where others dial this daemon; set before `run`."""

    def __init__(
        self,
        settings: SnapshotdSettings,
        packs: PackStore,
        reader: SnapshotReader,
        control: ControlClient,
        cluster: str,
    ) -> None:
        self.address = ""
        self._settings = settings
        self._packs = packs
        self._reader = reader
        self._control = control
        self._cluster = cluster
        self._channels = NodeChannels()
        attempts = asyncio.Semaphore(_ATTEMPTS)
        self.totals = ShipTotals()
        self._parts = ShipParts(
            packs, reader, control, self._channels, settings.call_timeout_s, attempts, cluster, self.totals
        )
        self._ships: dict[str, tuple[Ship, asyncio.Task[None]]] = {}
        self._ended: set[str] = set()
        """What was shipped, or given up, since the last heartbeat was sent."""
        self._drops: dict[str, asyncio.Task[None]] = {}
        self._kept: dict[str, str] = {}
        """Of each root that could not be deleted: why, as it was told."""
        self._known: frozenset[str] = frozenset()
        """What control's last answer named."""

    @property
    def ship_count(self) -> int:
        """Snapshots that are being shipped."""
        return len(self._ships)

    async def run(self) -> None:
        """Until cancelled. Raises Fenced where another process has this daemon's id, or control is another's."""
        await beat(self._settings.heartbeat_s, self._register, self._report)

    async def close(self) -> None:
        """Give up what is under way; it goes on with the next start, from what is stored."""
        tasks = [*(task for _, task in self._ships.values()), *self._drops.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channels.close()

    async def _register(self) -> None:
        repository = self._packs.repository
        response = await self._control.register(self.address, repository.store.url, repository.id)
        if response.cluster != self._cluster:
            raise Fenced(f"control is of the cluster {response.cluster}, and was of {self._cluster}: start again")

    async def _report(self) -> float:
        """Control takes its time to answer, until there is news: the next one follows at once."""
        self._ended.clear()
        reports = [pb.SnapshotReport(snapshot=each, progress=ship.progress.message()) for each, ship in self._running()]
        why = await self._why_idle()
        response = await self._control.report(self.address, reports, self._known, self._settings.heartbeat_s, why)
        self._known = frozenset([*(task.snapshot.id for task in response.ship), *response.drop])
        given = {task.snapshot.id: task for task in response.ship}
        for snapshot in self._ships.keys() - given.keys():
            _log.info("control took a snapshot away", snapshot=snapshot)
            self._ships[snapshot][1].cancel()
        for snapshot, task in given.items():
            if snapshot in self._ships:
                self._go_on(task)
            elif snapshot not in self._ended:
                self._begin(task)
        for snapshot in response.drop:
            self._begin_drop(snapshot)
        self._kept = {snapshot: why for snapshot, why in self._kept.items() if snapshot in response.drop}
        return 0.0

    async def _why_idle(self) -> str:
        """What keeps this daemon from writing to the store, as far as it knows; empty where nothing does."""
        repository = self._packs.repository
        if repository.owner == self._cluster:
            return ""
        try:
            async with asyncio.timeout(_OWNER_TIMEOUT_S):
                await repository.check_owner(self._cluster)
        except TimeoutError:
            return f"{repository.store.url} belonged to the cluster {repository.owner}, and does not answer"
        except CairnError as error:
            return str(error)
        return ""

    def _running(self) -> list[tuple[str, Ship]]:
        return [(snapshot, ship) for snapshot, (ship, _) in self._ships.items()]

    # ---- ships

    def _go_on(self, task: pb.ShipTask) -> None:
        ship, running = self._ships[task.snapshot.id]
        if ship.is_for(task):
            ship.move(task)
            return
        _log.info("a snapshot was retried: its shipping begins anew", snapshot=ship.snapshot)
        running.cancel()
        self._begin(task, after=running)

    def _begin(self, task: pb.ShipTask, after: "asyncio.Task[None] | None" = None) -> None:
        """after: what ships it as something else, and was cancelled."""
        snapshot = task.snapshot.id
        _log.info("shipping a snapshot", snapshot=snapshot, base=task.base, generation=task.snapshot.generation)
        ship = Ship(task, self._parts)
        running = asyncio.create_task(_run(ship, after))
        self._ships[snapshot] = ship, running
        running.add_done_callback(lambda _: self._end(snapshot, running))

    def _end(self, snapshot: str, running: "asyncio.Task[None]") -> None:
        if snapshot in self._ships and self._ships[snapshot][1] is running:
            del self._ships[snapshot]
            self._ended.add(snapshot)
        if not running.cancelled() and running.exception() is not None:
            _log.error("a ship ended in a way that nobody foresaw", snapshot=snapshot, exc_info=running.exception())

    # ---- roots that nobody needs

    def _begin_drop(self, snapshot: str) -> None:
        if snapshot not in self._drops:
            task = self._drops[snapshot] = asyncio.create_task(self._drop(snapshot))
            task.add_done_callback(lambda _: self._drops.pop(snapshot, None))

    async def _drop(self, snapshot: str) -> None:
        """Delete its roots, then say so. What fails is asked for again by a later heartbeat."""
        try:
            await self._packs.repository.check_owner(self._cluster)
            store = self._packs.repository.store
            for root in await roots_of(store, snapshot):
                await store.delete(root.key)
            self._reader.forget_root(snapshot)
            await self._control.drop(snapshot)
            _log.info("a deleted snapshot's root is gone from the object store", snapshot=snapshot)
        except CairnError as error:
            if self._kept.get(snapshot) != str(error):
                _log.warning("a snapshot's root is not deleted yet", snapshot=snapshot, error=str(error))
                self._kept[snapshot] = str(error)
            await asyncio.sleep(_DROP_PAUSE_S)


async def _run(ship: Ship, after: "asyncio.Task[None] | None") -> None:
    if after is not None:
        await asyncio.wait({after})
    await ship.run()
