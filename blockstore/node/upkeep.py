"""What a node does for its replicas beside their I/O: merge, compact, scrub.

Merging deletes versions that no pinned generation can see; compaction gives free pages back to the
file system once they are more than `slack` of the file; scrub reads every block once in `scrub_s`
seconds and has bad ones mended from peers. One replica at a time, in a thread, and all of it slow on
purpose: the guests' I/O comes first.
"""

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from blockstore.config import NodeSettings
from blockstore.domain import ReplicaId
from blockstore.errors import CairnError, Corrupt, NoSpace
from blockstore.node.hosted_replica import HostedReplica
from blockstore.units import MIB, Sequence

_log = structlog.get_logger(__name__)
#: Free pages that are no reason to copy a file: the next checkpoints write to them.
_MIN_FREE_BYTES: Final = 64 * MIB
#: Scrub reads at most one extent (1 MiB for each generation) in this time.
_SHORTEST_PAUSE_S: Final = 0.05

Repair = Callable[[HostedReplica, Corrupt], None]


class Upkeep:
    """Runs in the node's event loop. replicas: those that there are now.

    forget_set_aside: called for a replica that is whole, whose damaged tables of an earlier start may still be there.
    """

    def __init__(
        self,
        settings: NodeSettings,
        replicas: Callable[[], Iterable[HostedReplica]],
        repair: Repair,
        forget_set_aside: Callable[[ReplicaId], object],
    ) -> None:
        self._forget_set_aside = forget_set_aside
        self._settings = settings
        self._replicas = replicas
        self._repair = repair

    async def tidy(self) -> None:
        """Merge and compact, every upkeep_s seconds, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.upkeep_s)
            for hosted in self._replicas():
                try:
                    await self._tidy(hosted)
                except Corrupt as error:
                    self._repair(hosted, error)
                except CairnError as error:
                    if not hosted.closed and not isinstance(error, NoSpace):
                        raise
                    _log.warning("upkeep of a replica has to wait", replica=hosted.replica, error=str(error))

    async def _tidy(self, hosted: HostedReplica) -> None:
        if hosted.closed:
            return
        if hosted.follower.whole and hosted.store.image.filling is None:
            await hosted.in_thread(self._forget_set_aside, hosted.replica)
        if await hosted.in_thread(hosted.store.merge):
            _log.info("versions were merged", replica=hosted.replica)
        if hosted.closed:
            return
        usage = hosted.store.usage()
        if usage.free_page_bytes > max(_MIN_FREE_BYTES, self._settings.slack * usage.file_bytes):
            compacted = await hosted.in_thread(hosted.store.compact)
            if hosted.closed:  # and its files may be gone
                return
            _log.info(
                "tables were compacted" if compacted else "tables could not be compacted now",
                replica=hosted.replica,
                bytes_before=usage.file_bytes,
                bytes_after=hosted.store.file_bytes(),
            )

    async def scrub(self) -> None:
        """Read everything, again and again, until cancelled. Of a damaged list of extents nothing can be read."""
        while True:
            found = False
            for hosted in self._replicas():
                try:
                    found = await self._scrub(hosted) or found
                except Corrupt as error:
                    self._repair(hosted, error)
                except CairnError:
                    if not hosted.closed:  # else it was deleted meanwhile, and that is no failure of the disk
                        raise
            if not found:
                await asyncio.sleep(self._settings.upkeep_s)

    async def _scrub(self, hosted: HostedReplica) -> bool:
        """One pass over a replica; False where it holds nothing yet. It starts anywhere: restarts favour no extent."""
        if hosted.closed:
            return False
        extents: list[int] = await hosted.in_thread(hosted.store.delta_extents, Sequence(0))
        if not extents:
            return False
        pause_s = max(_SHORTEST_PAUSE_S, self._settings.scrub_s / len(extents))
        first = random.randrange(len(extents))
        for extent in extents[first:] + extents[:first]:
            await asyncio.sleep(pause_s)
            if hosted.closed:
                break
            try:
                await hosted.in_thread(hosted.store.copy_extent, extent)
            except Corrupt as error:
                self._repair(hosted, error)
        return True
