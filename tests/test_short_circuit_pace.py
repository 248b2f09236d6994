"""When a front-end reads tables, and when it leaves that to the nodes: on a clock of its own."""

import pytest

from blockstore.domain import Position, TablesPlace
from blockstore.storage.fence import this_host
from blockstore.units import BLOCK_SIZE
from blockstore.volume import short_circuit
from blockstore.volume.short_circuit import ShortCircuit
from tests.replication_group import EPOCH, Group
from tests.replication_parts import A, B, C, at

CHECKED_S = 0.4


class Tables:
    """What shared_tables gives, of a replica that reflects everything; each read takes `takes_s` of the clock."""

    def __init__(self, clock: "Clock") -> None:
        self.clock = clock
        self.takes_s = 0.0
        self.is_current = True
        self.applied = at(EPOCH, 1_000)

    def read(self, start: int, count: int, needed: Position) -> bytes:
        self.clock.now += self.takes_s
        return bytes(count * BLOCK_SIZE)

    def look(self) -> Position:
        return self.applied

    def close(self) -> None:
        pass


class Clock:
    def __init__(self, group: Group) -> None:
        self.group = group

    @property
    def now(self) -> float:
        return self.group.now

    @now.setter
    def now(self, now: float) -> None:
        self.group.now = now

    def __call__(self) -> float:
        return self.now


class Reading:
    """Of a group of three that serves; `here` of them have their tables on this machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, here: int, *, always: bool = False) -> None:
        self.clock = Clock(Group().serve())
        self.faults = 0
        monkeypatch.setattr(short_circuit, "_major_faults", lambda: self.faults)
        self.circuit = ShortCircuit(self.clock.group.leader, self.clock, CHECKED_S, always=always)
        self.tables = Tables(self.clock)
        monkeypatch.setattr("blockstore.storage.shared_tables.SharedTables", lambda place, epoch: self.tables)
        for replica in (A, B, C)[:here]:
            self.circuit.learn(replica, TablesPlace(this_host(), "/somewhere", (1, 1)))
        self.read()  # the first one goes to a node

    def read(self) -> bool:
        """Whether a read comes out of the tables."""
        return self.circuit.read(0, 1) is not None


def test_one_read_in_a_while_goes_to_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(monkeypatch, 3)
    assert [reading.read() for _ in range(5)] == [True] * 5
    reading.clock.now += 0.031
    assert [reading.read() for _ in range(3)] == [False, True, True]


def test_who_waited_for_the_disk_rests_twenty_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(monkeypatch, 3)
    assert reading.read()
    reading.tables.takes_s, reading.faults = 0.001, 1
    assert reading.read()
    reading.tables.takes_s = 0.0
    reading.clock.now += 0.019
    assert not reading.read()
    reading.clock.now += 0.0011
    assert reading.read()


def test_who_only_waited_for_a_processor_does_not_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(monkeypatch, 3)
    reading.tables.takes_s = 0.005
    assert [reading.read() for _ in range(4)] == [True] * 4


@pytest.mark.parametrize(("here", "always", "reads"), [(1, False, False), (1, True, True), (2, False, True)])
def test_a_quorum_is_on_this_machine_unless_one_is_enough(
    monkeypatch: pytest.MonkeyPatch, here: int, *, always: bool, reads: bool
) -> None:
    assert Reading(monkeypatch, here, always=always).read() is reads


def test_tables_that_were_not_looked_at_lately_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that stood still does not know what became of them."""
    reading = Reading(monkeypatch, 3)
    assert reading.read()
    reading.clock.now += CHECKED_S
    reading.read()
    assert not reading.read()
    reading.circuit.check()
    assert reading.read()


def test_tables_that_were_replaced_are_left_and_opened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(monkeypatch, 3)
    assert reading.read()
    reading.tables.is_current = False
    reading.circuit.check()
    assert not reading.read()
    for _ in range(4):
        reading.clock.group.pass_time(0.3)
        reading.clock.group.all_ack()
    reading.read()
    assert reading.read()


def test_nothing_is_read_without_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(monkeypatch, 3)
    reading.tables.takes_s = 1.1
    assert not reading.read()
