"""Unaligned and sub-block I/O under concurrency: a device is a register for each byte.

The volume behind it is an adversary: a call takes effect block by block, at times that the test
chooses, anywhere between its start and its end. What each byte of a read may be then follows from
when the writes of that byte began and ended.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.errors import NoSpace
from blockstore.units import BLOCK_SIZE
from blockstore.volume.block_status import Shown
from nbd_server.device import QUESTIONS, Device
from nbd_server.volume import Buffer
from tests.memory_nbd import MemoryVolume

BLOCKS = 5
SIZE = BLOCKS * BLOCK_SIZE
#: Turns of the event loop in which whatever can go on without the volume has gone on.
SETTLE_TURNS = 12


@dataclass
class Call:
    """One that the volume has not completed. blocks: in which it still has to take effect."""

    future: asyncio.Future[Any]
    blocks: list[int]
    effect: Callable[[int], None]
    result: bytearray | None = None


class AdverseVolume:
    """Takes effect and completes only as `step` says."""

    size_bytes = SIZE
    zero_is_fast = True

    def __init__(self) -> None:
        self.contents = bytearray(SIZE)
        self.calls: list[Call] = []
        self.failing: list[str] = []

    def read(self, start: int, count: int) -> asyncio.Future[Any]:
        result = bytearray(count * BLOCK_SIZE)

        def effect(block: int) -> None:
            at = (block - start) * BLOCK_SIZE
            result[at : at + BLOCK_SIZE] = self._block(block)

        return self._call("read", start, count, effect, result)

    def write(self, start: int, data: Buffer) -> asyncio.Future[None]:
        count, rest = divmod(len(data), BLOCK_SIZE)
        assert count
        assert not rest
        before = bytes(data)

        def effect(block: int) -> None:
            assert data == before, "what was given to the volume has changed"
            self._set(block, data[(block - start) * BLOCK_SIZE :][:BLOCK_SIZE])

        return self._call("write", start, count, effect)

    def trim(self, start: int, count: int) -> asyncio.Future[None]:
        return self._call("trim", start, count, lambda block: self._set(block, bytes(BLOCK_SIZE)))

    def zero(self, start: int, count: int, *, allocate: bool) -> asyncio.Future[None]:
        return self._call("zero", start, count, lambda block: self._set(block, bytes(BLOCK_SIZE)))

    def cache(self, start: int, count: int) -> asyncio.Future[None]:
        return self._call("cache", start, count, lambda block: None)

    def shown(self, start: int, count: int) -> asyncio.Future[Any]:
        raise AssertionError("nobody asks")

    def changed(self, start: int, count: int, snapshot: str) -> asyncio.Future[Any]:
        raise AssertionError("nobody asks")

    async def snapshots(self) -> dict[str, Any]:
        raise AssertionError("nobody asks")

    def flush(self) -> asyncio.Future[None]:
        return self._call("flush", 0, 0, lambda block: None)

    def step(self, chance: random.Random) -> None:
        """Let one call take effect in one more block, or complete."""
        call = chance.choice(self.calls)
        if call.blocks:
            call.effect(call.blocks.pop(chance.randrange(len(call.blocks))))
        else:
            self.calls.remove(call)
            call.future.set_result(call.result)

    def complete_last(self) -> None:
        """The call that came last."""
        call = self.calls.pop()
        for block in call.blocks:
            call.effect(block)
        call.future.set_result(call.result)

    def complete_all(self) -> None:
        while self.calls:
            self.step(random.Random(0))

    def _call(
        self, name: str, start: int, count: int, effect: Callable[[int], None], result: bytearray | None = None
    ) -> asyncio.Future[Any]:
        assert 0 <= start <= start + count <= BLOCKS
        if name in self.failing:
            self.failing.remove(name)
            raise NoSpace(f"no {name} just now")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.calls.append(Call(future, list(range(start, start + count)), effect, result))
        return future

    def _block(self, block: int) -> bytearray:
        return self.contents[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]

    def _set(self, block: int, data: Buffer) -> None:
        self.contents[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = data


class Operation(NamedTuple):
    """kind: write, zero, trim or read."""

    kind: str
    offset: int
    length: int


@dataclass
class Change:
    """Of bytes from `start` to before `end`; began and ended: when, by the test's own clock."""

    start: int
    end: int
    value: int
    began: int
    ended: float = float("inf")

    def covers(self, byte: int) -> bool:
        return self.start <= byte < self.end


@dataclass
class History:
    """Every change called so far; the one of before the start made all bytes 0."""

    changes: list[Change] = field(default_factory=lambda: [Change(0, SIZE, 0, -2, -1)])

    def allowed(self, byte: int, began: int) -> set[int]:
        """The values that a read from `began` to now may find there: of no change surely overwritten."""
        here = [change for change in self.changes if change.covers(byte)]
        newest_begin = max(change.began for change in here if change.ended < began)
        return {change.value for change in here if change.ended > newest_begin}


class Run:
    """One run of operations over an adverse volume."""

    def __init__(self, chance: random.Random) -> None:
        self.volume = AdverseVolume()
        self.device = Device(self.volume)
        self.history = History()
        self.clock = 0
        self._chance = chance
        self._running = 0

    async def run(self, operations: list[Operation]) -> None:
        waiting = list(operations)
        while waiting or self.volume.calls or self._running:
            self.clock += 1
            if waiting and (not self.volume.calls or self._chance.random() < 0.3):
                self._begin(waiting.pop(0), value=len(self.history.changes) % 255 + 1)
            else:
                assert self.volume.calls, "nothing can go on: the device waits for itself"
                self.volume.step(self._chance)
            await settle()
        assert not self.device._merging
        assert not self.device._changing
        assert not self.device._zeroing

    def check_read(self, offset: int, data: Buffer, began: int) -> None:
        """Not each byte, but those around all edges that there are: between them all bytes are alike."""
        edges = {edge for change in self.history.changes for edge in (change.start, change.end)}
        edges |= {edge - 1 for edge in edges} | {offset, offset + len(data) - 1}
        for byte in edges:
            if offset <= byte < offset + len(data):
                assert data[byte - offset] in self.history.allowed(byte, began), f"byte {byte}"

    def _begin(self, operation: Operation, value: int) -> None:
        kind, offset, length = operation
        began = self.clock
        self._running += 1
        if kind == "read":
            self.device.read(offset, length).add_done_callback(
                lambda future: self._ended(lambda: self.check_read(offset, future.result(), began))
            )
            return
        change = Change(offset, offset + length, value if kind == "write" else 0, began)
        if kind == "trim":
            change.start, change.end = -(-offset // BLOCK_SIZE) * BLOCK_SIZE, change.end // BLOCK_SIZE * BLOCK_SIZE
        self.history.changes.append(change)
        self._call(operation, value).add_done_callback(lambda future: self._ended(future.result, change))

    def _call(self, operation: Operation, value: int) -> asyncio.Future[None]:
        if operation.kind == "write":
            return self.device.write(operation.offset, bytes([value]) * operation.length)
        if operation.kind == "trim":
            return self.device.trim(operation.offset, operation.length)
        return self.device.zero(operation.offset, operation.length, allocate=False)

    def _ended(self, check: Callable[[], object], change: Change | None = None) -> None:
        self._running -= 1
        self.clock += 1
        if change is not None:
            change.ended = self.clock
        check()


async def settle() -> None:
    for _ in range(SETTLE_TURNS):
        await asyncio.sleep(0)


def run_checked(main: Coroutine[Any, Any, None]) -> None:
    """Run it; what a callback raised fails the test too."""
    raised: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
        await main

    asyncio.run(watched())
    for context in raised:
        raise context.get("exception") or AssertionError(context["message"])


# Lengths around what matters: parts of a block, whole ones, ranges over several.
EDGES = st.sampled_from([0, 1, 511, 512, 4095])
POSITIONS = st.builds(lambda block, within: block * BLOCK_SIZE + within, st.integers(0, BLOCKS - 1), EDGES)
OPERATIONS = st.builds(
    lambda kind, ends: Operation(kind, min(ends), max(ends) - min(ends) + 1),
    st.sampled_from(["write", "write", "write", "zero", "trim", "read", "read"]),
    st.tuples(POSITIONS, POSITIONS),
)


@given(st.lists(OPERATIONS, max_size=14), st.randoms(use_true_random=False))
def test_no_byte_is_lost_whatever_runs_side_by_side(operations: list[Operation], chance: random.Random) -> None:
    async def main() -> None:
        run = Run(chance)
        await run.run(operations)
        await run.run([Operation("read", 0, SIZE)])

    run_checked(main())


@pytest.mark.parametrize("seed", range(40))
def test_many_writers_of_one_block(seed: int) -> None:
    """512-byte writers and writers of the whole block, all at once: hypothesis rarely crowds like this."""
    chance = random.Random(seed)
    operations = [Operation("write", BLOCK_SIZE + 512 * chance.randrange(8), 512) for _ in range(30)]
    operations += [Operation(kind, BLOCK_SIZE, BLOCK_SIZE) for kind in ("write", "zero", "trim", "read")] * 2
    chance.shuffle(operations)

    async def main() -> None:
        run = Run(chance)
        await run.run(operations)
        await run.run([Operation("read", 0, SIZE)])

    run_checked(main())


def test_writers_of_different_parts_of_a_block_share_one_read_and_one_write() -> None:
    async def main() -> None:
        volume = AdverseVolume()
        device = Device(volume)
        parts = [device.write(512 * number, bytes([number]) * 512) for number in range(8)]
        await settle()
        assert len(volume.calls) == 1
        volume.step(random.Random(0))
        volume.step(random.Random(0))
        await settle()
        assert len(volume.calls) == 1
        volume.complete_all()
        await asyncio.gather(*parts)
        assert volume.contents[:BLOCK_SIZE] == b"".join(bytes([number]) * 512 for number in range(8))

    run_checked(main())


def test_changes_of_whole_blocks_wait_for_nothing_but_merges_on_them() -> None:
    async def main() -> None:
        volume = AdverseVolume()
        device = Device(volume)
        device.write(10, b"part of block 0")
        device.write(0, bytes(BLOCK_SIZE))
        device.write(BLOCK_SIZE, bytes(BLOCK_SIZE))
        device.write(BLOCK_SIZE, bytes(2 * BLOCK_SIZE))
        await settle()
        assert len(volume.calls) == 3, "the merge's read, and two writes that have nothing to do with it"
        while volume.calls:
            volume.complete_all()
            await settle()
        assert volume.contents[:BLOCK_SIZE] == bytes(BLOCK_SIZE)

    run_checked(main())


@pytest.mark.parametrize("kind", ["trim", "zero"])
def test_zeroes_that_come_late_and_were_sent_twice_undo_no_newer_write(kind: str) -> None:
    """A client whose link broke has an answer to the second ones alone; the volume does the last first where it can."""
    data = b"n" * BLOCK_SIZE

    async def main() -> None:
        volume = AdverseVolume()
        device = Device(volume)

        def call() -> asyncio.Future[None]:
            if kind == "trim":
                return device.trim(BLOCK_SIZE, 2 * BLOCK_SIZE)
            return device.zero(BLOCK_SIZE, 2 * BLOCK_SIZE, allocate=False)

        async def answered(future: asyncio.Future[None]) -> None:
            while not future.done():
                await settle()
                volume.complete_last()
                await settle()
            future.result()

        first = call()
        await answered(call())
        await answered(device.write(2 * BLOCK_SIZE, data))
        volume.complete_all()
        await first
        assert volume.contents[2 * BLOCK_SIZE : 3 * BLOCK_SIZE] == data
        assert not device._zeroing

    run_checked(main())


@pytest.mark.parametrize("failing", [["read"], ["write"], ["write", "write"]])
def test_a_failure_is_told_to_its_request_and_nothing_is_left_of_it(failing: list[str]) -> None:
    async def main() -> None:
        volume = AdverseVolume()
        device = Device(volume)
        volume.failing = list(failing)
        future = device.write(100, b"x" * 2 * BLOCK_SIZE)
        while not future.done():
            volume.complete_all()
            await settle()
        with pytest.raises(NoSpace):
            future.result()
        assert not device._merging
        assert not device._changing
        volume.failing = []
        again = device.write(100, b"y" * 2 * BLOCK_SIZE)
        while not again.done():
            volume.complete_all()
            await settle()
        again.result()
        assert volume.contents[100 : 100 + 2 * BLOCK_SIZE] == b"y" * 2 * BLOCK_SIZE

    run_checked(main())


def test_nothing_at_all_is_done_at_once() -> None:
    async def main() -> None:
        device = Device(AdverseVolume())
        for future in (
            device.read(5, 0),
            device.write(5, b""),
            device.trim(1, BLOCK_SIZE),
            device.zero(5, 0, allocate=True),
        ):
            assert future.done()

    run_checked(main())


RANGES = st.builds(
    lambda ends: (min(ends), max(ends) - min(ends)), st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))
)


@given(st.lists(st.tuples(st.sampled_from(["write", "zero", "trim", "read"]), RANGES), max_size=30))
def test_one_after_the_other_it_is_a_bytearray(operations: list[tuple[str, tuple[int, int]]]) -> None:
    """Over the volume that the interop tests use."""

    async def main() -> None:
        device, model = Device(MemoryVolume(SIZE)), bytearray(SIZE)
        for value, (kind, (offset, length)) in enumerate(operations, 1):
            if kind == "read":
                assert await device.read(offset, length) == model[offset : offset + length]
            elif kind == "write":
                await device.write(offset, bytes([value]) * length)
                model[offset : offset + length] = bytes([value]) * length
            elif kind == "zero":
                await device.zero(offset, length, allocate=False)
                model[offset : offset + length] = bytes(length)
            else:
                await device.trim(offset, length)
                start, end = -(-offset // BLOCK_SIZE) * BLOCK_SIZE, (offset + length) // BLOCK_SIZE * BLOCK_SIZE
                if start < end:
                    model[start:end] = bytes(end - start)
        assert await device.read(0, SIZE) == model

    asyncio.run(main())


def test_few_questions_are_asked_of_a_volume_at_once() -> None:
    """Whoever asks a hundred at once waits for himself, and the nodes for none of it."""

    class Slow(MemoryVolume):
        asked = 0

        def shown(self, start: int, count: int) -> asyncio.Future[list[Shown]]:
            self.asked += 1
            return answers[self.asked - 1]

    answers: list[asyncio.Future[list[Shown]]] = []

    async def test() -> None:
        loop = asyncio.get_running_loop()
        answers.extend(loop.create_future() for _ in range(100))
        volume = Slow(SIZE)
        device = Device(volume)
        questions = [loop.create_task(device.shown(0, SIZE)) for _ in range(100)]
        for turn in range(100):
            for _ in range(SETTLE_TURNS):
                await asyncio.sleep(0)
            assert volume.asked == min(turn + QUESTIONS, 100)
            answers[turn].set_result([Shown(BLOCKS, data=True, depth=1, here=True)])
        assert len(await asyncio.gather(*questions)) == 100

    asyncio.run(test())
