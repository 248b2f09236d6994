"""What a node does for its replicas beside their I/O: merge and compact; scrub has a module of its own (scrubber).

Merging deletes versions that no pinned generation can see; compaction gives free pages back to the
file system once they are more than `slack` of the file. One replica at a time, in a thread, and all of it slow on
purpose: the guests' I/O comes first.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from blockstore.config import NodeSettings
from blockstore.domain import ReplicaId
from blockstore.errors import CairnError, Corrupt, NoSpace
from blockstore.node.hosted_replica import HostedReplica
from blockstore.units import MIB

_log = structlog.get_logger(__name__)
#: Free pages that are no reason to copy a file: the next checkpoints write to them.
_MIN_FREE_BYTES: Final = 64 * MIB

Repair = Callable[[HostedReplica, Corrupt], None]


class Upkeep:
    """Runs in the node's event loop. replicas: those that there are now.

    forget_set_aside: called for a replica that is whole, whose damaged tables of an earlier start may still be there.
    forget_damage: the same, for what was noted of tables that have been filled anew since.
    """

    def __init__(
        self,
        settings: NodeSettings,
        replicas: Callable[[], Iterable[HostedReplica]],
        repair: Repair,
        forget_set_aside: Callable[[ReplicaId], object],
        forget_damage: Callable[[HostedReplica], None],
    ) -> None:
        self._forget_set_aside = forget_set_aside
        self._forget_damage = forget_damage
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
        if hosted.follower.whole:
            if hosted.store.image.filling is not None:  # an idle volume's tables would say so for good
                await hosted.checkpoint()
            await hosted.in_thread(self._forget_set_aside, hosted.replica)
            if hosted.closed:
                return
            if not hosted.follower.damaged:
                self._forget_damage(hosted)
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
