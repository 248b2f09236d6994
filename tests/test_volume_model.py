"""A volume over the real stack against a bytearray: random writes, trims, zeroes, seals, restarts.

Whatever happens to nodes and front-ends in between, a read shows what the bytearray shows, and a
sealed generation goes on showing what the bytearray showed when it was sealed.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockstore.units import BLOCK_SIZE, Generation
from blockstore.volume.open_volume import OpenVolume
from tests.stack import FAST, LIMIT_S, Stack, running_stack

pytestmark = pytest.mark.timeout(300)

BLOCKS = 600
"""More than two extents, the last one short."""

starts = st.integers(0, BLOCKS - 1)
ranges = st.tuples(starts, st.integers(1, 300))
steps = st.one_of(
    st.tuples(st.just("write"), ranges, st.integers(0, 255)),
    st.tuples(st.just("trim"), ranges),
    st.tuples(st.just("zero"), ranges, st.booleans()),
    st.tuples(st.just("read"), ranges),
    st.tuples(st.just("seal")),
    st.tuples(st.just("checkpoint"), st.integers(0, 2)),
    st.tuples(st.just("stop"), st.integers(0, 2)),
    st.tuples(st.just("start")),
    st.tuples(st.just("attach again")),
)


@dataclass
class Model:
    """What the volume must show, and what it showed when each generation was sealed."""

    content: bytearray = field(default_factory=lambda: bytearray(BLOCKS * BLOCK_SIZE))
    sealed: dict[Generation, bytes] = field(default_factory=dict)

    def put(self, start: int, data: bytes) -> None:
        self.content[start * BLOCK_SIZE : start * BLOCK_SIZE + len(data)] = data


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps, min_size=5, max_size=40))
def test_it_shows_what_a_bytearray_shows(script: list[tuple[object, ...]]) -> None:
    async def run() -> None:
        with TemporaryDirectory() as directory:
            async with running_stack(Path(directory), FAST, checkpoint_s=0.5) as stack:
                await play(stack, script)

    asyncio.run(asyncio.wait_for(run(), 2 * LIMIT_S))


async def play(stack: Stack, script: list[tuple[object, ...]]) -> None:
    model = Model()
    volume = await stack.open(BLOCKS * BLOCK_SIZE)
    away: list[int] = []
    for number, step in enumerate(script):
        match step:
            case ("stop", int(index)) if not away:
                await stack.stop_node(index)
                away.append(index)
            case ("start",) if away:
                await stack.start_node(away.pop())
            case ("checkpoint", int(index)) if index not in away:
                await stack.hosted(index).checkpoint()
            case ("attach again",):
                await volume.close()
                volume = await stack.open(BLOCKS * BLOCK_SIZE)
            case ("seal",):
                sealed = await volume.seal(b"snap-%d" % number)
                model.sealed[sealed.generation] = bytes(model.content)
            case _:
                await change_or_read(volume, model, step)
    for index in away:
        await stack.start_node(index)
    await stack.until_all_whole(volume)
    assert await volume.read(0, BLOCKS) == bytes(model.content)
    await volume.write(0, bytes(BLOCK_SIZE))  # carries the commit position of all before it to everyone
    model.put(0, bytes(BLOCK_SIZE))
    await volume.close()
    await compare_replicas(stack, model)


async def change_or_read(volume: OpenVolume, model: Model, step: tuple[object, ...]) -> None:
    match step:
        case ("write", (int(start), int(count)), int(byte)):
            data = bytes([byte]) * (min(count, BLOCKS - start) * BLOCK_SIZE)
            await volume.write(start, data)
            model.put(start, data)
        case ("trim", (int(start), int(count))):
            count = min(count, BLOCKS - start)
            await volume.trim(start, count)
            model.put(start, bytes(count * BLOCK_SIZE))
        case ("zero", (int(start), int(count)), bool(allocate)):
            count = min(count, BLOCKS - start)
            await volume.zero(start, count, allocate=allocate)
            model.put(start, bytes(count * BLOCK_SIZE))
        case ("read", (int(start), int(count))):
            count = min(count, BLOCKS - start)
            shown = await volume.read(start, count)
            assert shown == bytes(model.content[start * BLOCK_SIZE : (start + count) * BLOCK_SIZE])


async def compare_replicas(stack: Stack, model: Model) -> None:
    """A new attachment brings every replica to one position; then their tables show the model."""
    volume = await stack.open(BLOCKS * BLOCK_SIZE)
    await stack.until_all_whole(volume)
    assert await volume.read(0, BLOCKS) == bytes(model.content)
    for index in range(3):
        hosted = stack.hosted(index)
        hosted.carry_out(hosted.follower.read(volume.epoch, 1, volume.status().commit))
        await hosted.checkpoint()
        assert b"".join(bytes(hosted.store.read(at, 200)) for at in range(0, BLOCKS, 200)) == model.content
        for generation, content in model.sealed.items():
            shown = b"".join(bytes(hosted.store.sealed.read(generation, at, 200)) for at in range(0, BLOCKS, 200))
            assert shown == content, generation
