"""When committed records go from the journal into the tables.

A replica is due when it holds enough for a checkpoint to pay (checkpoint_bytes), when its oldest
record has waited long enough (checkpoint_s), when something waits for it, or when the node needs
what it holds: memory, or the oldest journal file. One checkpoint runs at a time: two would share one
disk and one interpreter, and each would take twice as long.
"""

import asyncio
from collections.abc import Callable, Iterable
from time import perf_counter

import structlog

from blockstore.config import NodeSettings
from blockstore.domain import ReplicaId
from blockstore.errors import Corrupt, NoSpace
from blockstore.metrics import Durations
from blockstore.node.hosted_replica import HostedReplica
from blockstore.node.memory import MemoryBudget
from blockstore.storage.journal import Journal

_log = structlog.get_logger(__name__)


class Checkpointer:
    """Runs in the node's event loop. replicas: those that there are now."""

    def __init__(
        self,
        settings: NodeSettings,
        journal: Journal,
        memory: MemoryBudget,
        replicas: Callable[[], Iterable[HostedReplica]],
        repair: Callable[[HostedReplica, Corrupt], None],
    ) -> None:
        """repair: called with what a checkpoint found damaged."""
        self.durations = Durations()
        """Of checkpoints, also of those that did not go through."""
        self.failures = 0
        """Of these: for want of room, or because tables were damaged."""
        self._repair = repair
        self._settings = settings
        self._journal = journal
        self._memory = memory
        self._replicas = replicas
        self._wake = asyncio.Event()
        self._urgent: set[ReplicaId] = set()
        self._resting: dict[ReplicaId, float] = {}
        """Until when a replica whose checkpoint did not go through is left alone, in loop time."""

    def soon(self, hosted: HostedReplica, urgent: bool) -> None:
        """It holds more than before; urgent: something waits for its checkpoint."""
        if urgent:
            self._urgent.add(hosted.replica)
        if urgent or self._memory.pressing or hosted.store.unapplied_weight_bytes >= self._settings.checkpoint_bytes:
            self._wake.set()

    def journal_full(self) -> None:
        """No journal file is free: those who hold the oldest one are due."""
        self._urgent.update(self._journal.laggards())
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. Raises what a checkpoint raises, but for a full disk and damaged tables.

        Then that replica rests for a moment: another one may fit into free pages of its own.
        """
        while True:
            due = self._most_due()
            if due is None:
                await self._wait()
                continue
            self._urgent.discard(due.replica)
            began = perf_counter()
            try:
                await due.checkpoint()
            except NoSpace as error:
                _log.error("no room for a checkpoint; trying again", replica=due.replica, error=str(error))
                self._rest(due)
            except Corrupt as error:
                self._repair(due, error)  # which lets it pass
                self._rest(due)
            finally:
                self.durations.add(perf_counter() - began)

    def _rest(self, hosted: HostedReplica) -> None:
        self.failures += 1
        self._resting[hosted.replica] = asyncio.get_running_loop().time() + self._settings.heartbeat_s
        self._urgent.add(hosted.replica)

    async def _wait(self) -> None:
        """For something to be due: told, or by age."""
        self._wake.clear()
        if self._most_due() is not None:
            return
        loop = asyncio.get_running_loop()
        dirty = [hosted.dirty_since for hosted in self._replicas() if hosted.dirty_since is not None]
        age = min(dirty, default=loop.time()) + self._settings.checkpoint_s - loop.time()
        self._resting = {replica: until for replica, until in self._resting.items() if until > loop.time()}
        if self._resting:
            age = min(age, self._settings.heartbeat_s)
        try:
            async with asyncio.timeout(max(age, 0.001)):
                await self._wake.wait()
        except TimeoutError:
            return

    def _most_due(self) -> HostedReplica | None:
        """The one that holds most among those that are due."""
        now = asyncio.get_running_loop().time()
        due = [hosted for hosted in self._replicas() if self._is_due(hosted, now)]
        if not due and self._memory.pressing:
            due = [
                hosted
                for hosted in self._replicas()
                if hosted.dirty_since is not None and not self._is_resting(hosted, now)
            ]
        return max(due, key=lambda hosted: hosted.store.unapplied_bytes, default=None)

    def _is_due(self, hosted: HostedReplica, now: float) -> bool:
        if hosted.replica in self._urgent:
            return not self._is_resting(hosted, now)
        if hosted.dirty_since is None or self._is_resting(hosted, now):
            return False
        old = now - hosted.dirty_since >= self._settings.checkpoint_s
        return old or hosted.store.unapplied_weight_bytes >= self._settings.checkpoint_bytes

    def _is_resting(self, hosted: HostedReplica, now: float) -> bool:
        return self._resting.get(hosted.replica, now) > now
