"""How long a record waits for the writes that are likely to come."""

from blockstore.replication.gathering import Gathering
from blockstore.replication.leader import LeaderSettings
from blockstore.replication.messages import Completed
from tests.replication_group import Group, of, records_sent
from tests.replication_parts import A, B, C, write

GATHER_S = 0.001


class Guest:
    """Keeps `depth` writes in flight: each time that it is answered it sends as many again."""

    def __init__(self, depth: int, settings: LeaderSettings | None = None) -> None:
        self.group = Group(settings or LeaderSettings(gather_s=GATHER_S)).serve()
        self._tickets = 0
        self.send(depth)

    def send(self, count: int) -> None:
        """One by one, as they come out of a socket."""
        for _ in range(count):
            self._tickets += 1
            group = self.group
            group.keep(group.leader.submit(self._tickets, write(self._tickets % 500), group.now))

    def round(self) -> tuple[int, int]:
        """Everybody acks; how many writes the newest record had, and how many are answered."""
        self.group.forget()
        effects = [*self.group.ack(A), *self.group.ack(B), *self.group.ack(C)]
        return len(self.last), sum(len(completed.tickets) for completed in of(Completed, effects))

    @property
    def last(self) -> list[object]:
        """The writes of the newest record that was sent since the last `forget`."""
        records = [record for message in self.group.sent[A] for record in message.records]
        return list(records[-1].operations) if records else []

    def wait(self) -> None:
        """Until the leader waits no more."""
        group = self.group
        until = group.leader.gathers_until
        if until is not None:
            group.now = max(group.now, until)
            group.keep(group.leader.send_gathered(group.now))


def test_a_guest_with_many_writes_in_flight_gets_them_into_one_record() -> None:
    guest = Guest(16)
    for _ in range(40):
        _, answered = guest.round()
        guest.send(answered)
        guest.wait()
    sizes = []
    for _ in range(10):
        _, answered = guest.round()
        guest.group.forget()
        guest.send(answered)
        sizes.append(len(guest.last))
    assert min(sizes) >= 15, "without a wait two groups take turns, and the larger one has at most 15 now and then"
    assert sum(sizes) / len(sizes) > 14


def test_a_guest_with_one_write_in_flight_waits_for_nothing() -> None:
    guest = Guest(1)
    for _ in range(20):
        guest.round()
        guest.group.forget()
        guest.send(1)
        assert len(guest.last) == 1
        assert guest.group.leader.gathers_until is None


def test_who_does_not_come_is_waited_for_once() -> None:
    guest = Guest(16)
    for _ in range(40):
        guest.send(guest.round()[1])
        guest.wait()
    late = 0
    for _ in range(40):
        guest.round()
        guest.group.forget()
        guest.send(1)
        if not guest.last:
            late += 1
            guest.wait()
            assert guest.last
    assert late <= 2, "it was answered, and sends one at a time from now on"


def test_time_ends_the_wait_even_where_nobody_says_so() -> None:
    guest = Guest(16)
    for _ in range(40):
        guest.send(guest.round()[1])
        guest.wait()
    guest.round()
    guest.group.forget()
    guest.send(2)
    assert records_sent(guest.group, A) == []
    guest.group.pass_time(GATHER_S * 2)
    assert len(guest.last) >= 2


def test_enough_for_a_message_of_its_own_waits_for_nobody() -> None:
    gathering = Gathering(GATHER_S)
    gathering.committed(8, 0, 0.0)
    assert gathering.is_over(1, 0.0), "nothing is known yet"
    for _ in range(100):
        for _ in range(8):
            gathering.came()
        gathering.committed(8, 0, 1.0)
    assert not gathering.is_over(6, 1.0)
    assert gathering.is_over(7, 1.0)
    assert gathering.is_over(1, 1.0 + GATHER_S)
