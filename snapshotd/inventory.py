"""All that the object store holds, as names and sizes, and what its index objects say of it.

The order in which it is looked at makes it hold together without a lock: quarantines, then indexes, then
packs. An object that an index lists and the later listing of packs lacks is gone for good, because
writers store packs before they index them; an object that no index lists is told by its own trailer. An
index object that vanishes between listing and reading was merged into another one by a prune, so the look
begins anew. Every object that is damaged is handed to `damaged`, which raises it where nothing may be missed.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

from blockstore.domain import SnapshotId
from blockstore.errors import Corrupt, NotFound, QuorumUnavailable
from snapshotd.ahead import ahead
from snapshotd.index import Index, IndexEntry, decode_index
from snapshotd.layout import (
    INDEXES,
    PACKS,
    QUARANTINES,
    SHARDS,
    RootName,
    index_key,
    is_name,
    name_of_key,
    pack_key,
    quarantine_number,
    root_name,
    shard_key,
)
from snapshotd.pack import FOOTER_SIZE, Trailer, decode_trailer, trailer_range
from snapshotd.quarantine import decode_quarantine
from snapshotd.repository import Repository
from snapshotd.roots import Catalog, Roots

Damaged = Callable[[str, Corrupt], None]
"""Told the key of a damaged object and what is wrong with it; it raises, or notes it and goes on."""

#: An index object that vanishes means that a prune ended just now; they do not end so often.
_MAX_LOOKS: Final = 10
#: Small objects that are read at once: latency, not bytes, is what these cost.
INDEX_WIDTH: Final = 32


def refuse(key: str, error: Corrupt) -> None:
    """The `damaged` of work that must not miss anything."""
    raise Corrupt(f"{key}: {error}") from error


@dataclass(slots=True)
class Inventory:
    """By name: sizes in bytes of objects of frames, of index objects, shards and roots; `others` by key.

    A snapshot may have several roots: control's is the one that counts (snapshotd.root_objects).

    indexes: what each index object says. orphans: objects of frames that no index lists, by their trailers.
    quarantines: by number, the marks in it.
    """

    objects: dict[str, int] = field(default_factory=dict)
    index_sizes: dict[str, int] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=dict)
    roots: dict[RootName, int] = field(default_factory=dict)
    quarantine_sizes: dict[int, int] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    indexes: dict[str, Index] = field(default_factory=dict)
    orphans: dict[str, IndexEntry] = field(default_factory=dict)
    quarantines: dict[int, frozenset[bytes]] = field(default_factory=dict)

    @property
    def entries(self) -> Mapping[str, IndexEntry]:
        """What is said of each object of frames that is there, by an index or by its own trailer."""
        listed = {
            entry.object: entry
            for index in self.indexes.values()
            for entry in index.entries
            if entry.object in self.objects
        }
        return listed | self.orphans

    @property
    def replaced(self) -> frozenset[str]:
        """Names of objects of frames that some index declares void."""
        return frozenset(name for index in self.indexes.values() for name in index.replaces)

    def root_size(self, snapshot: str, digest: bytes) -> int:
        """Bytes of the root with that SHA-256; 0 where it is gone."""
        return self.roots.get(RootName(snapshot, digest.hex())) or self.roots.get(RootName(snapshot, ""), 0)

    @property
    def stored_bytes(self) -> int:
        return sum(sum(each.values()) for each in self._sizes)

    @property
    def count(self) -> int:
        return sum(map(len, self._sizes))

    @property
    def _sizes(self) -> Sequence[Mapping[Any, int]]:
        return self.objects, self.index_sizes, self.shards, self.roots, self.others, self.quarantine_sizes


async def take_inventory(repository: Repository, damaged: Damaged = refuse) -> Inventory:
    """What is there now. Raises QuorumUnavailable, and what `damaged` raises."""
    for _ in range(_MAX_LOOKS):
        try:
            return await _look(repository, damaged)
        except NotFound:
            continue
    raise QuorumUnavailable(f"the indexes in {repository.store.url} change all the time: wait for the prunes to end")


async def leftover_roots(inventory: Inventory, roots: Roots, catalog: Catalog) -> frozenset[RootName]:
    """Those that control will never take: others of snapshots that it took one of, and any of deleted snapshots.

    Without a hash in its key a root may be the one that it took. It stays as long as its snapshot.
    """
    named = {root: SnapshotId(root.snapshot) for root in inventory.roots if root.digest is not None}
    unknown = set(named.values()) - roots.completed.keys() - roots.pending
    deleted = await catalog.deleted(sorted(unknown)) if unknown else frozenset()
    return frozenset(
        root
        for root, snapshot in named.items()
        if snapshot in deleted or root.digest != roots.completed.get(snapshot, root.digest)
    )


async def load_quarantines(repository: Repository, damaged: Damaged = refuse) -> dict[int, frozenset[bytes]]:
    """By number, the marks of all quarantines that are there; one that is taken away meanwhile is left out."""
    inventory = Inventory()
    await _look_at_quarantines(repository, inventory, damaged)
    return inventory.quarantines


async def load_trailer(repository: Repository, name: str, size: int) -> Trailer:
    """The trailer of an object of frames of that size, by two ranged reads. Raises NotFound, Corrupt."""
    key = pack_key(name)
    if size <= FOOTER_SIZE:
        raise Corrupt(f"{key} has {size} bytes, and a trailer needs more")
    footer = await repository.store.get_range(key, size - FOOTER_SIZE, FOOTER_SIZE)
    start, length = trailer_range(footer, size, key)
    return decode_trailer(repository.keys, await repository.store.get_range(key, start, length), start, key)


async def _look(repository: Repository, damaged: Damaged) -> Inventory:
    inventory = Inventory()
    await _look_at_quarantines(repository, inventory, damaged)
    await _look_at_indexes(repository, inventory, damaged)
    async for info in repository.store.list():
        _enter(inventory, info.key, info.size)
    await _look_at_orphans(repository, inventory, damaged)
    return inventory


async def _look_at_quarantines(repository: Repository, inventory: Inventory, damaged: Damaged) -> None:
    async for info in repository.store.list(QUARANTINES):
        number = quarantine_number(info.key)
        if number is None:
            continue
        try:
            stored = await repository.store.get(info.key)
            inventory.quarantines[number] = decode_quarantine(repository.keys, number, stored)
        except NotFound:
            continue  # its prune has ended
        except Corrupt as error:
            damaged(info.key, error)


async def _look_at_indexes(repository: Repository, inventory: Inventory, damaged: Damaged) -> None:
    async def load(name: str) -> tuple[str, Index | None]:
        try:
            return name, decode_index(repository.keys, name, await repository.store.get(index_key(name)))
        except Corrupt as error:
            damaged(index_key(name), error)
            return name, None

    names = [name_of_key(info.key) async for info in repository.store.list(INDEXES)]
    async with aclosing(ahead(load, names, INDEX_WIDTH)) as loaded:
        async for name, index in loaded:
            if index is not None:
                inventory.indexes[name] = index


async def _look_at_orphans(repository: Repository, inventory: Inventory, damaged: Damaged) -> None:
    listed = {entry.object for index in inventory.indexes.values() for entry in index.entries}

    async def load(name: str) -> None:
        size = inventory.objects[name]
        try:
            trailer = await load_trailer(repository, name, size)
            inventory.orphans[name] = IndexEntry(name, size, trailer.parts)
        except NotFound:
            del inventory.objects[name]  # another prune was faster
        except Corrupt as error:
            damaged(pack_key(name), error)

    async with aclosing(ahead(load, sorted(inventory.objects.keys() - listed), INDEX_WIDTH)) as loaded:
        async for _ in loaded:
            pass


def _enter(inventory: Inventory, key: str, size: int) -> None:
    """One line of the listing of everything."""
    name, root, quarantine = name_of_key(key), root_name(key), quarantine_number(key)
    places = ((PACKS, pack_key, inventory.objects), (INDEXES, index_key, inventory.index_sizes))
    for folder, key_of, sizes in (*places, (SHARDS, shard_key, inventory.shards)):
        if key.startswith(folder) and is_name(name) and key == key_of(name):
            sizes[name] = size
            return
    if root is not None:
        inventory.roots[root] = size
    elif quarantine is not None:
        inventory.quarantine_sizes[quarantine] = size
    else:
        inventory.others[key] = size
