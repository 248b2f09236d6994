"""Whether all that a root refers to is there to stay: what must be so before control learns of a snapshot.

The order is the one that prune relies on (snapshotd.prune): the prune number, then the quarantines, then what is
stored. Control is told the number, and refuses where it moved since. Every shard and frame is looked up, also those
that were taken over from another snapshot, which may be gone by now.
"""

from blockstore.errors import Conflict
from snapshotd.inventory import Inventory, take_inventory
from snapshotd.prune_plan import Marks, mark, merge_marks
from snapshotd.references import Manifests, References, bits_of, references_of
from snapshotd.repository import Repository
from snapshotd.root import Root
from snapshotd.roots import Catalog


async def vouch(repository: Repository, catalog: Catalog, root: Root, digest: bytes) -> int:
    """The prune number at which `root` (its SHA-256) and all that it needs was there, and in no quarantine.

    Raises Conflict where something is missing or about to go; Corrupt where a shard is damaged or gone.
    """
    number = await catalog.prune_number()
    inventory = await take_inventory(repository, lambda key, error: None)
    needed = References()
    await references_of(Manifests(repository), root, needed)
    marks = merge_marks(inventory.quarantines.values())
    lost = "its root" if mark(digest.hex()) in marks else _not_to_stay(inventory, marks, needed)
    if lost:
        raise Conflict(
            f"snapshot {root.snapshot} needs {lost}, which a prune has deleted or is about to delete: do it again"
        )
    return number


def _not_to_stay(inventory: Inventory, marks: Marks, needed: References) -> str:
    """One thing that is needed and will not stay, in words; empty where there is none. marks: of all quarantines."""
    for name in needed.shards:
        if name not in inventory.shards or mark(name) in marks:
            return f"shard {name}"
    left = {pack: bits for pack, bits in needed.frames.items() if pack not in marks}
    if len(left) < len(needed.frames):
        return f"pack {next(iter(needed.frames.keys() & marks)).hex()}"
    void = inventory.replaced
    for name, entry in inventory.entries.items():
        for part in entry.parts if name not in void and name not in inventory.orphans else ():
            if part.pack in left:
                left[part.pack] &= ~bits_of(part.numbers)
    return next((f"frames of pack {pack.hex()}" for pack, bits in left.items() if bits), "")
