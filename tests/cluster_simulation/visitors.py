"""Who asks for a volume's hot blocks through one connection, and stays with it whatever becomes of its front-end.

Requests are sent at a steady pace, without waiting for answers: some of those to a front-end that is cut off get none.
"""

import asyncio
from random import Random
from typing import Final

from blockstore.units import BLOCK_SIZE
from tests.cluster_simulation.cluster import SimulatedCluster
from tests.cluster_simulation.model import HOT, VolumeModel, filled, value_of
from tests.faults.linearizable import UNKNOWN, Request
from tests.nbd_client import Disconnected, NbdClient, NbdError

_PACE_S: Final = 0.004, 0.02


class Visitor:
    """writes: whether half of what it asks for is writes; else it only reads."""

    def __init__(self, cluster: SimulatedCluster, model: VolumeModel, client: NbdClient, *, writes: bool) -> None:
        self._cluster, self._model, self._client, self._writes = cluster, model, client, writes
        self._random = Random(cluster.loop.random.getrandbits(64))

    async def run(self, lasts_s: float) -> None:
        """For so long; what has no answer then never gets one."""
        ends_at = self._cluster.loop.time() + lasts_s
        asked: set[asyncio.Task[None]] = set()
        try:
            while self._cluster.loop.time() < ends_at:
                number = self._random.randrange(HOT)
                work = self._write if self._writes and self._random.random() < 0.5 else self._read
                asked.add(asyncio.create_task(work(number)))
                self._model.operations += 1
                await asyncio.sleep(self._random.uniform(*_PACE_S))
        finally:
            await self._client.close()
            for task in await asyncio.gather(*asked, return_exceptions=True):
                if isinstance(task, BaseException):
                    raise task

    async def _write(self, number: int) -> None:
        value, requests, sent = self._model.next_number(), self._model.hot[number].requests, self._cluster.loop.time()
        at = len(requests)
        requests.append(Request(True, value, sent, UNKNOWN))
        try:
            await self._client.write(number * BLOCK_SIZE, filled(value))
        except (Disconnected, NbdError):
            return
        requests[at] = Request(True, value, sent, self._cluster.loop.time())

    async def _read(self, number: int) -> None:
        sent = self._cluster.loop.time()
        try:
            content = await self._client.read(number * BLOCK_SIZE, BLOCK_SIZE)
        except (Disconnected, NbdError):
            return
        now = self._cluster.loop.time()
        where = f"hot block {number} at {now:.3f} s"
        self._model.saw(number, value_of(content, where), sent, now, where)
