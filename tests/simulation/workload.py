"""What a guest does: overlapping writes, zeroes, trims, seals and reads, several at once.

Each written block carries its ticket's number, so a value read says which write it came from. A small
volume and a few hot blocks make requests overlap.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from blockstore.errors import CairnError
from blockstore.record import Operation, OperationKind
from blockstore.units import BlockNumber, Generation
from tests.simulation.model_tables import block_of
from tests.simulation.violation import expect

if TYPE_CHECKING:
    from tests.simulation.front_end import FrontEnd
    from tests.simulation.world import World

_KINDS: Final = {
    "write": OperationKind.WRITE,
    "zero": OperationKind.ZERO,
    "trim": OperationKind.TRIM,
    "discard": OperationKind.DISCARD,
}
#: Between the reads of a chain, at most.
_READ_PAUSE_S: Final = 0.08


@dataclass(slots=True)
class Ticket:
    """A request. operation: None for a read. began: the highest sequence that a completed request had shown.

    reads: it is one of a chain of reads, which goes on while writes wait. then: told whether it was done,
    in place of a next request.
    """

    number: int
    start: int
    count: int
    operation: Operation | None
    began: int
    reads: bool = False
    then: Callable[[bool], None] | None = None


class Guest:
    """Keeps some requests open while its front-end serves."""

    def __init__(self, front_end: "FrontEnd", world: "World") -> None:
        self._front_end = front_end
        self._world = world
        self._open: dict[int, Ticket] = {}
        self._began = False
        self._waiting = False
        self._made = 0
        self.stopped = False

    @property
    def idle(self) -> bool:
        return not self._open

    def begin(self) -> None:
        """The front-end serves."""
        if not self._began:
            self._began = True
            for slot in range(self._world.plan.depth):
                self._later(reads=slot == 1)

    def gone(self) -> None:
        """Its front-end died: nothing of what is open is ever answered."""
        self.stopped = True
        self._open.clear()

    def read_all(self) -> None:
        """One read of everything."""
        self._submit("read", 0, self._world.plan.blocks)

    def completed(self, tickets: tuple[Hashable, ...]) -> None:
        for number in tickets:
            self._world.checker.completed(self._front_end, self._take(number, done=True))

    def sealed(self, number: Hashable, generation: Generation) -> None:
        ticket = self._take(number)
        self._world.checker.sealed(self._front_end, ticket, generation)
        assert ticket.operation is not None
        self._world.pinned.append((generation, ticket.operation.argument))

    def failed(self, tickets: tuple[Hashable, ...], error: CairnError) -> None:
        for number in tickets:
            self._world.checker.failed(self._front_end, self._take(number), error)

    def read_done(self, number: Hashable, values: list[int | None]) -> None:
        """None: the block has no entry, and the source's content is filled behind the answer."""
        ticket, source = self._take(number), self._world.source
        shown = [source.get(block, 0) if value is None else value for block, value in enumerate(values, ticket.start)]
        self._world.checker.read(self._front_end, ticket, shown)
        for block, value in enumerate(values, ticket.start):
            if value is None and block in source and self._world.chaos and not self.stopped:
                self.fill(block, lambda done: None)

    def fill(self, block: int, then: Callable[[bool], None]) -> None:
        """Bring a block from the source, behind whatever the guest does."""
        number = self._world.next_ticket()
        data = block_of(self._world.source[block], number)
        self._send(number, block, 1, Operation(OperationKind.FILL, BlockNumber(block), 1, data), then=then)

    def end_source(self, then: Callable[[bool], None]) -> None:
        """All that it maps has been filled."""
        self._send(self._world.next_ticket(), 0, 0, Operation(OperationKind.HYDRATED), then=then)

    def relieved(self) -> None:
        if self._waiting:
            self._waiting = False
            self._later()

    def _take(self, number: Hashable, *, done: bool = False) -> Ticket:
        ticket = self._open.pop(cast(int, number), None)
        expect(ticket is not None, f"request {number} was answered twice, or never made")
        assert ticket is not None
        if ticket.then is not None:
            ticket.then(done)
        else:
            self._later(reads=ticket.reads)
        return ticket

    def _later(self, *, reads: bool = False) -> None:
        pause_s = max(_READ_PAUSE_S, self._world.plan.think_s) if reads else self._world.plan.think_s
        self._front_end.after(self._world.random.random() * pause_s, lambda: self._next(reads))

    def _next(self, reads: bool) -> None:
        front_end, world = self._front_end, self._world
        if self.stopped or front_end.over is not None or not world.chaos:
            return
        if not reads and not world.take_request(self._made):
            return
        if front_end.leader.congested:
            self._waiting = True
            return
        self._made += not reads
        random, plan = world.random, world.plan
        kind = "read" if reads else random.choices(plan.kinds, plan.weights)[0]
        count = 1 if random.random() < 0.6 else random.randrange(1, 4)
        if kind == "trim" and random.random() < 0.3:
            count = random.randrange(1, plan.blocks // 2)
        start = random.randrange(4) if random.random() < plan.hot else random.randrange(plan.blocks)
        self._submit(kind, start, min(count, plan.blocks - start), reads=reads)

    def _submit(self, kind: str, start: int, count: int, *, reads: bool = False) -> None:
        number = self._world.next_ticket()
        operation = None if kind == "read" else self._operation(kind, number, start, count)
        self._send(number, start, count, operation, reads=reads)

    def _send(
        self,
        number: int,
        start: int,
        count: int,
        operation: Operation | None,
        *,
        reads: bool = False,
        then: Callable[[bool], None] | None = None,
    ) -> None:
        front_end, world = self._front_end, self._world
        ticket = Ticket(number, start, count, operation, world.checker.shown, reads, then)
        self._open[number] = ticket
        world.checker.submitted_request(front_end, ticket)
        now = front_end.clock()
        found = front_end.read_tables(start, count) if operation is None and world.reads_tables else None
        if found is not None:
            self.read_done(number, found)
            return
        if operation is None:
            effects = front_end.leader.read(number, BlockNumber(start), count, now)
        else:
            effects = front_end.leader.submit(number, operation, now)
        front_end.carry_out(effects)

    def _operation(self, kind: str, number: int, start: int, count: int) -> Operation:
        if kind == "write":
            return Operation(OperationKind.WRITE, BlockNumber(start), count, block_of(number) * count)
        if kind in _KINDS:
            return self._zeroing(kind, start, count)
        if kind == "seal":
            return Operation(OperationKind.SEAL, argument=number.to_bytes(8, "little"))
        return self._pinning(kind, number, start)

    def _zeroing(self, kind: str, start: int, count: int) -> Operation:
        """A DISCARD ends where the source maps something; and is a TRIM where it would begin there."""
        mapped = [block for block in range(start, start + count) if block in self._world.source]
        if kind == "discard" and mapped:
            kind, count = ("discard", mapped[0] - start) if mapped[0] > start else ("trim", count)
        return Operation(_KINDS[kind], BlockNumber(start), count)

    def _pinning(self, kind: str, number: int, block: int) -> Operation:
        """Of a generation that is pinned for certain, as far as guests know; without one, a write."""
        pinned, random = self._world.pinned, self._world.random
        if not pinned:
            return Operation(OperationKind.WRITE, BlockNumber(block), 1, block_of(number))
        index = random.randrange(len(pinned))
        if kind == "pin":
            return Operation(OperationKind.PIN, BlockNumber(pinned[index][0]), argument=number.to_bytes(8, "little"))
        generation, holder = pinned.pop(index)
        return Operation(OperationKind.UNPIN, BlockNumber(generation), argument=holder)
