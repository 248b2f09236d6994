"""Prune: what no snapshot needs leaves the object store, while others write, read and prune.

One prune does this, and may end at any point:

 1. look     Take the inventory, ask control for the roots, mark all that they need. What is not needed, and what is
             so little needed that it is worth repacking, are the candidates.
 2. publish  Put `quarantine/<number>`: marks of the candidates and of the packs in them.
 3. raise    Raise the prune number in control's metastore, from what the first look saw. It fails if it moved.
 4. look     Take the inventory again, ask for the roots again, mark again. What is carried out from here on is the
             plan of this second look, cut down to what is in the quarantine.
 5. write    Copy live frames into new objects (snapshotd.repack); then put index objects that list these, and
             declare void all that is about to go away.
 6. ask      Ask for the prune number once more. It must still be the one of step 3. So must the store's owner: the
             number is its own, and a cluster that takes the store over does not ask for ours. From here on that one
             finds our quarantine, and relies on nothing in it; before, it may have completed what never saw it.
 7. delete   Leftover roots, index objects that were written anew, then objects of frames, then shards; last, the
             quarantine.

Roots are those that control names (completed snapshots; deleted ones that somebody still needs), and every root of
another snapshot that lies in the object store: it may be about to complete, or wait for `cairn store adopt`; so a root
of a snapshot that control does not know is never deleted, and neither is what it needs. Other roots of a snapshot that
is completed, and all of one that control says was deleted, are leftovers (snapshotd.root_objects), and are deleted like
all that nobody needs: control will never take them, so it does not matter when it was asked. Packs that name a snapshot
still pending are kept whole, and so are shards that name such packs.

No clock decides, and none of these hold for a time only:

- *Who completes a snapshot* reads the number, then looks at the quarantines, then at what is stored; relies on
  nothing that is in quarantine or not there; and completes only if the number is still that one. If it completed
  before step 3, it is among the roots of step 4. If later, it has seen the quarantine of step 2. So what step 7
  deletes is needed by nobody, then or later, as long as the quarantine is there.
- *Two prunes at once.* A prune that passes step 6 wrote everything before any later prune looked for the second
  time (that is after its raise); one that does not pass deletes nothing. But it may have been held up anywhere, and
  go on when nobody thinks of it any more: put its index, or delete. It touches only what its quarantine names
  (rule A); no prune ever relies on what another's quarantine names, but copies what is needed out of it (rule B,
  `unsafe` in snapshotd.prune_plan); and nobody removes another's quarantine before everything in it is gone or, for
  a shard, is needed by a root of control's, which its prune then knew too (rule C). So whatever a late prune does
  hits what nobody needs; step 6 only keeps it from doing more of it. Its copies are spare ones, and its index may
  list objects that are gone again: every look compares with a listing of objects taken after the indexes were read,
  and readers try each object that is said to hold a frame.
- *A crash* leaves spare objects without an index, indexes of which a part is void, and a quarantine. The next prune
  removes all of it by the same rules.
- *Readers* find a frame in its old object until step 7, and in the new one from step 5 on: one that gets NotFound
  reads the index once more.
- Names are never used twice: every object has a fresh random salt, and is named by the hash of its bytes.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from collections.abc import Set as AbstractSet
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import structlog

from blockstore.errors import Fenced, InvalidRequest, NotFound
from blockstore.rpc import snapshot_pb2 as pb
from snapshotd.ahead import ahead
from snapshotd.crypto import SALT_SIZE
from snapshotd.index import MAX_INDEX_ENTRIES, MAX_REPLACES, Index, IndexEntry, encode_index
from snapshotd.inventory import INDEX_WIDTH, Inventory
from snapshotd.layout import (
    PACKS,
    SHARDS,
    SNAPSHOTS,
    index_key,
    is_name,
    name_of_key,
    pack_key,
    quarantine_key,
    root_name,
    shard_key,
)
from snapshotd.prune_look import Looker, View
from snapshotd.prune_plan import (
    DEFAULT_REPACK_SHARE,
    Marks,
    Plan,
    make_plan,
    mark,
    merge_marks,
)
from snapshotd.quarantine import MAX_MARKS, encode_quarantine
from snapshotd.repack import Repacked, repack
from snapshotd.repository import Repository
from snapshotd.roots import Catalog

_log = structlog.get_logger(__name__)

#: The low bits of a quarantine's number are random: two prunes that begin at the same prune number never write
#: to one object, also where the store has no conditional put.
_RANDOM_BITS: Final = 32


class Phase(Enum):
    """Of WorkProgress, with the unit."""

    LOOK = "looking", "steps"
    COPY = "copying", "bytes"
    DELETE = "deleting", "objects"


@dataclass(frozen=True, slots=True)
class Progress:
    """done of total, in the unit of the phase. plan: what is carried out, once that is known. ended: all of it was."""

    phase: Phase
    done: int
    total: int
    plan: Plan | None = None
    ended: bool = False


@dataclass(slots=True)
class Pruner:
    """One prune.

    importing: snapshots that this process writes and control does not know. random: bytes of chance. most_marks: that
    are put into its quarantine; what they do not name waits for the next prune.
    """

    repository: Repository
    catalog: Catalog
    repack_share: float = DEFAULT_REPACK_SHARE
    importing: Callable[[], Collection[str]] = frozenset
    random: Callable[[int], bytes] = secrets.token_bytes
    most_marks: int = MAX_MARKS
    _copied: int = field(default=0, init=False)
    _owner: str = field(default="", init=False)

    async def run(self, *, dry_run: bool) -> AsyncGenerator[Progress, None]:
        """Prune, and say how far it is.

        Raises Fenced where another prune began, Conflict where another cluster took the store over, Corrupt where a
        root is damaged.
        """
        self._owner = self.repository.owner
        if not 0 <= self.repack_share <= 1:
            raise InvalidRequest(f"a repack share of {self.repack_share:g}: it is between 0 and 1")
        yield Progress(Phase.LOOK, 0, 2)
        view = await self._look()
        plan = self._plan(view, merge_marks(view.inventory.quarantines.values()), None)
        yield Progress(Phase.LOOK, 1, 2, plan, ended=False)
        if dry_run or (plan.is_empty and not view.inventory.quarantines and not view.stale_indexes(())):
            yield Progress(Phase.DELETE, 0, 0, plan, ended=not dry_run)
            return
        async with aclosing(self._carry_out(view, plan)) as progress:
            async for each in progress:
                yield each

    # ---- steps 2 to 4

    async def _carry_out(self, view: View, plan: Plan) -> AsyncGenerator[Progress, None]:
        number = self._new_number(view.roots.number)
        marks = plan.marks(view.inventory, self.most_marks)
        await self._publish(number, marks)
        try:
            raised = await self._raise(view.roots.number)
            view = await self._look()
            plan = self._plan(view, self._foreign(view, number), marks)
        except BaseException:
            # Nothing was declared void or deleted, and nothing will be: nobody needs the quarantine.
            await asyncio.shield(self.repository.store.delete(quarantine_key(number)))
            raise
        yield Progress(Phase.LOOK, 2, 2, plan)
        async with aclosing(self._write_and_delete(view, plan, raised, number)) as progress:
            async for each in progress:
                yield each

    async def _look(self) -> View:
        return await Looker(self.repository, self.catalog, self.importing).look()

    def _plan(self, view: View, condemned: Marks, allowed: Marks | None) -> Plan:
        pending = view.roots.pending | set(self.importing())
        return make_plan(
            view.inventory,
            view.needed,
            leftovers=view.leftovers,
            pending=pending,
            condemned=condemned,
            repack_share=self.repack_share,
            allowed=allowed,
        )

    def _new_number(self, expected: int) -> int:
        return (expected + 1) << _RANDOM_BITS | int.from_bytes(self.random(_RANDOM_BITS // 8), "little")

    def _foreign(self, view: View, number: int) -> Marks:
        """Marks in the quarantines of other prunes."""
        return merge_marks(marks for each, marks in view.inventory.quarantines.items() if each != number)

    async def _publish(self, number: int, marks: Marks) -> None:
        stored = encode_quarantine(self.repository.keys, number, marks, self.random(SALT_SIZE))
        await self.repository.store.put(quarantine_key(number), stored)

    async def _raise(self, expected: int) -> int:
        return await self.catalog.raise_number(expected)

    # ---- steps 5 to 7

    async def _write_and_delete(
        self, view: View, plan: Plan, raised: int, number: int
    ) -> AsyncGenerator[Progress, None]:
        self._copied = 0
        copying = asyncio.create_task(repack(self.repository, plan.repack, lambda: self.random(SALT_SIZE), self._count))
        try:
            while not copying.done():
                yield Progress(Phase.COPY, self._copied, plan.bytes_copied, plan)
                await asyncio.wait({copying}, timeout=1.0)
            repacked = await self._or_fenced(copying, raised)
        finally:
            copying.cancel()
            await asyncio.wait({copying})
        gone = plan.delete | repacked.moved
        stale = await self._write_indexes(view, gone, repacked)
        await self._check_number(raised)
        keys = [
            *(root.key for root in sorted(plan.roots)),
            *(index_key(name) for name in sorted(stale)),
            *(pack_key(name) for name in sorted(gone)),
            *(shard_key(name) for name in sorted(plan.shards)),
        ]
        async with aclosing(self._delete(keys)) as deleted:
            async for count in deleted:
                yield Progress(Phase.DELETE, count, len(keys), plan)
        await self._end_quarantines(view, number)
        yield Progress(Phase.DELETE, len(keys), len(keys), plan, ended=True)

    def _count(self, size_bytes: int) -> None:
        self._copied += size_bytes

    async def _or_fenced(self, copying: "asyncio.Task[Repacked]", raised: int) -> Repacked:
        try:
            return await copying
        except NotFound:
            await self._check_number(raised)
            raise

    async def _check_number(self, raised: int) -> None:
        await self.repository.check_owner(self._owner)
        number = await self.catalog.prune_number()
        if number != raised:
            raise Fenced(
                f"another prune began (its number is {number}, this one's {raised}): nothing was deleted here; let it "
                "end, then prune again"
            )

    async def _write_indexes(self, view: View, gone: Collection[str], repacked: Repacked) -> set[str]:
        """Put index objects that list what was copied, and void what is about to go. Names of those that they replace.

        They take over what stale ones still have to say; an orphan that stays gets into the index here.
        """
        inventory, stale = view.inventory, view.stale_indexes(gone)
        void = inventory.replaced
        dead = void | set(gone)
        kept = [*repacked.entries, *(entry for name, entry in inventory.orphans.items() if name not in dead)]
        kept += _living(inventory, stale, dead)
        listed = {entry.object for index in inventory.indexes.values() for entry in index.entries}
        absent = listed - inventory.objects.keys()
        voided = sorted(((void | absent) & (listed | inventory.objects.keys())) | set(gone))
        if kept or stale or gone:
            for index in _split(kept, voided):
                name, stored = encode_index(self.repository.keys, index, self.random(SALT_SIZE))
                await self.repository.store.put(index_key(name), stored)
        return stale

    async def _delete(self, keys: Iterable[str]) -> AsyncGenerator[int, None]:
        """Delete in that order, many at a time; how many are gone."""

        async def delete(key: str) -> None:
            await self.repository.store.delete(key)

        count = 0
        async with aclosing(ahead(delete, keys, INDEX_WIDTH)) as deleted:
            async for _ in deleted:
                count += 1
                yield count

    async def _end_quarantines(self, view: View, number: int) -> None:
        """This prune's own has done its work; one that was left behind goes once all that it names is gone (rule C)."""
        others = {each: marks for each, marks in view.inventory.quarantines.items() if each != number}
        if others:
            present = await self._names(PACKS) | (await self._names(SHARDS) - view.strong)
            marks_present = {mark(name) for name in present | await self._root_names()}
            for each, marks in others.items():
                if marks.isdisjoint(marks_present):
                    await self.repository.store.delete(quarantine_key(each))
        await self.repository.store.delete(quarantine_key(number))

    async def _names(self, folder: str) -> set[str]:
        names = {name_of_key(info.key) async for info in self.repository.store.list(folder)}
        return {name for name in names if is_name(name)}

    async def _root_names(self) -> set[str]:
        roots = [root_name(info.key) async for info in self.repository.store.list(SNAPSHOTS)]
        return {root.name for root in roots if root is not None and root.name}


def _living(inventory: Inventory, stale: AbstractSet[str], dead: Collection[str]) -> list[IndexEntry]:
    """The entries of stale index objects whose objects are there, each once."""
    living = {
        entry.object: entry
        for name in stale & inventory.indexes.keys()
        for entry in inventory.indexes[name].entries
        if entry.object in inventory.objects and entry.object not in dead
    }
    return list(living.values())


def _split(entries: list[IndexEntry], replaces: list[str]) -> list[Index]:
    """As few index objects as will do; what lists the entries comes before what voids the objects they came from."""
    indexes = [
        Index(tuple(entries[at : at + MAX_INDEX_ENTRIES])) for at in range(0, len(entries), MAX_INDEX_ENTRIES)
    ] or [Index(())]
    if len(replaces) <= MAX_REPLACES:
        return [*indexes[:-1], Index(indexes[-1].entries, tuple(replaces))]
    steps = range(0, len(replaces), MAX_REPLACES)
    return [*indexes, *(Index((), tuple(replaces[at : at + MAX_REPLACES])) for at in steps)]


def to_plan_message(plan: Plan) -> pb.PrunePlan:
    """For whoever asked."""
    return pb.PrunePlan(
        objects_deleted=len(plan.delete) + len(plan.shards) + len(plan.roots),
        packs_repacked=len(plan.repack),
        bytes_freed=plan.bytes_freed,
        bytes_copied=plan.bytes_copied,
        bytes_kept=plan.bytes_kept,
    )


def to_progress_message(progress: Progress) -> pb.PruneResponse:
    """One message of the stream."""
    phase, unit = progress.phase.value
    message = pb.PruneResponse(
        progress=pb.WorkProgress(phase=phase, done=progress.done, total=progress.total, unit=unit), done=progress.ended
    )
    if progress.plan is not None:
        message.plan.CopyFrom(to_plan_message(progress.plan))
    return message
