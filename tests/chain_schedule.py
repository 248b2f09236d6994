"""A seeded schedule of processes over one object store and one control, one step at a time.

Every call to the store and to control is two steps: it takes effect at the first and is answered at the second. Between
any two steps the schedule decides who goes on: the process with the highest priority, and now and then
a priority is drawn anew, so that one is held up for long where it hurts (Burckhardt et al., "A randomized scheduler
with probabilistic guarantees of finding bugs"). A process may crash at any step: from then on it does nothing.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from blockstore.domain import SnapshotId
from blockstore.errors import AlreadyExists, Fenced
from blockstore.rpc import snapshot_pb2 as pb
from snapshotd.memory_store import MemoryStore
from snapshotd.object_store import Data, ObjectInfo
from snapshotd.roots import Roots

_MAX_STEPS = 200_000

T = TypeVar("T")
Content = Mapping[int, int]
"""By block of a volume, which of some contents it has; not mapped where it has none."""


class Crashed(BaseException):
    """The process is no more; nothing in it may catch this."""


class Inline(ThreadPoolExecutor):
    """Work for threads, done at once, so that a schedule is the same each time."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(eq=False)
class Process:
    """One of those that the schedule runs."""

    name: str
    priority: float
    crashed: bool = False
    waiting: list["asyncio.Future[None]"] = field(default_factory=list)


class Schedule:
    """Runs processes by its seed. crashes: how often a step is a crash."""

    def __init__(self, seed: int, crashes: float) -> None:
        self.random = random.Random(seed)
        self.crashes = crashes
        self.steps = 0
        self.processes: list[Process] = []
        self.changes = self.random.choice([0.004, 0.01, 0.03, 0.1])

    def process(self, name: str) -> Process:
        process = Process(name, self.random.random())
        self.processes.append(process)
        return process

    async def step(self, process: Process) -> None:
        """Until it is this process's turn."""
        if process.crashed:
            raise Crashed
        turn = asyncio.get_running_loop().create_future()
        process.waiting.append(turn)
        await turn

    async def run(self, work: list["asyncio.Task[None]"]) -> None:
        """Until all of `work` is done or crashed. Raises what failed."""
        while not all(task.done() for task in work):
            await _idle()
            self.steps += 1
            if self.steps > _MAX_STEPS:
                raise TimeoutError(f"no end after {self.steps} steps")
            ready = [each for each in self.processes if any(not turn.done() for turn in each.waiting)]
            if ready:
                self._one_step(ready)
        for task in work:
            error = task.exception()
            if error is not None and not isinstance(error, Crashed):
                raise error

    def _one_step(self, ready: list[Process]) -> None:
        if self.random.random() < self.changes:
            self.random.choice(ready).priority = self.random.random()
        process = max(ready, key=lambda each: each.priority)
        process.waiting = [turn for turn in process.waiting if not turn.done()]
        if self.random.random() < self.crashes and not process.name.startswith("steady"):
            process.crashed = True
            for turn in process.waiting:
                turn.set_exception(Crashed())
            return
        process.waiting.pop(self.random.randrange(len(process.waiting))).set_result(None)


async def _idle() -> None:
    """Until every task waits for the schedule."""
    loop: Any = asyncio.get_running_loop()
    await asyncio.sleep(0)
    while loop._ready:  # noqa: ASYNC110 - it is the loop itself that is waited for
        await asyncio.sleep(0)


class SteppedStore:
    """One process's way to the store."""

    def __init__(self, store: MemoryStore, schedule: Schedule, process: Process) -> None:
        self.url = store.url
        self.conditional_put = False
        self._store = store
        self._schedule = schedule
        self._process = process

    async def get(self, key: str) -> bytes:
        return await self._call(lambda: self._store.get(key))

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        return await self._call(lambda: self._store.get_range(key, start, length))

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        return await self._call(lambda: self._store.put(key, data, if_absent=if_absent))

    async def delete(self, key: str) -> None:
        await self._call(lambda: self._store.delete(key))

    async def list(self, prefix: str = "", *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """In pages: what changes between two of them may be seen or not."""
        while True:
            await self._schedule.step(self._process)
            page = [info async for info in self._store.list(prefix, after=after)][: self._schedule.random.randint(1, 6)]
            for info in page:
                yield info
            if not page:
                return
            after = page[-1].key

    async def close(self) -> None:
        """The schedule's store stays."""

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        await self._schedule.step(self._process)
        try:
            return await call()
        finally:
            await self._schedule.step(self._process)


@dataclass
class Record:
    """A snapshot in the catalog. content: what it must read back as."""

    state: int
    content: Content
    root: bytes = b""
    base: str = ""


class MemoryControl:
    """The catalog's part in this, as blockstore.control.store_warden does it; each call is one transaction."""

    def __init__(self) -> None:
        self.number = 0
        self.records: dict[SnapshotId, Record] = {}
        self.deleted: frozenset[SnapshotId] = frozenset()

    def roots(self) -> Roots:
        pending = {name for name, each in self.records.items() if each.state == pb.SNAPSHOT_STATE_PENDING}
        completed = {name: each.root for name, each in self.records.items() if each.root}
        return Roots(self.number, completed, frozenset(pending))

    def raise_number(self, expected: int) -> int:
        if expected != self.number:
            raise Fenced(f"the prune number is {self.number}, not {expected}")
        self.number += 1
        return self.number

    def complete(self, name: SnapshotId, root: bytes, number: int) -> None:
        if number != self.number:
            raise Fenced(f"the prune number is {self.number}, not {number}")
        record = self.records[name]
        if record.state != pb.SNAPSHOT_STATE_PENDING:
            raise Fenced(f"{name} is not pending")
        record.state, record.root = pb.SNAPSHOT_STATE_COMPLETED, root

    def add(self, snapshot: pb.Snapshot, number: int) -> pb.Snapshot:
        if number != self.number:
            raise Fenced(f"the prune number is {self.number}, not {number}")
        known = self.records.get(SnapshotId(snapshot.id))
        if known is not None and known.root != snapshot.root:
            raise AlreadyExists(f"{snapshot.id} is known with another root")
        self.records.setdefault(SnapshotId(snapshot.id), Record(pb.SNAPSHOT_STATE_COMPLETED, {}, snapshot.root))
        return snapshot

    def forget(self, name: SnapshotId) -> None:
        """It was deleted, and its root too, as far as anybody knows."""
        if self.records.pop(name, None) is not None:
            self.deleted |= {name}

    def is_base(self, name: SnapshotId) -> bool:
        return any(each.base == name and each.state == pb.SNAPSHOT_STATE_PENDING for each in self.records.values())

    def snapshots(self) -> dict[SnapshotId, pb.Snapshot]:
        return {name: pb.Snapshot(id=name, state=each.state) for name, each in self.records.items()}  # type: ignore[arg-type]


class SteppedCatalog:
    """One process's way to control."""

    def __init__(self, control: MemoryControl, schedule: Schedule, process: Process) -> None:
        self.control = control
        self._schedule = schedule
        self._process = process

    async def call(self, call: Callable[[], T]) -> T:
        await self._schedule.step(self._process)
        try:
            return call()
        finally:
            await self._schedule.step(self._process)

    async def roots(self) -> Roots:
        return await self.call(self.control.roots)

    async def prune_number(self) -> int:
        return await self.call(lambda: self.control.number)

    async def raise_number(self, expected: int) -> int:
        return await self.call(lambda: self.control.raise_number(expected))

    async def add(self, snapshot: pb.Snapshot, number: int) -> pb.Snapshot:
        return await self.call(lambda: self.control.add(snapshot, number))

    async def snapshots(self) -> dict[SnapshotId, pb.Snapshot]:
        return await self.call(self.control.snapshots)

    async def deleted(self, snapshots: Iterable[SnapshotId]) -> frozenset[SnapshotId]:
        return await self.call(lambda: self.control.deleted & frozenset(snapshots))
