"""A node with one replica: the shell around the very Follower, as blockstore/node/hosted_replica.py has it.

Events come one at a time and effects are carried out in order; what touches the tables for long runs
beside them, one at a time, and only ResetLog and whatever follows it waits for that. A crash keeps
the disk: a group or a transaction under way is there afterwards or not.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from blockstore.domain import Position, ReplicaId
from blockstore.errors import CairnError, Conflict, Corrupt, QuorumUnavailable
from blockstore.log import LogEntry, LogImage, RecordEntry
from blockstore.record import Record
from blockstore.replication.follower import Follower
from blockstore.replication.messages import (
    Answer,
    Append,
    Checkpoint,
    Commit,
    FetchDelta,
    FetchLog,
    FollowerEffect,
    Persist,
    ResetLog,
    SealEpoch,
)
from tests.simulation.disk import Disk
from tests.simulation.fetch import Fetch
from tests.simulation.model_tables import EXTENT_BLOCKS, Store
from tests.simulation.network import Call, Stream
from tests.simulation.requests import Copied, DeltaRequest, Described, DescribeRequest, LogRequest, ReadRequest
from tests.simulation.scheduler import Process

if TYPE_CHECKING:
    from tests.simulation.world import World

#: Until a checkpoint that found no room is tried again.
_REST_S = 0.1


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """How long a group or a transaction takes; `slow` of them take up to `slow_s` more."""

    sync_s: float = 0.001
    slow: float = 0.0
    slow_s: float = 0.3

    def draw(self, random: Random) -> float:
        delay = self.sync_s * (0.5 + random.random())
        return delay + random.random() * self.slow_s if self.slow and random.random() < self.slow else delay


@dataclass(slots=True)
class TableJob:
    """begin: whether there is anything to do; commit: the transaction; end: what follows it; failed: what instead."""

    begin: Callable[[], bool]
    commit: Callable[[], None]
    end: Callable[[], None]
    failed: Callable[[], None]


class Node(Process):
    """One node. `follower` and `store` are what it holds in memory; None of it outlives a crash."""

    #: What waited for a transaction is carried out also where that found no room.
    FOLLOWS_A_FAILURE = True

    def __init__(self, world: "World", name: str, replica: ReplicaId, disk: Disk, speed: DiskSpeed) -> None:
        super().__init__(world.scheduler, name)
        self.world = world
        self.replica = replica
        self.disk = disk
        self.speed = speed
        self.alive = False
        self.lost = False
        """For good: it does not start any more."""
        self.full = False
        self.journal_stalls = False
        """No group goes into its journal."""
        self.corrupt = False
        self.no_room = False
        """No transaction of its tables goes through."""
        self.fence = 0
        """The epoch that reads of its tables have to be of: beside them, and there while the node is down."""

    # ---- life

    def start(self) -> None:
        """Recover from the disk, as a node does before it answers anything."""
        assert not self.alive
        if self.lost:
            return
        self.alive = True
        self.store = Store(self.disk.tables)
        self._mark = self.disk.tables.mark
        self._waiting: list[tuple[int, tuple[LogEntry, ...]]] = []
        self._group: list[tuple[int, tuple[LogEntry, ...]]] = []
        self._deferred: deque[FollowerEffect] = deque()
        self._jobs: deque[TableJob] = deque()
        self._job: TableJob | None = None
        self._fetches: dict[type, Fetch] = {}
        self._history: dict[int, Record] = {}
        self._checkpoint_due = False
        entries = self.disk.entries()
        for entry in entries:
            self._remember(entry)
        self.follower, effects = Follower.restore(
            self.replica, self.disk.tables.image, entries, damage=self.disk.damage
        )
        self.follower.full = self.full
        self.fence = self.follower.epoch
        self.world.trace(self.name, "starts", self.disk.damage, self.follower.end, self.follower.whole)
        self.world.checker.restored(self)
        if not any(isinstance(effect, Persist) for effect in effects):
            self.disk.damage = None  # it was filling already, with that floor
        self.carry_out(effects)
        if self.disk.tables.lost:
            self.content_lost()
        self.after(self.world.plan.checkpoint_s, self._checkpoint_by_age)

    def crash(self) -> None:
        """Power or process is gone; what was under way to the disk is there, or not."""
        assert self.alive
        self.world.trace(self.name, "crashes")
        random = self.world.random
        if self._group and random.random() < 0.5:
            self._write_group()
        if self._job is not None and random.random() < 0.5:
            self._job.commit()
            self.disk.release()
        self.world.checker.disk_changed(self)
        self.end_life()
        self.world.network.server_gone(self)

    def set_full(self, full: bool, *, stalls: bool = False) -> None:
        """Whether its disk is short of space; stalls: there is none left, not for the journal either."""
        self.full, self.journal_stalls = full, stalls
        if self.alive:
            self.follower.full = full
            self._begin_group()

    def has_room_again(self) -> None:
        self.set_full(False)

    # ---- events

    def seal(self, call: Call, message: SealEpoch) -> None:
        effects = self.follower.seal(call, message)
        self.fence = self.follower.epoch
        self.carry_out(effects)

    def append(self, stream: Stream, message: Append) -> None:
        try:
            effects = self.follower.append(stream, message)
        except Conflict:
            stream.refuse()
        else:
            self.carry_out(effects)

    def read(self, call: Call, request: ReadRequest) -> None:
        try:
            self.carry_out(self.follower.read(request.epoch, request.configuration, request.commit))
        except CairnError as error:
            call.deliver(error)
        else:
            lost = self.store.tables.has_lost(request.start, request.count)
            if lost:
                self.content_lost()
            bad = Corrupt(f"{self.replica}: a block fails its checksum, or has no entry")
            call.deliver(bad if self.corrupt or lost else self._content(request))

    def _content(self, request: ReadRequest) -> list[int | None]:
        """Its blocks; None for those that a source has."""
        found = self.store.read(request.start, request.count)
        return found if self.store.has_source else [value or 0 for value in found]

    def describe(self, call: Call, request: DescribeRequest) -> None:
        """As blockstore/node/generations.py: a checkpoint first, where the tables are behind."""
        if not self._describe(call, request) and self.follower.whole and self.follower.commit >= request.applied:
            unable = QuorumUnavailable(f"{self.replica} cannot say how it is at {tuple(request.applied)}")

            def again() -> None:
                if not self._describe(call, request):
                    call.deliver(unable)

            self.checkpoint(again, lambda: call.deliver(unable))

    def _describe(self, call: Call, request: DescribeRequest) -> bool:
        tables = self.store.tables
        stated = self.follower.whole and tables.image.filling is None and tables.image.applied >= request.applied
        if stated:
            call.deliver(Described(tables.image.applied, tables.copy_meta()))
        return stated

    def content_lost(self) -> None:
        """What its shell does about lost entries: it says so, and the leader tells it when to fill anew."""
        if not self.follower.copies_all and not self.follower.damaged:
            self.world.seen["content_lost"] += 1
            self.follower.damaged = True

    def carry_out(self, effects: Iterable[FollowerEffect]) -> None:
        for effect in effects:
            if self._deferred or (isinstance(effect, ResetLog) and self._job is not None):
                self._deferred.append(effect)
            else:
                self._carry_out(effect)

    def _carry_out(self, effect: FollowerEffect) -> None:
        self.world.seen[type(effect).__name__] += 1
        self.world.trace(self.name, effect)
        match effect:
            case Persist(number, entries):
                self.world.checker.submitted(self, entries)
                self.world.seen.update(type(entry).__name__ for entry in entries)
                self._waiting.append((number, entries))
                self._begin_group()
            case Answer(origin, message):
                self.world.checker.answers(self, message)
                origin.deliver(message)  # type: ignore[attr-defined]
            case Commit(records):
                self.world.checker.committed(self, records)
                self.store.commit(records)
                if len(self.store.memtable) >= self.world.plan.checkpoint_records:
                    self.checkpoint_soon()
            case ResetLog():
                self.store.reset()
            case FetchLog() | FetchDelta():
                earlier = self._fetches.pop(type(effect), None)
                if earlier is not None:
                    earlier.close()
                self._fetches[type(effect)] = Fetch(self, effect)
            case Checkpoint():
                self.checkpoint_soon()

    # ---- journal

    def _begin_group(self) -> None:
        if not self._group and self._waiting and not self.journal_stalls:
            self._group, self._waiting = self._waiting, []
            self.after(self.speed.draw(self.world.random), self._end_group)

    def _write_group(self) -> int:
        entries = [entry for _, entries in self._group for entry in entries]
        for entry in entries:
            self._remember(entry)
        return self.disk.write_group(entries)

    def _end_group(self) -> None:
        last = self._write_group()
        self.world.checker.disk_changed(self)
        group, self._group = self._group, []
        self._begin_group()
        for number, _ in group:
            self._mark = last
            self.carry_out(self.follower.persisted(number))

    def _remember(self, entry: LogEntry) -> None:
        """Journal files that were released are read for peers until they are used again."""
        if isinstance(entry, RecordEntry):
            self._history[int(entry.record.sequence)] = entry.record
            self._history.pop(int(entry.record.sequence) - self.world.plan.history_records, None)

    # ---- tables

    def checkpoint_soon(self) -> None:
        if not self._checkpoint_due:
            self._checkpoint_due = True
            self.after(0.0, lambda: self.checkpoint(lambda: None))

    def checkpoint(self, then: Callable[[], None], failed: Callable[[], None] = lambda: None) -> None:
        """Bring all that is committed into the tables, and give up the journal below. failed: there was no room."""
        image = LogImage()
        mark = 0

        def begin() -> bool:
            nonlocal image, mark
            self._checkpoint_due = False
            image, mark = self.follower.image(), self._mark
            return True

        def commit() -> None:
            self.store.checkpoint(image, mark)
            self.disk.release()

        def end() -> None:
            self.world.trace(self.name, "checkpointed", image.applied, image.filling)
            self.carry_out(self.follower.checkpointed(image))
            then()

        def again() -> None:
            self.world.trace(self.name, "no room for a checkpoint", image.applied)
            self.after(_REST_S, self.checkpoint_soon)
            failed()

        self._run_job(TableJob(begin, commit, end, again))

    def merge(self) -> None:
        """What nobody has pinned any more goes."""

        def commit() -> None:
            if self.store.tables.merge():
                self.world.seen["merged"] += 1

        self._run_job(TableJob(lambda: True, commit, lambda: None, lambda: None))

    def copy(self, attempt: int, copied: Copied, then: Callable[[bool], None]) -> None:
        """Write what a peer sent. then(False) where this attempt is over."""
        image: LogImage | None = None

        def begin() -> bool:
            nonlocal image
            image = self.follower.accept_copy(attempt, copied.stated, absent=copied.absent)
            if image is None:
                then(False)
            return image is not None

        def commit() -> None:
            assert image is not None
            self.store.tables.write_copy(copied.meta, copied.extents, copied.stated, image)

        self._run_job(TableJob(begin, commit, lambda: then(True), lambda: then(False)))

    def _checkpoint_by_age(self) -> None:
        if self.store.memtable:
            self.checkpoint_soon()
        self.after(self.world.plan.checkpoint_s, self._checkpoint_by_age)

    def _run_job(self, job: TableJob) -> None:
        self._jobs.append(job)
        self._next_job()

    def _next_job(self) -> None:
        while self._job is None and self._jobs:
            job = self._jobs.popleft()
            if job.begin():
                self._job = job
                self.after(self.speed.draw(self.world.random) * 3, self._end_job)

    def _end_job(self) -> None:
        job, self._job = self._job, None
        assert job is not None
        failed = self.no_room
        if failed:
            self.world.seen["no room"] += 1
            self.world.seen["no room beside a reset"] += bool(self._deferred)
        else:
            job.commit()
            self.world.checker.disk_changed(self)
        self._job = job  # the lock is held until what follows the transaction has been told
        if failed:
            job.failed()
        else:
            job.end()
        self._job = None
        deferred, self._deferred = self._deferred, deque()
        if not failed or self.FOLLOWS_A_FAILURE:
            self.carry_out(deferred)
        self._next_job()

    # ---- for peers

    def serve(self, stream: Stream, request: Any) -> None:
        if request.epoch < self.follower.epoch:
            stream.deliver(None)
        elif isinstance(request, LogRequest):
            self._serve_log(stream, request)
        elif self.store.tables.image.applied < request.at_least:
            self.checkpoint(lambda: self._serve_delta(stream, request), lambda: stream.deliver(None))
        else:
            self._serve_delta(stream, request)

    def _serve_log(self, stream: Stream, request: LogRequest) -> None:
        at = request.after
        while at != request.up_to:
            records = self._records(at, request.up_to)
            if not records:
                stream.deliver("not held")
                return
            stream.deliver(records)
            at = records[-1].position
        stream.deliver("end")

    def _records(self, after: Position, up_to: Position) -> tuple[Record, ...]:
        """The next of the chain, from memory or from the journal's files; none where they are not held."""
        held = self.follower.records(after, up_to)
        if held is not None:
            return held
        chain: list[Record] = []
        at = after
        while at.sequence < up_to.sequence:
            record = self._history.get(at.sequence + 1)
            if record is None or record.previous != at:
                return ()
            chain.append(record)
            at = record.position
        return tuple(chain) if at == up_to else ()

    def _serve_delta(self, stream: Stream, request: DeltaRequest) -> None:
        tables = self.store.tables
        if not self.follower.whole or tables.image.applied < request.at_least:
            stream.deliver(None)
            return
        extents = tables.delta_extents(request.since)
        stream.deliver((len(extents), Copied(tables.image.applied, tables.copy_meta(), ())))
        self._serve_extents(stream, extents, 0)

    def _serve_extents(self, stream: Stream, extents: list[int], at: int) -> None:
        """One after another, each as of its own time."""
        if not stream.open:
            return
        if at == len(extents):
            stream.deliver("end")
            return
        if not self.follower.whole:
            stream.deliver(None)
            return
        tables = self.store.tables
        if tables.has_lost(extents[at] * EXTENT_BLOCKS, EXTENT_BLOCKS):
            stream.deliver(None)
            self.content_lost()
            return
        stream.deliver((len(extents), Copied(tables.image.applied, None, (tables.copy_extent(extents[at]),))))
        self.after(self.speed.draw(self.world.random), lambda: self._serve_extents(stream, extents, at + 1))
