"""Ships one snapshot: from the replicas of a sealed generation into the object store, until control calls it completed.

The changes since the base are listed and read in order, some reads at once, from whichever replica answers; the
base's shards are shared where nothing changed. An attempt that failed for want of somebody who answers is made again
after a pause, and finds what the last one stored. What no second attempt would change (damage, a request that makes
no sense) fails the snapshot, with the reason.

Prune (design, section 5; snapshotd.prune): before it relies on anything stored, an attempt reads the prune number,
then the quarantines, then what is there, and finds no block in what is quarantined or gone. The snapshot completes
only while the number is still that one; where it moved, everything that it refers to is checked again, and what is
quarantined by now is written anew. What it takes over from its base is not: that is kept until this is completed, or
retried, and then control refuses this one's word.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, TypeVar

import structlog

from blockstore.errors import AlreadyExists, CairnError, Corrupt, Fenced, NoSpace, NotFound, QuorumUnavailable
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, FILL_GENERATION
from blockstore.volume.changes import Changes, Run, batches
from blockstore.volume.sealed_segment import NodeChannels, SealedSegment
from snapshotd.ahead import ahead
from snapshotd.control_client import ControlClient
from snapshotd.inherited import check_inherited
from snapshotd.inventory import load_quarantines
from snapshotd.pack_store import PackStore
from snapshotd.progress import Progress
from snapshotd.prune_plan import Marks, merge_marks
from snapshotd.reader import SnapshotReader
from snapshotd.root import Root
from snapshotd.totals import ShipTotals
from snapshotd.writer import SnapshotWriter

_log = structlog.get_logger(__name__)

#: Calls of 1 MiB to a node at once: enough that the next ones are there when one was hashed.
_READS: Final = 4
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 10.0
#: A node that is away is waited for in the middle of an attempt; then the attempt gives its place to others.
_PATIENCE_S: Final = 60.0
#: A replica that has not applied the seal yet says NotFound, as one does that merged the generation away.
_UNKNOWN_GENERATION_S: Final = 60.0

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ShipParts:
    """What all ships of a daemon share. attempts: as many at once, each holds some MiB. cluster: the owner.

    totals: of all of them.
    """

    packs: PackStore
    reader: SnapshotReader
    control: ControlClient
    channels: NodeChannels
    call_timeout_s: float
    attempts: asyncio.Semaphore
    cluster: str
    totals: ShipTotals = field(default_factory=ShipTotals)


class Ship:
    """One task of control's. `run` it once; cancel that when control takes the task away."""

    def __init__(self, task: pb.ShipTask, parts: ShipParts) -> None:
        self.snapshot = task.snapshot.id
        self.progress = Progress(asyncio.get_running_loop().time)
        self._task = task
        self._parts = parts
        self._segments: list[SealedSegment] = []
        left = task.snapshot.size_bytes // BLOCK_SIZE
        for segment, (base, generation) in zip(task.segments, generations_of(task), strict=False):
            blocks = min(segment.size_bytes // BLOCK_SIZE, left)
            left -= blocks
            where = task.snapshot.volume, segment, blocks, parts.channels, parts.call_timeout_s
            self._segments.append(SealedSegment(*where, base=base, generation=generation, seal=task.seal_name))

    def is_for(self, task: pb.ShipTask) -> bool:
        """Whether it is the same try: a retry may have another base."""
        return self._task.retries == task.retries

    def move(self, task: pb.ShipTask) -> None:
        """Control says the task again, with the addresses of now."""
        for mine, segment in zip(self._segments, task.segments, strict=False):
            mine.move(segment)

    async def run(self) -> None:
        """Until it is completed, failed, or somebody else's."""
        pause_s, not_found_since = _FIRST_PAUSE_S, 0.0
        clock = asyncio.get_running_loop().time
        while True:
            try:
                async with self._parts.attempts:
                    await _Attempt(self._task, self._parts, self._segments, self.progress).carry_out()
                return
            except Fenced as error:
                _log.info("this is not to be shipped here any more", snapshot=self.snapshot, error=str(error))
                return
            except (QuorumUnavailable, NoSpace, NotFound) as error:
                not_found_since = (not_found_since or clock()) if isinstance(error, NotFound) else 0.0
                if not_found_since and clock() - not_found_since > _UNKNOWN_GENERATION_S:
                    await self._fail(str(error))
                    return
                self.progress.why = str(error)
                self._parts.totals.pauses += 1
                _log.warning("shipping pauses", snapshot=self.snapshot, error=str(error), pause_s=pause_s)
            except CairnError as error:
                await self._fail(str(error))
                return
            except Exception as error:
                _log.exception("shipping failed in a way that nobody foresaw", snapshot=self.snapshot)
                await self._fail(f"a defect of snapshotd: {type(error).__name__}: {error}; its log says more")
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _fail(self, reason: str) -> None:
        """Tell control, which may be away for now; it may have taken the task away meanwhile."""
        _log.warning("the snapshot failed", snapshot=self.snapshot, reason=reason)
        self._parts.totals.failed += 1
        while True:
            try:
                await self._parts.control.fail(self.snapshot, reason, self._task.retries)
                return
            except QuorumUnavailable as error:
                self.progress.why = f"{reason}; and control cannot be told: {error}"
            except CairnError as error:
                _log.info("control does not take the failure", snapshot=self.snapshot, error=str(error))
                return
            await asyncio.sleep(_LONGEST_PAUSE_S)


class _Attempt:
    """One try, from the list of changes to control's word."""

    def __init__(
        self, task: pb.ShipTask, parts: ShipParts, segments: Sequence[SealedSegment], progress: Progress
    ) -> None:
        self._task = task
        self._parts = parts
        self._segments = segments
        self._progress = progress
        self._number = 0
        """The prune number at which all references were last checked."""
        self._marks: Marks = frozenset()
        """What was in quarantine then."""

    async def carry_out(self) -> None:
        snapshot = self._task.snapshot
        await self._parts.packs.repository.check_owner(self._parts.cluster)
        await self._look()
        base = await self._read_base()
        writer = SnapshotWriter(self._parts.packs, self._parts.reader, snapshot.id, snapshot.size_bytes, base)
        writer.shunned = self._marks
        try:
            await self._copy_all(writer)
            await self._complete(writer)
        except BaseException:
            await writer.cancel()
            raise

    # ---- blocks

    async def _copy_all(self, writer: SnapshotWriter) -> None:
        # Without a base the fills count as well: they are in generation 0.
        lists = [
            await segment.list_changes(segment.base + 1 if self._task.base else FILL_GENERATION, segment.generation)
            for segment in self._segments
        ]
        self._progress.begin(sum(changes.count for changes in lists) * BLOCK_SIZE)
        first = 0
        for segment, changes in zip(self._segments, lists, strict=True):
            await self._copy(writer, segment, first, changes)
            first += segment.blocks
        await writer.settle()
        self._progress.bytes_stored = writer.stored_bytes

    async def _copy(self, writer: SnapshotWriter, segment: SealedSegment, first: int, changes: Changes) -> None:
        """first: the segment's first block in the volume."""

        async def read(runs: list[Run]) -> tuple[list[Run], memoryview]:
            return runs, await self._patiently(lambda: segment.read(segment.generation, runs), writer)

        async with aclosing(ahead(read, changes.batches(self._parts.channels.pace.blocks), _READS)) as parts:
            async for runs, payload in parts:
                await writer.put_runs([Run(first + start, length) for start, length in runs], payload)
                self._progress.add(len(payload))
                self._parts.totals.read_bytes += len(payload)
                self._progress.bytes_stored = writer.stored_bytes

    async def _patiently(self, call: Callable[[], Awaitable[Result]], writer: SnapshotWriter) -> Result:
        """The call's result, also where nobody answers for a while: what was done so far is not done again for it."""
        clock = asyncio.get_running_loop().time
        give_up_at, pause_s = clock() + _PATIENCE_S, _FIRST_PAUSE_S
        while True:
            try:
                return await call()
            except QuorumUnavailable as error:
                if clock() > give_up_at:
                    raise
                self._progress.why = str(error)
            writer.pause()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    # ---- references

    async def _read_base(self) -> Root | None:
        """After `_look`. Raises Corrupt where it, or something that it needs, is damaged or gone."""
        if not self._task.base:
            return None
        parts = self._parts
        try:
            base = await parts.reader.root(self._task.base, self._task.base_root, background=True)
            await check_inherited(parts.packs.repository, parts.packs.index, base)
        except (NotFound, Corrupt) as error:
            # A retry alone would choose it again: the catalog still has it as completed.
            raise Corrupt(
                f"this is a change of {self._task.base}, which cannot be read ({error}): delete that, then retry this"
            ) from error
        return base

    async def _look(self) -> None:
        """The prune number, then the quarantines, then what is stored: in this order."""
        self._number = await self._parts.control.catalog.prune_number()
        self._marks = merge_marks((await load_quarantines(self._parts.packs.repository)).values())
        await self._parts.packs.look(self._task.snapshot.id)

    async def _mend(self, writer: SnapshotWriter) -> None:
        """Write anew what this snapshot refers to and a prune means to delete, or has deleted."""
        await self._look()
        writer.shunned = self._marks
        await writer.mend_shards(self._marks)
        stale = await writer.stale_runs(self._marks)
        _log.info("references are checked again", snapshot=writer.snapshot, stale=sum(run.length for run in stale))
        first = 0
        for segment in self._segments:
            end = first + segment.blocks
            for runs in batches(_inside(stale, first, end), self._parts.channels.pace.blocks):
                payload = await segment.read(segment.generation, runs)
                await writer.put_runs([Run(first + start, length) for start, length in runs], payload)
            first = end
        await writer.settle()

    # ---- root

    async def _complete(self, writer: SnapshotWriter) -> None:
        catalog, control = self._parts.control.catalog, self._parts.control
        written: tuple[Root, bytes] | None = None
        while True:
            while await catalog.prune_number() != self._number:
                await self._mend(writer)
            if written is None or written[0].shards != writer.shards:
                written = await writer.finish(root_of(self._task.snapshot, time.time_ns() // 1_000_000))
            root, digest = written
            # Another cluster that takes the store over from here on sees the root, and prunes nothing that it needs.
            await self._parts.packs.repository.check_owner(self._parts.cluster)
            try:
                await control.complete(writer.snapshot, digest, root.statistics, self._number, self._task.retries)
                _log.info("snapshot is whole in the object store", snapshot=writer.snapshot, stored=writer.stored_bytes)
                self._count(root)
                return
            except AlreadyExists:
                # With the root of an earlier attempt whose end nobody heard of, or of another daemon: it has that one.
                _log.info("snapshot was whole in the object store before", snapshot=writer.snapshot)
                self._parts.totals.completed += 1
                return
            except Fenced:
                if await catalog.prune_number() == self._number:
                    raise

    def _count(self, root: Root) -> None:
        totals, found = self._parts.totals, root.statistics
        totals.completed += 1
        totals.changed_bytes += found.changed_bytes
        totals.deduplicated_bytes += found.deduplicated_bytes
        totals.stored_bytes += found.stored_bytes


def generations_of(task: pb.ShipTask) -> list[tuple[int, int]]:
    """Of each segment that the snapshot has: the generation of its base, and its own."""
    if not task.generations:
        return [(task.base_generation, task.snapshot.generation)]
    return list(zip(task.base_generations, task.generations, strict=True))


def _inside(runs: Iterable[Run], first: int, end: int) -> Iterator[Run]:
    """What of the volume's runs lies in the segment that has its blocks [first, end), counted from its first."""
    for run in runs:
        start, stop = max(run.start, first), min(run.start + run.length, end)
        if start < stop:
            yield Run(start - first, stop - start)


def root_of(snapshot: pb.Snapshot, completed_at_ms: int) -> Root:
    """What control knows of a snapshot, for its root; without shards."""
    return Root(
        snapshot=snapshot.id,
        volume=snapshot.volume,
        volume_name=snapshot.volume_name,
        size_bytes=snapshot.size_bytes,
        parent=snapshot.parent,
        barrier=snapshot.barrier,
        generation=snapshot.generation,
        created_at_ms=snapshot.created_at_ms,
        sealed_at_ms=snapshot.sealed_at_ms,
        completed_at_ms=completed_at_ms,
        pause_us=snapshot.pause_us,
        description=snapshot.description,
        tags=dict(snapshot.tags),
    )
