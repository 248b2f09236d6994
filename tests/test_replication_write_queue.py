"""The queue of writes, held and let go at random: order, and every write either in a record, dropped, or still here."""

from random import Random

import pytest

from blockstore.record import Operation, OperationKind
from blockstore.replication.in_flight import Write
from blockstore.replication.write_queue import NEEDS_ROOM, WriteQueue
from blockstore.units import BLOCK_SIZE, BlockNumber

_KINDS = [OperationKind.WRITE, OperationKind.TRIM, OperationKind.FILL, OperationKind.SEAL, OperationKind.ZERO]
_BLOCKS = 8


class Model:
    """What goes into the queue and what comes out of it, by a list."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.queue = WriteQueue(4 * BLOCK_SIZE, 64 * BLOCK_SIZE)
        self.operations: dict[int, Operation] = {}
        self.in_records: list[Write] = []
        self.order: list[int] = []
        self.ended: set[int] = set()
        self.holding = False
        self.now = 0.0

    def add(self) -> None:
        kind, number = self.random.choice(_KINDS), len(self.operations)
        start = self.random.randrange(_BLOCKS)
        count = 0 if kind is OperationKind.SEAL else self.random.randrange(1, _BLOCKS - start + 1)
        data = bytes(min(count, 3) * BLOCK_SIZE) if kind in (OperationKind.WRITE, OperationKind.FILL) else b""
        count = min(count, 3) if data else count
        self.operations[number] = Operation(kind, BlockNumber(start), count, data)
        self.queue.add(number, self.operations[number], self.now)

    def batch(self) -> None:
        taken = self.queue.next_batch()
        for write in taken:
            assert not (self.holding and write.operation.kind in NEEDS_ROOM)
            assert write.ticket not in self.ended
        blocks = [block for write in taken for block in range(write.operation.start, write.operation.end)]
        assert len(blocks) == len(set(blocks)), "operations of one record overlap"
        self.in_records += taken
        self.order += [int(str(write.ticket)) for write in taken]

    def commit(self) -> None:
        for _ in range(self.random.randrange(3)):
            if self.in_records:
                self.queue.committed(self.in_records.pop(0))

    def hold(self) -> None:
        self.queue.hold()
        self.holding = True

    def let_go(self) -> None:
        self.queue.let_go()
        self.holding = False

    def refuse(self) -> None:
        self.ended.update(int(str(ticket)) for ticket in self.queue.refuse_held())

    def expire(self) -> None:
        tickets, _ = self.queue.expire(self.now - 5)
        self.ended.update(int(str(ticket)) for ticket in tickets)
        waiting = self.operations.keys() - self.ended - set(self.order)
        assert self.queue.held_count <= len(waiting), "what was dropped is held"

    def check(self) -> None:
        """Changes that overlap become records in the order in which they came."""
        for at, later in enumerate(self.order):
            for earlier in self.order[at + 1 :]:
                assert earlier > later or not _overlap(self.operations[earlier], self.operations[later])


def _overlap(one: Operation, other: Operation) -> bool:
    fills = OperationKind.FILL in (one.kind, other.kind)
    return not fills and one.on_blocks and other.on_blocks and one.start < other.end and other.start < one.end


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_held_and_let_go_changes_of_one_block_stay_in_order(seed: int) -> None:
    model = Model(seed)
    for _ in range(120):
        model.now += model.random.random()
        step = model.random.choices(
            [model.add, model.batch, model.commit, model.hold, model.let_go, model.refuse, model.expire],
            [10, 4, 4, 1, 1, 0.3, 0.5],
        )[0]
        step()
    model.let_go()
    while model.queue:
        model.batch()
    assert set(model.order) | model.ended == set(model.operations), "a write is lost"
    assert model.queue.held_count == 0
    model.check()
