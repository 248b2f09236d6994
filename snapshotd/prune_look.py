"""How a prune looks at a repository: what is there, and what of it the roots need (steps 1 and 4 of a prune)."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

import structlog

from blockstore.domain import SnapshotId
from blockstore.errors import Corrupt, QuorumUnavailable
from blockstore.rpc import snapshot_pb2 as pb
from snapshotd.inventory import Inventory, leftover_roots, refuse, take_inventory
from snapshotd.layout import INDEXES, PACKS, RootName, name_of_key, root_key
from snapshotd.prune_plan import missing_frames, stale_indexes
from snapshotd.references import DamagedObject, Manifests, References, references_of
from snapshotd.repository import Repository
from snapshotd.roots import Catalog, Roots

_log = structlog.get_logger(__name__)

#: Snapshots that are deleted, and pruned by another, while this one looks at them.
_MAX_LOOKS: Final = 10


@dataclass(frozen=True, slots=True)
class View:
    """One look. strong: shards that control's roots need; needed: what those and other roots need, but for leftovers.

    damaged_indexes: what they said is known from the trailers of the objects that no other index lists.
    """

    roots: Roots
    inventory: Inventory
    needed: References
    strong: frozenset[str]
    leftovers: frozenset[RootName]
    damaged_indexes: frozenset[str]

    def stale_indexes(self, gone: Collection[str]) -> set[str]:
        """Names of index objects to be written anew."""
        return stale_indexes(self.inventory, gone) | self.damaged_indexes


@dataclass(frozen=True, slots=True)
class Looker:
    """importing: snapshots that this process writes and control does not know."""

    repository: Repository
    catalog: Catalog
    importing: Callable[[], Collection[str]]

    async def look(self) -> View:
        """Raises Corrupt where a root, or something that it needs, is damaged or gone.

        Not where a snapshot was deleted meanwhile, and another prune was at work: then it looks again.
        """
        for _ in range(_MAX_LOOKS):
            roots = await self.catalog.roots()
            try:
                return await self._look_once(roots)
            except Corrupt:
                if await self.catalog.roots() == roots:
                    raise
        raise QuorumUnavailable("snapshots come and go all the time while a prune looks at them: try again")

    async def _look_once(self, roots: Roots) -> View:
        """Roots came first: what completes after they were asked for sees to itself."""
        damaged_indexes: set[str] = set()

        def damaged(key: str, error: Corrupt) -> None:
            _log.error("a damaged object", error=str(error))
            if key.startswith(INDEXES):
                damaged_indexes.add(name_of_key(key))
            elif not key.startswith(PACKS):
                refuse(key, error)

        inventory = await take_inventory(self.repository, damaged)
        manifests, needed = Manifests(self.repository), References()
        for snapshot, expected in roots.completed.items():
            await self._mark(manifests, snapshot, expected, needed)
        strong = frozenset(needed.shards)
        missing = missing_frames(inventory.entries.values(), needed.frames)
        if missing:
            raise Corrupt(
                f"frames of {len(missing)} packs that snapshots need are in no object, such as pack "
                f"{min(missing).hex()}: nothing is pruned; `cairn snapshot verify` names the snapshots, and pruning "
                "goes on once they are deleted"
            )
        leftovers = await leftover_roots(inventory, roots, self.catalog)
        for name in sorted(inventory.roots.keys() - leftovers):
            if name.snapshot not in roots.completed:
                await self._mark_unknown(manifests, name, needed)
        await self._spare_pending_shards(manifests, inventory, roots, needed)
        return View(roots, inventory, needed, strong, leftovers, frozenset(damaged_indexes))

    async def _mark(self, manifests: Manifests, snapshot: str, expected: bytes, needed: References) -> None:
        try:
            root = await manifests.root(snapshot, expected)
            await references_of(manifests, root, needed)
        except DamagedObject as error:
            if error.gone and error.key == root_key(snapshot, expected) and await self._is_leaving(snapshot):
                return
            raise Corrupt(
                f"{error}: what snapshot {snapshot} needs is not known, so nothing is pruned; put {error.key} back "
                "from a copy, or delete the snapshot"
            ) from error

    async def _is_leaving(self, snapshot: str) -> bool:
        """Whether it is being deleted: its root goes, once nobody needs it, before control forgets it."""
        found = (await self.catalog.snapshots()).get(SnapshotId(snapshot))
        return found is None or found.state == pb.SNAPSHOT_STATE_DELETING

    async def _mark_unknown(self, manifests: Manifests, name: RootName, needed: References) -> None:
        """A root that control has not taken. One that does not open can be adopted by nobody, and keeps nothing."""
        try:
            await references_of(manifests, await manifests.root_named(name), needed)
        except DamagedObject as error:
            _log.warning("a root that control has not taken is damaged", root=name.key, error=str(error))

    async def _spare_pending_shards(
        self, manifests: Manifests, inventory: Inventory, roots: Roots, needed: References
    ) -> None:
        """Keep shards that name packs of pending snapshots: a large one writes its shards hours before its root.

        No more than a kindness. Who finds a shard of his in quarantine, or gone, writes it again; and where all of its
        blocks were stored before, a shard says nothing of whom it was made for.
        """
        pending = roots.pending | set(self.importing())
        entries = inventory.entries.values()
        packs = {part.pack for entry in entries for part in entry.parts if part.snapshot in pending}
        for name in sorted(inventory.shards.keys() - needed.shards) if packs else ():
            try:
                loaded = await manifests.shard(name)
            except DamagedObject:
                continue  # nobody needs it
            if not packs.isdisjoint(loaded.frames()):
                needed.shards.update(loaded.names)
