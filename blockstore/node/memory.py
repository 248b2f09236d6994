"""The bound of a node's memory: records that are in the journal and not yet in the tables.

Beyond the limit a replica's stream is not read any further, so that the front-end feels it; there is
no queue without end. Every replica may hold a little whatever the others do: what it holds back may
be just what another needs to go on. Most in all: the limit and MIN_REPLICA_BYTES for each replica.
"""

import asyncio
from typing import Final

from blockstore.domain import ReplicaId
from blockstore.record import MAX_RECORD_SIZE

#: Two records in flight, which are not committed and so cannot be applied, and one that commits them.
MIN_REPLICA_BYTES: Final = 3 * MAX_RECORD_SIZE


class MemoryBudget:
    """Bytes of unapplied records, by replica, and who waits for them to shrink."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held: dict[ReplicaId, int] = {}
        self._total = 0
        self._shrunk = asyncio.Event()

    @property
    def total_bytes(self) -> int:
        return self._total

    @property
    def limit_bytes(self) -> int:
        return self._limit

    @property
    def pressing(self) -> bool:
        """Half is used: checkpoint what is largest, whatever its age."""
        return self._total * 2 > self._limit

    def update(self, replica: ReplicaId, held_bytes: int) -> None:
        """`replica` holds so much now; 0 when it is gone."""
        before = self._held.get(replica, 0)
        self._total += held_bytes - before
        if held_bytes:
            self._held[replica] = held_bytes
        else:
            self._held.pop(replica, None)
        if held_bytes < before:
            self._shrunk.set()

    def has_room(self, replica: ReplicaId) -> bool:
        """Whether more may be taken for it."""
        return self._total <= self._limit or self._held.get(replica, 0) <= MIN_REPLICA_BYTES

    async def wait_for_room(self, replica: ReplicaId) -> None:
        """Return once has_room."""
        while not self.has_room(replica):
            self._shrunk.clear()
            await self._shrunk.wait()
