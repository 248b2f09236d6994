"""A volume made from a snapshot, over the real stack, against a bytearray.

Random reads, writes, parts of blocks, trims and zeroes; background hydration on and off; nodes, front-ends and
the source going away and coming back. Whatever happens in between, a read shows what the bytearray shows, or
fails because the source is away; and in the end the volume needs its source no more.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstore.errors import QuorumUnavailable
from blockstore.rpc import control_pb2 as pb
from blockstore.units import BLOCK_SIZE
from nbd_server.attempt import Attempt
from tests.restored import Restored, go_on, patient, restored_volume, until_hydrated
from tests.stack import LIMIT_S

BLOCKS = 600
SOURCE_BLOCKS = 520
SIZE = BLOCKS * BLOCK_SIZE
#: What a guest waits for a source that is away, in place of the retry limit.
AWAY_S = 0.15

starts = st.integers(0, SIZE - 1)
lengths = st.one_of(st.integers(1, 3 * BLOCK_SIZE), st.integers(1, 200).map(lambda count: count * BLOCK_SIZE))
aligned = st.tuples(st.integers(0, BLOCKS - 1).map(lambda block: block * BLOCK_SIZE), lengths)
ranges = st.one_of(st.tuples(starts, lengths), aligned)
steps = st.one_of(
    st.tuples(st.just("write"), ranges, st.integers(1, 255)),
    st.tuples(st.just("trim"), ranges),
    st.tuples(st.just("zero"), ranges, st.booleans()),
    st.tuples(st.just("read"), ranges),
    st.tuples(st.just("read on"), ranges),
    st.tuples(st.just("hydrate"), st.booleans()),
    st.tuples(st.just("checkpoint"), st.integers(0, 2)),
    st.tuples(st.just("stop"), st.integers(0, 2)),
    st.tuples(st.just("start")),
    st.tuples(st.just("attach again")),
    st.tuples(st.just("source away")),
    st.tuples(st.just("source back")),
)
mapped = st.lists(st.tuples(st.integers(0, SOURCE_BLOCKS - 1), st.integers(1, 150)), min_size=1, max_size=6)


class Play:
    """One run."""

    def __init__(self, restored: Restored) -> None:
        self.restored = restored
        self.model = restored.source.content(SIZE)
        self.attempt: Attempt
        self.hydration = pb.Hydration(paused=True)
        self.node_away: list[int] = []
        self.source_away = False

    async def attach(self) -> None:
        self.attempt = await self.restored.attach(hydration=self.hydration)
        self._set_patience()

    async def step(self, step: tuple[Any, ...]) -> None:
        stack = self.restored.stack
        match step:
            case ("stop", index) if not self.node_away:
                await stack.stop_node(index)
                self.node_away.append(index)
            case ("start",) if self.node_away:
                await stack.start_node(self.node_away.pop())
            case ("checkpoint", index) if index not in self.node_away:
                await stack.hosted(index).checkpoint()
            case ("attach again",):
                await self.restored.close()
                await self.attach()
            case ("hydrate", paused):
                self.hydration = pb.Hydration(paused=paused)
                go_on(self.attempt, paused=paused)
            case ("source away",) if not self.source_away:
                await self.restored.source.stop()
                self.source_away = True
                self._set_patience()
            case ("source back",):
                await self.source_back()
            case _:
                await self.guest(step)

    async def source_back(self) -> None:
        if self.source_away:
            await self.restored.source.start()
            self.source_away = False
            self._set_patience()

    def _set_patience(self) -> None:
        if self.attempt.segments[0].hydrating is not None:
            self.attempt.segments[0].hydrating._retry_limit_s = AWAY_S if self.source_away else LIMIT_S

    async def guest(self, step: tuple[Any, ...]) -> None:
        device = self.attempt.device
        match step:
            case ("write", (start, length), byte):
                length = min(length, SIZE - start)
                data = bytes([byte]) * length
                await self.change(lambda: device.write(start, data))
                self.model[start : start + length] = data
            case ("trim", (start, length)):
                length = min(length, SIZE - start)
                await self.change(lambda: device.trim(start, length))
                first, last = -(-start // BLOCK_SIZE) * BLOCK_SIZE, (start + length) // BLOCK_SIZE * BLOCK_SIZE
                if first < last:
                    self.model[first:last] = bytes(last - first)
            case ("zero", (start, length), allocate):
                length = min(length, SIZE - start)
                await self.change(lambda: device.zero(start, length, allocate=allocate))
                self.model[start : start + length] = bytes(length)
            case ("read", (start, length)):
                await self.read(start, min(length, SIZE - start))
            case ("read on", (start, length)):
                for at in range(start, min(start + length, SIZE), 8 * BLOCK_SIZE):
                    await self.read(at, min(8 * BLOCK_SIZE, SIZE - at))

    async def change(self, call: Callable[[], Awaitable[None]]) -> None:
        """One that failed without its source may have happened in part: it is made again."""
        try:
            await call()
        except QuorumUnavailable:
            assert self.source_away
            await self.source_back()
            await call()

    async def read(self, start: int, length: int) -> None:
        try:
            shown = await self.attempt.device.read(start, length)
        except QuorumUnavailable:
            assert self.source_away
        else:
            assert shown == self.model[start : start + length]

    async def end(self) -> None:
        """It all comes back, is hydrated, and stays as it is without a source."""
        for index in self.node_away:
            await self.restored.stack.start_node(index)
        await self.source_back()
        assert await self.attempt.device.read(0, SIZE) == self.model
        go_on(self.attempt)
        await until_hydrated(self.attempt)
        await self.restored.source.stop()
        assert await self.attempt.device.read(0, SIZE) == self.model
        await self.attempt.device.trim(0, 300 * BLOCK_SIZE)
        self.model[: 300 * BLOCK_SIZE] = bytes(300 * BLOCK_SIZE)
        await self.restored.stack.until_all_whole(self.attempt.volume.first)
        await self.restored.close()
        await self.attach()
        assert self.attempt.report().hydrated
        assert await self.attempt.device.read(0, SIZE) == self.model


@pytest.mark.timeout(600)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(mapped, st.lists(steps, min_size=5, max_size=40), st.integers())
def test_it_shows_what_a_bytearray_shows(source: list[tuple[int, int]], script: list[Any], seed: int) -> None:
    numbers = {n for start, count in source for n in range(start, min(start + count, SOURCE_BLOCKS))}
    chance = random.Random(seed)
    blocks = {number: chance.randbytes(BLOCK_SIZE) for number in sorted(numbers)}

    async def run() -> None:
        with TemporaryDirectory() as directory:
            async with restored_volume(
                Path(directory),
                blocks,
                source_bytes=SOURCE_BLOCKS * BLOCK_SIZE,
                size_bytes=SIZE,
                leader=patient(20),
                checkpoint_s=0.3,
            ) as restored:
                play = Play(restored)
                await play.attach()
                for step in script:
                    await play.step(step)
                await play.end()

    asyncio.run(asyncio.wait_for(run(), 2 * LIMIT_S))
