"""Clients that write blocks they alone write, and judge what they read; also what a snapshot of them must hold.

Each write of a block is numbered, and the number fills it. With one writer for each block, linearizability is: a read
shows the last write that was acknowledged, or one with an unknown end (its connection broke, or it had an error) that
came after it; once such a one was seen, or a later write was acknowledged, nothing before it is ever seen again.
"""

import asyncio
import math
from dataclasses import dataclass, field
from random import Random
from typing import Final

from blockstore.units import BLOCK_SIZE
from tests.cluster_simulation.cluster import SimulatedCluster
from tests.nbd_client import Disconnected, NbdClient, NbdError

_PAUSE_S: Final = 0.25
#: A request that is not answered in this time is given up with its connection: its end is unknown.
_ANSWER_S: Final = 45.0


@dataclass(slots=True)
class BlockHistory:
    """values: of all writes in order, 0 for zeroes; begun, ended: when. low: the newest that a reader must see."""

    values: list[int] = field(default_factory=lambda: [0])
    begun: list[float] = field(default_factory=lambda: [-math.inf])
    ended: list[float] = field(default_factory=lambda: [-math.inf])
    low: int = 0

    def begin(self, value: int, now: float) -> int:
        self.values.append(value)
        self.begun.append(now)
        self.ended.append(math.inf)
        return len(self.values) - 1

    def acknowledged(self, write: int, now: float) -> None:
        self.ended[write] = now
        self.low = max(self.low, write)

    def saw(self, value: int, where: str) -> None:
        """A read of the present content. Raises AssertionError where it cannot be."""
        possible = [write for write in range(self.low, len(self.values)) if self.values[write] == value]
        assert possible, f"{where} reads {value}: expected one of {self.values[self.low :]}"
        self.low = max(self.low, possible[0])

    def moment(self, value: int, low: int, high: int) -> tuple[float, float]:
        """Between which moments the block held `value`, a write from `low` to `high`: (not before, not after).

        Raises AssertionError where none of these wrote it.
        """
        writes = [write for write in range(low, high + 1) if self.values[write] == value]
        assert writes, f"holds {value}, expected one of {self.values[low : high + 1]}"
        later = (ended for write, ended in enumerate(self.ended) if write > writes[-1])
        return self.begun[writes[0]], min(later, default=math.inf)


class VolumeModel:
    """Of one volume: the history of each block."""

    def __init__(self, blocks: int) -> None:
        self.blocks = [BlockHistory() for _ in range(blocks)]
        self.operations = 0
        self._number = 0

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def mark(self) -> list[int]:
        """What is acknowledged by now, for `moment`."""
        return [block.low for block in self.blocks]

    def begun(self) -> list[int]:
        """What was begun by now."""
        return [len(block.values) - 1 for block in self.blocks]

    def moment(self, content: list[int], low: list[int], high: list[int], what: str) -> tuple[float, float]:
        """Between which moments all of `content` was there: (not before, not after). Raises AssertionError for none."""
        not_before, not_after = -math.inf, math.inf
        for number, value in enumerate(content):
            try:
                begun, ended = self.blocks[number].moment(value, low[number], high[number])
            except AssertionError as error:
                raise AssertionError(f"{what}: block {number} {error}") from error
            not_before, not_after = max(not_before, begun), min(not_after, ended)
        assert not_before <= not_after, f"{what} is of no moment: {not_before} to {not_after}"
        return not_before, not_after


def filled(value: int) -> bytes:
    return value.to_bytes(8, "little") * (BLOCK_SIZE // 8)


def value_of(block: bytes, where: str) -> int:
    """Raises AssertionError where the block is torn."""
    value = int.from_bytes(block[:8], "little")
    assert block == filled(value), f"{where} is torn: {block[:8].hex()} and others"
    return value


class Client:
    """Writes the blocks [first, end) of a volume, reads them again; until `stopping`."""

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
            began = self._cluster.loop.time()
            await self._one()
            self.longest_s = max(self.longest_s, self._cluster.loop.time() - began)
            self._model.operations += 1
            if self._random.random() < 0.1:
                await asyncio.sleep(self._random.uniform(0, 0.5))
        if self._connection is not None:
            await self._connection.close()

    async def _one(self) -> None:
        start = self._random.randrange(self._first, self._end)
        count = self._random.choice((1, 1, 2, min(16, self._end - start)))
        count = min(count, self._end - start)
        roll = self._random.random()
        if roll < 0.5:
            await self._write(start, count, self._model.next_number())
        elif roll < 0.6:
            await self._write(start, count, 0)
        else:
            await self._read(start, count)

    async def _write(self, start: int, count: int, value: int) -> None:
        client = await self._connected()
        blocks = self._model.blocks[start : start + count]
        writes = [block.begin(value, self._cluster.loop.time()) for block in blocks]
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
            await self._give_up()
            return
        for block, write in zip(blocks, writes, strict=True):
            block.acknowledged(write, self._cluster.loop.time())

    async def _read(self, start: int, count: int) -> None:
        client = await self._connected()
        try:
            async with asyncio.timeout(_ANSWER_S):
                content = await client.read(start * BLOCK_SIZE, count * BLOCK_SIZE)
        except (Disconnected, NbdError, TimeoutError):
            await self._give_up()
            return
        for at in range(count):
            where = f"block {start + at} of {self._volume} at {self._cluster.loop.time():.3f} s"
            value = value_of(content[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE], where)
            self._model.blocks[start + at].saw(value, where)

    async def read_all(self) -> list[int]:
        """The value of each of its blocks, once they can be read."""
        values: list[int] = []
        while len(values) < self._end - self._first:
            client = await self._connected()
            start = self._first + len(values)
            count = min(64, self._end - start)
            try:
                content = await client.read(start * BLOCK_SIZE, count * BLOCK_SIZE)
            except (Disconnected, NbdError):
                await self._give_up()
                continue
            where = f"{self._volume} from block {start} on"
            values += [value_of(content[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE], where) for at in range(count)]
        return values

    async def close(self) -> None:
        await self._give_up()

    async def _give_up(self) -> None:
        """An error, too: what failed may be done later, so long as the connection and the epoch last."""
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
