"""The catalog: typed records over a metastore, changed by compare-and-swap only.

    volumes/ID   names/NAME -> id   tokens/TOKEN -> id   known/VOLUME-ID
    nodes/ID     front-ends/ID      tombstones/NODE/REPLICA
    draining/NODE-ID   repair/choices   repair/moves

Each change is one transaction that names the revisions it was derived from, so stopping between any
two of them leaves a catalog that reconciling carries on from. Invariants: a name and a token belong
to one volume and go with it; a volume's replicas are on nodes of the catalog; a volume leaves only
together with a tombstone for each replica that is not known to be gone. Snapshots have a catalog of
their own (blockstore/control/snapshot_catalog.py) in the same metastore.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

from blockstore.control.codec import decode, encode
from blockstore.control.metastore.interface import ABSENT, Metastore, Revision
from blockstore.control.record_store import MAX_TRIES, RecordStore, Stored
from blockstore.control.records import (
    Draining,
    FrontEnd,
    KnownPositions,
    MovePlan,
    Node,
    RepairChoices,
    Tombstone,
    Volume,
)
from blockstore.domain import FrontEndId, NodeId, ReplicaId, VolumeId, VolumeState
from blockstore.errors import AlreadyExists, Conflict, NotFound

VOLUMES: Final = "volumes/"
_NAMES: Final = "names/"
_TOKENS: Final = "tokens/"
_KNOWN: Final = "known/"
_NODES: Final = "nodes/"
_FRONT_ENDS: Final = "front-ends/"
_TOMBSTONES: Final = "tombstones/"
DRAINING: Final = "draining/"
_CHOICES: Final = "repair/choices"
MOVES: Final = "repair/moves"


class Catalog(RecordStore):
    """All that the control plane keeps, but for snapshots. Reads see every change that was made before."""

    def __init__(self, store: Metastore) -> None:
        super().__init__(store)
        self._volumes: tuple[tuple[Stored[Volume], ...], tuple[Volume, ...]] = (), ()
        """As they were listed last, and their records."""

    # ---- volumes

    async def volumes(self) -> tuple[Volume, ...]:
        """All of them, by id."""
        stored = await self._list(Volume, VOLUMES)
        if stored is not self._volumes[0]:
            self._volumes = stored, tuple(each.record for each in stored)
        return self._volumes[1]

    async def volume(self, name_or_id: str) -> Volume:
        """Raises NotFound."""
        return (await self.stored_volume(name_or_id)).record

    async def stored_volume(self, name_or_id: str) -> Stored[Volume]:
        """Raises NotFound."""
        found = await self._get(Volume, VOLUMES + name_or_id) if name_or_id else None
        if found is None and name_or_id and (named := await self._get_text(_NAMES + name_or_id)):
            found = await self._get(Volume, VOLUMES + named)
        if found is None:
            raise NotFound(f"there is no volume {name_or_id!r}: see `cairn volume list`")
        return found

    async def has_volume(self, volume: VolumeId) -> bool:
        """Whether it is there, in whatever state."""
        return await self._get(Volume, VOLUMES + volume) is not None

    async def volume_of_token(self, token: str) -> Volume | None:
        """The volume that was created with this client token."""
        named = await self._get_text(_TOKENS + token) if token else None
        stored = await self._get(Volume, VOLUMES + named) if named else None
        return stored.record if stored else None

    async def add_volume(
        self, volume: Volume, on: Iterable[Stored[Node]], unchanged: Mapping[str, Revision] | None = None
    ) -> bool:
        """Enter a new volume whose replicas are on the nodes `on`.

        unchanged: further keys, and the revisions that they must have. False where one of those or one
        of the nodes has changed, or another request with the same token was first: look again. Raises
        AlreadyExists where the name is taken.
        """
        nodes = tuple(on)
        conditions = {VOLUMES + volume.id: ABSENT, **{_NODES + each.record.id: each.revision for each in nodes}}
        conditions.update(unchanged or {})
        # The nodes are written as they are: whoever is about to remove one then has to look again.
        puts = {VOLUMES + volume.id: encode(volume), **{_NODES + each.record.id: encode(each.record) for each in nodes}}
        for key in _keys_of(volume):
            conditions[key] = ABSENT
            puts[key] = volume.id.encode()
        if await self._store.transact(conditions, puts) is not None:
            return True
        if volume.name and (taken := await self._get_text(_NAMES + volume.name)):
            holder = await self._get(Volume, VOLUMES + taken)
            if not (volume.client_token and holder and holder.record.client_token == volume.client_token):
                raise AlreadyExists(f"the name {volume.name!r} is taken by volume {taken}: choose another")
        return False

    async def change_volume(
        self,
        volume: VolumeId,
        change: Callable[[Volume], Volume],
        allow: Callable[[Volume], Awaitable[None]] | None = None,
    ) -> Volume:
        """Swap the volume's record for what `change` makes of it; what `change` raises ends it.

        allow: looks at other records first, and raises where those forbid the change. It counts for the
        record as it was read before: whoever changes the others has to write this one as well.
        """
        for _ in range(MAX_TRIES):
            stored = await self._get(Volume, VOLUMES + volume)
            if stored is None:
                raise NotFound(f"volume {volume} is gone")
            if allow:
                await allow(stored.record)
            changed = change(stored.record)
            if changed == stored.record or await self._swap(VOLUMES + volume, stored.revision, changed):
                return changed
        raise Conflict(f"volume {volume} is changed by too many at once: try again")

    async def place_more(
        self, before: Stored[Volume], after: Volume, on: Iterable[Stored[Node]], left: Iterable[Tombstone] = ()
    ) -> bool:
        """Swap a volume's record for one with more replicas, on the nodes `on`, leaving tombstones for others.

        False where the volume or one of the nodes has changed: look again.
        """
        nodes = tuple(on)
        key = VOLUMES + after.id
        conditions = {key: before.revision, **{_NODES + each.record.id: each.revision for each in nodes}}
        # The nodes are written as they are, as in add_volume.
        puts = {key: encode(after), **{_NODES + each.record.id: encode(each.record) for each in nodes}}
        puts |= {_tombstone_key(each): encode(each) for each in left}
        return await self._store.transact(conditions, puts) is not None

    async def remove_volume(self, volume: Volume, left: Iterable[Tombstone]) -> None:
        """Forget a volume in `deleting`, leaving tombstones. One that is gone already stays so."""
        stored = await self._get(Volume, VOLUMES + volume.id)
        if stored is None:
            return
        assert stored.record.state is VolumeState.DELETING
        await self._store.transact(
            {VOLUMES + volume.id: stored.revision},
            {_tombstone_key(each): encode(each) for each in left},
            (VOLUMES + volume.id, _KNOWN + volume.id, *_keys_of(volume)),
        )
        self._decoded.pop(VOLUMES + volume.id, None)

    # ---- nodes

    async def nodes(self) -> tuple[Stored[Node], ...]:
        """All of them, by id."""
        return await self._list(Node, _NODES)

    async def node(self, node: str) -> Stored[Node]:
        """Raises NotFound."""
        stored = await self._get(Node, _NODES + node)
        if stored is None:
            raise NotFound(f"there is no node {node!r}: see `cairn node list`")
        return stored

    async def put_node(self, node: Node) -> None:
        """Enter it, or what it says of itself now."""
        await self._put(_NODES + node.id, node)

    async def remove_node(self, node: NodeId) -> None:
        """Forget a node and its tombstones. Raises NotFound, and Conflict where it holds replicas."""
        stored = await self.node(node)
        held = [volume.id for volume in await self.volumes() if node in nodes_of(volume)]
        if held:
            raise Conflict(
                f"node {node} holds replicas of {len(held)} volumes ({held[0]}, ...): move them away with "
                f"`cairn node drain {node}`, also where the node is lost for good"
            )
        left = [_tombstone_key(each) for each in await self.tombstones() if each.node == node]
        if (
            await self._store.transact({_NODES + node: stored.revision}, {}, (_NODES + node, DRAINING + node, *left))
            is None
        ):
            raise Conflict(f"node {node} has changed meanwhile: look again")

    # ---- what is to be moved, and how fast

    async def draining(self) -> frozenset[NodeId]:
        """The nodes whose replicas are to be moved away."""
        return frozenset(each.record.node for each in await self._list(Draining, DRAINING))

    async def drain(self, draining: Draining) -> None:
        """Move its replicas away. Raises NotFound, and Conflict where the node has changed meanwhile."""
        stored = await self.node(draining.node)
        key = DRAINING + draining.node
        if await self._store.transact({_NODES + draining.node: stored.revision}, {key: encode(draining)}) is None:
            raise Conflict(f"node {draining.node} has changed meanwhile: try again")

    async def undrain(self, node: NodeId) -> None:
        """It may have replicas again."""
        await self._store.transact({}, {}, (DRAINING + node,))
        self._decoded.pop(DRAINING + node, None)

    async def repair_choices(self) -> RepairChoices:
        """What was set on the running cluster."""
        stored = await self._get(RepairChoices, _CHOICES)
        return stored.record if stored else RepairChoices()

    async def put_repair_choices(self, choices: RepairChoices) -> None:
        """From now on."""
        await self._put(_CHOICES, choices)

    async def moves(self) -> MovePlan:
        """What was asked for and has not begun."""
        stored = await self._get(MovePlan, MOVES)
        return stored.record if stored else MovePlan()

    async def change_moves(self, change: Callable[[MovePlan], MovePlan]) -> None:
        """What is asked for now, made of what is: `change` may be called again. Raises Conflict."""
        for _ in range(MAX_TRIES):
            stored = await self._get(MovePlan, MOVES)
            before = stored.record if stored else MovePlan()
            plan = change(before)
            if plan == before or await self._swap(MOVES, stored.revision if stored else ABSENT, plan):
                return
        raise Conflict("the plan of moves is changed by too many at once: try again")

    # ---- front-ends

    async def front_ends(self) -> tuple[FrontEnd, ...]:
        """All of them, by id."""
        return tuple(each.record for each in await self._list(FrontEnd, _FRONT_ENDS))

    async def front_end(self, front_end: str) -> FrontEnd:
        """Raises NotFound."""
        stored = await self._get(FrontEnd, _FRONT_ENDS + front_end)
        if stored is None:
            raise NotFound(f"there is no front-end {front_end!r}: see `cairn status`")
        return stored.record

    async def put_front_end(self, front_end: FrontEnd) -> None:
        """Enter it, or what it says of itself now."""
        await self._put(_FRONT_ENDS + front_end.id, front_end)

    # ---- replicas to be deleted, and positions

    async def tombstones(self) -> tuple[Tombstone, ...]:
        """Of replicas on nodes that were away when their volume was deleted."""
        return tuple(each.record for each in await self._list(Tombstone, _TOMBSTONES))

    async def remove_tombstone(self, tombstone: Tombstone) -> None:
        """The replica is gone."""
        await self._store.transact({}, {}, (_tombstone_key(tombstone),))
        self._decoded.pop(_tombstone_key(tombstone), None)

    async def known_positions(self) -> tuple[KnownPositions, ...]:
        """Of all volumes."""
        return tuple(decode(KnownPositions, each.value) for each in (await self._store.list(_KNOWN)).items)

    async def put_known_positions(self, known: KnownPositions) -> bool:
        """Keep them with their volume; False where that has changed meanwhile. Raises NotFound where it is gone."""
        stored = await self._get(Volume, VOLUMES + known.volume)
        if stored is None:
            raise NotFound(f"volume {known.volume} is gone")
        conditions = {VOLUMES + known.volume: stored.revision}
        return await self._store.transact(conditions, {_KNOWN + known.volume: encode(known)}) is not None


def nodes_of(volume: Volume) -> frozenset[NodeId]:
    """The nodes that hold a replica of it, or are to."""
    return frozenset(member.node for segment in volume.all_segments for member in segment.configuration.everyone)


def replicas_on(node: NodeId, volume: Volume) -> list[ReplicaId]:
    """The replicas of it that this node holds, or is to."""
    return [
        member.replica
        for segment in volume.all_segments
        for member in segment.configuration.everyone
        if member.node == node
    ]


def growing_on(volume: Volume) -> frozenset[NodeId]:
    """The nodes that its further segments are to be on, while these are being created."""
    segments = volume.growing.segments if volume.growing else ()
    return frozenset(member.node for segment in segments for member in segment.configuration.members)


def replicas_by_node(volumes: Iterable[Volume]) -> "Counter[NodeId]":
    """Of how many of these volumes each node holds a replica."""
    return Counter(node for volume in volumes for node in nodes_of(volume))


def volumes_by_front_end(volumes: Iterable[Volume]) -> "Counter[FrontEndId]":
    """How many of these volumes belong to each front-end."""
    return Counter(each.attachment.front_end for each in volumes if each.attachment)


def tombstones_of(volume: Volume) -> tuple[Tombstone, ...]:
    """One for each of its replicas."""
    return tuple(
        Tombstone(member.replica, member.node, volume.id, segment.number)
        for segment in volume.all_segments
        for member in segment.configuration.everyone
    )


def attached_to(volumes: Iterable[Volume], front_end: FrontEndId) -> tuple[Volume, ...]:
    """The volumes that belong to this front-end."""
    return tuple(each for each in volumes if each.attachment and each.attachment.front_end == front_end)


def maintained_by(volumes: Iterable[Volume], front_end: FrontEndId) -> tuple[Volume, ...]:
    """The volumes that this front-end has for control's own work."""
    return tuple(each for each in volumes if each.maintenance and each.maintenance.front_end == front_end)


def _keys_of(volume: Volume) -> tuple[str, ...]:
    name = (_NAMES + volume.name,) if volume.name else ()
    return (*name, _TOKENS + volume.client_token) if volume.client_token else name


def _tombstone_key(tombstone: Tombstone) -> str:
    return f"{_TOMBSTONES}{tombstone.node}/{tombstone.replica}"
