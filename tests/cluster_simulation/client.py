"""Clients of a volume: they write blocks that they alone write, and the hot ones, and judge what they read."""

import asyncio
from random import Random
from typing import Final

from blockstore.units import BLOCK_SIZE
from tests.cluster_simulation.cluster import SimulatedCluster
from tests.cluster_simulation.model import HOT, VolumeModel, filled, value_of
from tests.faults.linearizable import UNKNOWN, Request
from tests.nbd_client import Disconnected, NbdClient, NbdError

_PAUSE_S: Final = 0.25
#: A request that is not answered in this time is given up with its connection: its end is unknown.
_ANSWER_S: Final = 45.0
#: Requests come in bursts, one after the other without a pause, and then none for a while.
_BURST: Final = 40
_IDLE_S: Final = 2.0
_HOT_SHARE: Final = 0.3


class Client:
    """Writes the blocks [first, end) of a volume, and the hot ones, and reads both again; until `stopping`."""

    def __init__(self, cluster: SimulatedCluster, volume: str, model: VolumeModel, first: int, end: int) -> None:
        self._cluster, self._volume, self._model = cluster, volume, model
        self._first, self._end = first, end
        self._random = Random(cluster.loop.random.getrandbits(64))
        self._connection: NbdClient | None = None
        self.stopping = False
        self.longest_s = 0.0
        """The longest time that one request took, reconnections included."""

    async def run(self) -> None:
        while not self.stopping:
            for _ in range(self._random.randrange(_BURST)):
                if self.stopping:
                    break
                await self._cluster.busy.wait()
                began = self._now
                await self._one()
                self.longest_s = max(self.longest_s, self._now - began)
                self._model.operations += 1
            await asyncio.sleep(self._random.uniform(0, _IDLE_S))
        await self.close()

    @property
    def _now(self) -> float:
        return self._cluster.loop.time()

    async def _one(self) -> None:
        if self._random.random() < _HOT_SHARE:
            await self._hot(self._random.randrange(HOT))
            return
        start = self._random.randrange(self._first, self._end)
        count = min(self._random.choice((1, 1, 2, 16)), self._end - start)
        roll = self._random.random()
        if roll < 0.5:
            await self.write(start, count, self._model.next_number())
        elif roll < 0.6:
            await self.write(start, count, 0)
        else:
            await self._read(start, count)

    async def _hot(self, number: int) -> None:
        """Write or read a block that others write, too."""
        if self._random.random() < 0.5:
            await self._read(number, 1)
            return
        client, value = await self._connected(), self._model.next_number()
        requests, at, sent = self._model.hot[number].requests, len(self._model.hot[number].requests), self._now
        requests.append(Request(True, value, sent, UNKNOWN))
        try:
            async with asyncio.timeout(_ANSWER_S):
                await client.write(number * BLOCK_SIZE, filled(value))
        except (Disconnected, NbdError, TimeoutError):
            await self.close()
            return
        requests[at] = Request(True, value, sent, self._now)

    async def write(self, start: int, count: int, value: int) -> None:
        """Blocks that nobody else writes. value: 0 for zeroes."""
        client = await self._connected()
        blocks = self._model.blocks[start : start + count]
        writes = [block.begin(value, self._now) for block in blocks]
        offset, size = start * BLOCK_SIZE, count * BLOCK_SIZE
        try:
            async with asyncio.timeout(_ANSWER_S):
                if value:
                    await client.write(offset, filled(value) * count)
                elif self._random.random() < 0.5:
                    await client.trim(offset, size)
                else:
                    await client.write_zeroes(offset, size)
        except (Disconnected, NbdError, TimeoutError):
            await self.close()
            return
        for block, write in zip(blocks, writes, strict=True):
            block.acknowledged(write, self._now)

    async def _read(self, start: int, count: int) -> None:
        client, asked_at = await self._connected(), self._now
        try:
            async with asyncio.timeout(_ANSWER_S):
                content = await client.read(start * BLOCK_SIZE, count * BLOCK_SIZE)
        except (Disconnected, NbdError, TimeoutError):
            await self.close()
            return
        for at in range(count):
            where = f"block {start + at} of {self._volume} at {self._now:.3f} s"
            value = value_of(content[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE], where)
            self._model.saw(start + at, value, asked_at, self._now, where)

    async def read_all(self) -> list[int]:
        """The value of each of its blocks, once they can be read."""
        values: list[int] = []
        while len(values) < self._end - self._first:
            client = await self._connected()
            start = self._first + len(values)
            count = min(64, self._end - start)
            try:
                async with asyncio.timeout(_ANSWER_S):
                    content = await client.read(start * BLOCK_SIZE, count * BLOCK_SIZE)
            except (Disconnected, NbdError, TimeoutError):
                await self.close()
                continue
            where = f"{self._volume} from block {start} on"
            values += [value_of(content[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE], where) for at in range(count)]
        return values

    async def close(self) -> None:
        """An error, too, ends the connection: what failed may be done later, so long as it and the epoch last."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _connected(self) -> NbdClient:
        while self._connection is None:
            if uri := await self._cluster.uri(self._volume):
                try:
                    self._connection = await NbdClient.connect(uri)
                    break
                except (Disconnected, NbdError, TimeoutError):
                    pass
            await asyncio.sleep(_PAUSE_S)
        return self._connection
