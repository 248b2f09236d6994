"""How much the object store holds, and for whom: what each snapshot alone needs, and what it shares.

Frames are counted as a whole, at the size that they have in their objects. Of each frame its only user is
kept, or that there are several: 4 bytes a frame. Snapshots are gone through from the oldest to the newest, so those
of one volume, which share most shards, come close together, and the frames of a shard are kept for the next ones.
"""

from array import array
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from blockstore.domain import SnapshotId
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE
from snapshotd.inventory import Inventory, take_inventory
from snapshotd.references import Frames, Manifests, numbers_of
from snapshotd.repository import Repository
from snapshotd.root import Root
from snapshotd.roots import Catalog

#: Shards whose frames are kept: 32,768 of them are 4 TiB of volumes, and take some 30 MB.
_KEPT_SHARDS: Final = 32_768
_NOBODY: Final = -1
_SEVERAL: Final = -2


@dataclass(frozen=True, slots=True)
class _ShardNeeds:
    """What one shard needs: objects by name, frames; and how many blocks it maps."""

    names: tuple[str, ...]
    frames: Frames
    blocks: int


@dataclass(slots=True)
class Usage:
    """Of one snapshot, in bytes. own: stored, and needed by no other; shared: by others as well."""

    logical_bytes: int = 0
    own_bytes: int = 0
    shared_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """done of total snapshots; the rest in the last one. unique_bytes: of blocks as stored, before compression."""

    done: int
    total: int
    snapshots: Mapping[SnapshotId, Usage] = field(default_factory=dict)
    objects: int = 0
    stored_bytes: int = 0
    unique_bytes: int = 0
    referenced_bytes: int = 0


class _Owners:
    """Who needs each thing: one snapshot, by number, or several."""

    def __init__(self, inventory: Inventory) -> None:
        self._lengths: dict[bytes, dict[int, int]] = {}
        self._frames: dict[bytes, array[int]] = {}
        self._shards: dict[str, int] = {}
        self._shard_sizes = inventory.shards
        void = inventory.replaced
        for name, entry in inventory.entries.items():
            for part in entry.parts if name not in void else ():
                lengths = self._lengths.setdefault(part.pack, {})
                lengths.update(zip(part.numbers, part.lengths, strict=True))

    def note(self, number: int, needs: Iterable[_ShardNeeds]) -> int:
        """Snapshot `number` needs all that: its stored bytes, each thing counted once."""
        total = 0
        frames: Frames = {}
        names: set[str] = set()
        for each in needs:
            names.update(each.names)
            for pack, bits in each.frames.items():
                frames[pack] = frames.get(pack, 0) | bits
        for name in names:
            self._shards[name] = number if self._shards.get(name, _NOBODY) == _NOBODY else _SEVERAL
            total += self._shard_sizes.get(name, 0)
        for pack, bits in frames.items():
            total += self._note_frames(number, pack, bits)
        return total

    def _note_frames(self, number: int, pack: bytes, bits: int) -> int:
        owners = self._frames.setdefault(pack, array("i"))
        owners.extend([_NOBODY] * (bits.bit_length() - len(owners)))
        lengths = self._lengths.get(pack, {})
        total = 0
        for frame in numbers_of(bits):
            owners[frame] = number if owners[frame] == _NOBODY else _SEVERAL
            total += lengths.get(frame, 0)
        return total

    def own_bytes(self, count: int) -> list[int]:
        """Of each of `count` snapshots, the stored bytes that it alone needs."""
        own = [0] * count
        for name, owner in self._shards.items():
            if owner >= 0:
                own[owner] += self._shard_sizes.get(name, 0)
        for pack, owners in self._frames.items():
            lengths = self._lengths.get(pack, {})
            for frame, owner in enumerate(owners):
                if owner >= 0:
                    own[owner] += lengths.get(frame, 0)
        return own


class _Needs:
    """What shards need, kept for the next snapshot that has them."""

    def __init__(self, repository: Repository) -> None:
        self.manifests = Manifests(repository)
        self._kept: OrderedDict[str, _ShardNeeds] = OrderedDict()

    async def of_root(self, root: Root) -> list[_ShardNeeds]:
        """In the order of its shards. Raises DamagedObject."""
        names = list(root.shards.values())
        missing = [name for name in dict.fromkeys(names) if name not in self._kept]
        found = {name: self._kept[name] for name in names if name in self._kept}
        async for shard in self.manifests.shards(missing):
            found[shard.name] = _ShardNeeds(shard.names, shard.frames(), len(shard.shard))
        for name, needs in found.items():
            self._kept[name] = needs
            self._kept.move_to_end(name)
        while len(self._kept) > _KEPT_SHARDS:
            self._kept.popitem(last=False)
        return [found[name] for name in names]


async def statistics(repository: Repository, catalog: Catalog) -> AsyncGenerator[Progress, None]:
    """Count it all. Raises Corrupt where a manifest is damaged, QuorumUnavailable."""
    completed = (await catalog.roots()).completed
    inventory = await take_inventory(repository, lambda key, error: None)
    owners, needs = _Owners(inventory), _Needs(repository)
    order = await _by_volume(needs.manifests, completed)
    usages = [Usage() for _ in order]
    for number, snapshot in enumerate(order):
        shards = await needs.of_root(await needs.manifests.root(snapshot, completed[snapshot]))
        size_bytes = inventory.root_size(snapshot, completed[snapshot])
        usages[number].logical_bytes = sum(each.blocks for each in shards) * BLOCK_SIZE
        usages[number].shared_bytes = owners.note(number, shards)
        usages[number].own_bytes = size_bytes
        yield Progress(number + 1, len(order))
    for usage, own_bytes in zip(usages, owners.own_bytes(len(order)), strict=True):
        usage.own_bytes += own_bytes
        usage.shared_bytes -= own_bytes
    yield Progress(
        len(order),
        len(order),
        dict(zip(order, usages, strict=True)),
        inventory.count,
        inventory.stored_bytes,
        _unique_bytes(inventory),
        sum(usage.logical_bytes for usage in usages),
    )


async def _by_volume(manifests: Manifests, completed: Mapping[SnapshotId, bytes]) -> list[SnapshotId]:
    """Those of one volume together, the oldest first. No root is kept: one of a large volume takes a megabyte."""
    keys = []
    for snapshot, expected in completed.items():
        root = await manifests.root(snapshot, expected)
        keys.append((root.volume, root.created_at_ms, snapshot))
    return [snapshot for _, _, snapshot in sorted(keys)]


def _unique_bytes(inventory: Inventory) -> int:
    void = inventory.replaced
    entries = (entry for name, entry in inventory.entries.items() if name not in void)
    return sum(sum(part.blocks) for entry in entries for part in entry.parts) * BLOCK_SIZE


def to_message(progress: Progress) -> pb.StoreStatisticsResponse:
    """One message of the stream."""
    usages = [
        pb.SnapshotUsage(
            snapshot=snapshot,
            logical_bytes=usage.logical_bytes,
            own_bytes=usage.own_bytes,
            shared_bytes=usage.shared_bytes,
        )
        for snapshot, usage in progress.snapshots.items()
    ]
    return pb.StoreStatisticsResponse(
        progress=pb.WorkProgress(phase="manifests", done=progress.done, total=progress.total, unit="snapshots"),
        snapshots=usages,
        objects=progress.objects,
        stored_bytes=progress.stored_bytes,
        unique_bytes=progress.unique_bytes,
        referenced_bytes=progress.referenced_bytes,
    )
