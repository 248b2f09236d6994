"""Shipping gives way to guests: nodes say whether they have any, and reads are small and followed by pauses then."""

import asyncio

import pytest

from blockstore.domain import ORIGIN, Position
from blockstore.node.guest_traffic import GuestTraffic
from blockstore.record import Operation, OperationKind, Record, encode_record
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, BlockNumber, Epoch, Generation, Sequence
from blockstore.volume.guest_pace import GuestPace
from tests.virtual_time import in_virtual_time

READ_S = 0.01


def record(kind: OperationKind) -> Record:
    operation = Operation(kind, BlockNumber(0), 1, bytes(BLOCK_SIZE))
    return encode_record(Position(Epoch(1), Sequence(1)), ORIGIN, Generation(1), 1, [operation])


@pytest.mark.parametrize(("kind", "busy"), [(OperationKind.WRITE, True), (OperationKind.FILL, False)])
def test_a_nodes_guests_are_those_that_write_and_read(kind: OperationKind, busy: bool) -> None:
    now = 10.0
    traffic = GuestTraffic(lambda: now)
    traffic.note_records([])
    assert not traffic.busy
    traffic.note_records([record(kind)])
    assert traffic.busy is busy
    traffic.note()
    assert traffic.busy
    now += 1.0
    assert not traffic.busy


def test_reads_wait_for_one_another_and_pause_where_guests_are() -> None:
    async def took_s(busy: bool) -> float:
        pace, clock = GuestPace(), asyncio.get_running_loop().time
        assert pace.blocks() == EXTENT_BLOCKS
        pace.note(busy=busy)
        assert (pace.blocks() < EXTENT_BLOCKS) is busy
        began = clock()

        async def call() -> None:
            await asyncio.sleep(READ_S)

        await asyncio.gather(*(pace.read(call) for _ in range(10)))
        return clock() - began

    async def check() -> None:
        assert await took_s(False) == pytest.approx(READ_S)
        assert await took_s(True) >= 10 * READ_S + 9 * 8 * READ_S - 1e-6

    in_virtual_time(check)
