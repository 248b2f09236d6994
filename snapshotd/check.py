"""Check: whether all that snapshots refer to is there, by names and sizes; and what is there for nothing.

Reads data keys, manifests, indexes and listings, and no data: `snapshotd.verify` reads that. It changes nothing: what
nothing refers to is prune's to remove. A root that control does not know is told as a problem and never as garbage,
because `cairn store adopt` may be about to make it known; one of a snapshot that was deleted is garbage.
"""

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass

from blockstore.rpc import snapshot_pb2 as pb
from snapshotd.inventory import Inventory, leftover_roots
from snapshotd.keyring import Keyring
from snapshotd.layout import RootName
from snapshotd.object_store import PROBE_FOLDER
from snapshotd.references import DamagedObject, Manifests, References, references_of
from snapshotd.repository import Repository
from snapshotd.repository_objects import KEYS_FOLDER, REPOSITORY_KEY
from snapshotd.roots import Catalog, Roots
from snapshotd.survey import Problems, Survey, check_clear_objects, look_at_objects, read_manifests


@dataclass(frozen=True, slots=True)
class Progress:
    """done of total shards. problems and what is unreferenced: in the last one."""

    done: int
    total: int
    problems: Problems | None = None
    unreferenced_objects: int = 0
    unreferenced_bytes: int = 0


async def check(
    repository: Repository, catalog: Catalog, keyring: Callable[[], Keyring]
) -> AsyncGenerator[Progress, None]:
    """Check the whole store. keyring: opens it as it is now. Raises QuorumUnavailable."""
    roots = await catalog.roots()
    survey = Survey(sorted(roots.completed))
    done = total = 0
    async with aclosing(read_manifests(repository, survey, roots.completed)) as manifests:
        async for done, total in manifests:
            yield Progress(done, total)
    await check_clear_objects(repository, keyring, survey)
    inventory = await look_at_objects(repository, survey)
    leftovers = await leftover_roots(inventory, roots, catalog)
    others = [name for name in sorted(inventory.roots.keys() - leftovers) if name.snapshot not in roots.completed]
    await _note_other_roots(repository, catalog, others, survey)
    _note_strangers(inventory, survey.problems)
    sizes = _unreferenced(inventory, survey.needed, roots, leftovers)
    yield Progress(done, total, survey.problems, len(sizes), sum(sizes))


async def _note_other_roots(
    repository: Repository, catalog: Catalog, others: Iterable[RootName], survey: Survey
) -> None:
    """What roots need that control has not taken yet counts as needed. Those that it does not know at all are told."""
    manifests, known = Manifests(repository), await catalog.snapshots()
    for name in others:
        key, problem = name.key, "`cairn store adopt` makes it known, and prune keeps it until then"
        try:
            await references_of(manifests, await manifests.root_named(name), survey.needed)
        except DamagedObject as error:
            key, problem = error.key, f"it is damaged: {error}"
        if name.snapshot not in known:
            survey.problems.add(key, f"control does not know this snapshot: {problem}", [name.snapshot])


def _note_strangers(inventory: Inventory, problems: Problems) -> None:
    for key in inventory.others:
        if key != REPOSITORY_KEY and not key.startswith((KEYS_FOLDER, PROBE_FOLDER)):
            problems.add(key, "this is no object of a repository: nothing reads it, and prune leaves it alone")


def _unreferenced(inventory: Inventory, needed: References, roots: Roots, leftovers: Iterable[RootName]) -> list[int]:
    """Sizes of the objects that nothing refers to, packs of pending snapshots left out; quarantines of prunes, too."""
    void = inventory.replaced
    sizes = [inventory.shards[name] for name in inventory.shards.keys() - needed.shards]
    sizes += [inventory.roots[name] for name in leftovers]
    sizes += inventory.quarantine_sizes.values()
    for name, entry in inventory.entries.items():
        is_pending = any(part.snapshot in roots.pending for part in entry.parts)
        if name in void or not (is_pending or any(part.pack in needed.frames for part in entry.parts)):
            sizes.append(inventory.objects[name])
    return sizes


def to_message(progress: Progress) -> pb.CheckStoreResponse:
    """One message of the stream."""
    return pb.CheckStoreResponse(
        progress=pb.WorkProgress(phase="manifests", done=progress.done, total=progress.total, unit="shards"),
        problems=progress.problems.messages() if progress.problems else (),
        unreferenced_objects=progress.unreferenced_objects,
        unreferenced_bytes=progress.unreferenced_bytes,
    )
