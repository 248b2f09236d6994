"""When committed records go from the journal into the tables.

A replica is due when it holds enough for a checkpoint to pay (checkpoint_bytes), when its oldest
record has waited long enough (checkpoint_s), when something waits for it, or when the node needs
what it holds: memory, or the oldest journal file. One checkpoint runs at a time: two would share one
disk and one interpreter, and each would take twice as long.
"""

import asyncio
from collections.abc import Callable, Iterable

import structlog

from blockstore.config import NodeSettings
from blockstore.domain import ReplicaId
from blockstore.errors import CairnError, NoSpace
from blockstore.node.hosted_replica import HostedReplica
from blockstore.node.memory import MemoryBudget
from blockstore.storage.journal import Journal
from blockstore.storage.reads import CorruptBlocks

_log = structlog.get_logger(__name__)


class Checkpointer:
    """Runs in the node's event loop. replicas: those that there are now."""

    def __init__(
        self,
        settings: NodeSettings,
        journal: Journal,
        memory: MemoryBudget,
        replicas: Callable[[], Iterable[HostedReplica]],
        repair: Callable[[HostedReplica, CairnError], None],
    ) -> None:
        """repair: called with what a checkpoint found damaged."""
        self._repair = repair
        self._settings = settings
        self._journal = journal
        self._memory = memory
        self._replicas = replicas
        self._wake = asyncio.Event()
        self._urgent: set[ReplicaId] = set()

    def soon(self, hosted: HostedReplica, urgent: bool) -> None:
        """It holds more than before; urgent: something waits for its checkpoint."""
        if urgent:
            self._urgent.add(hosted.replica)
        if urgent or self._memory.pressing or hosted.store.unapplied_bytes >= self._settings.checkpoint_bytes:
            self._wake.set()

    def journal_full(self) -> None:
        """No journal file is free: those who hold the oldest one are due."""
        self._urgent.update(self._journal.laggards())
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. After a full disk or lost entries it tries again; raises what else a checkpoint raises."""
        while True:
            due = self._most_due()
            if due is None:
                await self._wait()
                continue
            self._urgent.discard(due.replica)
            try:
                await due.checkpoint()
            except NoSpace as error:
                _log.error("no room for a checkpoint; trying again", replica=due.replica, error=str(error))
                await self._again_later(due)
            except CorruptBlocks as error:
                self._repair(due, error)  # which lets it pass
                await self._again_later(due)

    async def _again_later(self, hosted: HostedReplica) -> None:
        await asyncio.sleep(self._settings.heartbeat_s)
        self._urgent.add(hosted.replica)

    async def _wait(self) -> None:
        """For something to be due: told, or by age."""
        self._wake.clear()
        if self._most_due() is not None:
            return
        loop = asyncio.get_running_loop()
        dirty = [hosted.dirty_since for hosted in self._replicas() if hosted.dirty_since is not None]
        age = min(dirty, default=loop.time()) + self._settings.checkpoint_s - loop.time()
        try:
            await asyncio.wait_for(self._wake.wait(), max(age, 0.001))
        except TimeoutError:
            return

    def _most_due(self) -> HostedReplica | None:
        """The one that holds most among those that are due."""
        now = asyncio.get_running_loop().time()
        due = [hosted for hosted in self._replicas() if self._is_due(hosted, now)]
        if not due and self._memory.pressing:
            due = [hosted for hosted in self._replicas() if hosted.dirty_since is not None]
        return max(due, key=lambda hosted: hosted.store.unapplied_bytes, default=None)

    def _is_due(self, hosted: HostedReplica, now: float) -> bool:
        if hosted.replica in self._urgent:
            return True
        if hosted.dirty_since is None:
            return False
        old = now - hosted.dirty_since >= self._settings.checkpoint_s
        return old or hosted.store.unapplied_bytes >= self._settings.checkpoint_bytes
