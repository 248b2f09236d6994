"""What a prune does, worked out from what is there and what is needed: pure, and the same twice over.

Each needed frame gets a *home*: one object that keeps it. An object that is home to nothing is deleted; one
of which too large a share is dead, and one that another prune has condemned, is repacked: what it is home to
moves. Condemned means: named by the quarantine of another prune, which may still be at work and would delete it
any time, or void by an index; so nothing ever relies on such an object. A frame is home where most of what is
needed lies, so that few bytes move.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from snapshotd.index import IndexEntry, Part
from snapshotd.inventory import Inventory
from snapshotd.layout import RootName
from snapshotd.quarantine import MARK_SIZE, MAX_MARKS
from snapshotd.references import Frames, References, bits_of

#: Repacking copies what lives: at a quarter dead, 3 bytes move for each one that is freed.
DEFAULT_REPACK_SHARE: Final = 0.25
#: An index object with fewer entries than this is small.
_SMALL_INDEX_ENTRIES: Final = 512
#: Small index objects that may be there before they are merged: each costs a request when a daemon starts.
_SMALL_INDEXES: Final = 32

Marks = frozenset[bytes]
"""What a quarantine holds: of each pack its id, of each object, shard and root the first 16 bytes of its name."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Names of objects of frames, of shards and of roots. repack: of each object, the frames that it is home to.

    bytes_copied, bytes_freed, bytes_kept: of stored objects.
    """

    delete: frozenset[str]
    repack: Mapping[str, Frames]
    shards: frozenset[str]
    roots: frozenset[RootName]
    bytes_freed: int
    bytes_copied: int
    bytes_kept: int

    @property
    def gone(self) -> frozenset[str]:
        """Objects of frames that are not there any more in the end."""
        return self.delete | self.repack.keys()

    @property
    def is_empty(self) -> bool:
        return not self.gone and not self.shards and not self.roots

    def marks(self, inventory: Inventory, most: int = MAX_MARKS) -> Marks:
        """What must be in quarantine before it is carried out; of a plan with more than `most` marks, a part of it.

        The part is a plan, too: an object comes with all packs in it, a shard and a root by itself.
        """
        entries = inventory.entries
        marks: set[bytes] = set()
        for name in sorted(self.gone):
            new = {mark(name), *(part.pack for part in entries[name].parts)} - marks
            if len(marks) + len(new) > most:
                break
            marks |= new
        single = sorted({mark(name) for name in self.shards} | {mark(root.name) for root in self.roots})
        return frozenset([*marks, *single[: most - len(marks)]])


def mark(name: str) -> bytes:
    """How a quarantine names an object, a shard or a root: 128 of the 256 bits of its hash."""
    return bytes.fromhex(name)[:MARK_SIZE]


def make_plan(
    inventory: Inventory,
    needed: References,
    *,
    leftovers: Collection[RootName],
    pending: Collection[str],
    condemned: Marks,
    repack_share: float,
    allowed: Marks | None = None,
) -> Plan:
    """The plan.

    needed: by all roots but leftovers. leftovers: roots that are needed by nobody. pending: packs made for these
    snapshots are kept whole. condemned: marks in other prunes' quarantines. repack_share: an object is repacked where
    at least this share of its frames' bytes is dead.
    allowed: nothing but what has its marks in here goes away; None: anything may.
    """
    entries = inventory.entries
    void = inventory.replaced
    unsafe = {name for name in entries if name in void or mark(name) in condemned}
    fixed = {name for name, entry in entries.items() if allowed is not None and not _is_allowed(entry, allowed)}
    ranks = {name: (name in unsafe) + (name in unsafe & fixed) for name in entries}
    homes = _find_homes(entries, ranks, void, _all_needed(entries, needed.frames, pending))
    delete, repack = set[str](), dict[str, Frames]()
    freed = copied = 0
    for name, entry in entries.items():
        live = homes.get(name, {})
        if name in fixed:
            continue
        live_bytes = sum(_bytes_of(part, live.get(part.pack, 0)) for part in entry.parts)
        if not live:
            delete.add(name)
        elif name in unsafe or _is_sparse(entry, live_bytes, repack_share):
            repack[name] = live
        else:
            continue
        freed += inventory.objects[name] - live_bytes
        copied += live_bytes
    shards = {name for name in inventory.shards.keys() - needed.shards if allowed is None or mark(name) in allowed}
    freed += sum(inventory.shards[name] for name in shards)
    roots = {root for root in leftovers if allowed is None or mark(root.name) in allowed}
    freed += sum(inventory.roots[root] for root in roots)
    kept = inventory.stored_bytes - freed
    return Plan(frozenset(delete), repack, frozenset(shards), frozenset(roots), freed, copied, kept)


def missing_frames(entries: Iterable[IndexEntry], needed: Frames) -> Frames:
    """Those of `needed` that are in none of `entries`."""
    left = dict(needed)
    for part in (part for entry in entries for part in entry.parts):
        if part.pack in left:
            left[part.pack] &= ~bits_of(part.numbers)
    return {pack: bits for pack, bits in left.items() if bits}


def stale_indexes(inventory: Inventory, gone: Collection[str]) -> set[str]:
    """Names of index objects to be written anew: they list what is not there any more, or are many and small."""
    void = inventory.replaced
    stale = {
        name
        for name, index in inventory.indexes.items()
        if any(
            entry.object in gone or entry.object in void or entry.object not in inventory.objects
            for entry in index.entries
        )
    }
    small = {name for name, index in inventory.indexes.items() if len(index.entries) < _SMALL_INDEX_ENTRIES}
    return stale | small if len(small) > _SMALL_INDEXES else stale


def _all_needed(entries: Mapping[str, IndexEntry], needed: Frames, pending: Collection[str]) -> Frames:
    """`needed`, and all frames of packs that were made for pending snapshots."""
    frames = dict(needed)
    for part in (part for entry in entries.values() for part in entry.parts):
        if part.snapshot in pending:
            frames[part.pack] = frames.get(part.pack, 0) | bits_of(part.numbers)
    return frames


def _find_homes(
    entries: Mapping[str, IndexEntry], ranks: Mapping[str, int], void: Collection[str], needed: Frames
) -> dict[str, Frames]:
    """Of each object the frames that it is home to.

    ranks: 0 for an object that may be relied on, 1 for one that is unsafe and will be copied from, 2 for one that is
    unsafe and has to stay as it is: a home only where there is no other.
    """

    def order(entry: IndexEntry) -> tuple[int, bool, int, str]:
        live_bytes = sum(_bytes_of(part, needed.get(part.pack, 0)) for part in entry.parts)
        return ranks[entry.object], entry.object in void, -live_bytes, entry.object

    left = dict(needed)
    homes: dict[str, Frames] = {}
    for entry in sorted(entries.values(), key=order):
        for part in entry.parts:
            live = left.get(part.pack, 0) & bits_of(part.numbers)
            if live:
                homes.setdefault(entry.object, {})[part.pack] = live
                left[part.pack] &= ~live
    return homes


def _is_allowed(entry: IndexEntry, allowed: Marks) -> bool:
    return mark(entry.object) in allowed and all(part.pack in allowed for part in entry.parts)


def _is_sparse(entry: IndexEntry, live_bytes: int, share: float) -> bool:
    total = sum(sum(part.lengths) for part in entry.parts)
    return live_bytes < total and total - live_bytes >= share * total


def _bytes_of(part: Part, frames: int) -> int:
    """Stored bytes of those of `frames` that lie in `part`."""
    return sum(length for number, length in zip(part.numbers, part.lengths, strict=True) if frames >> number & 1)


def merge_marks(quarantines: Iterable[Collection[bytes]]) -> Marks:
    """All marks of several quarantines."""
    return frozenset().union(*quarantines)
