"""The line of those who wait for memory: nobody is passed by, nobody blocks it for good."""

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.units import KIB, MIB
from nbd_server.budget import Budget, Share
from nbd_server.limits import Limits

LIMITS = Limits(total_bytes=32 * MIB, own_bytes=256 * KIB, in_flight_bytes=32 * MIB)


class Client:
    """Asks for memory until it gets it, as a connection does."""

    def __init__(self, budget: Budget) -> None:
        self.looks = 0
        self.share = Share(budget, self._look_again)

    def _look_again(self) -> None:
        self.looks += 1

    def ask(self, count_bytes: int) -> bool:
        if not self.share.may_take(count_bytes):
            return False
        self.share.take(count_bytes)
        return True


@pytest.fixture
def budget() -> Budget:
    return Budget(LIMITS)


def test_one_at_the_back_waits_though_it_would_fit(budget: Budget) -> None:
    holder, large, small = Client(budget), Client(budget), Client(budget)
    assert holder.ask(30 * MIB)
    assert not large.ask(16 * MIB)
    assert not small.ask(MIB)
    assert budget.waiting_count == 2
    holder.share.give_back(8 * MIB)
    assert (large.looks, small.looks) == (1, 0)
    assert not large.ask(16 * MIB)
    holder.share.give_back(22 * MIB)
    assert large.ask(16 * MIB)
    assert small.looks == 1, "who stands behind it is told at once"
    assert small.ask(MIB)
    assert (budget.waiting_count, budget.used_bytes) == (0, 17 * MIB)


def test_one_that_leaves_the_line_lets_the_next_look(budget: Budget) -> None:
    holder, first, second = Client(budget), Client(budget), Client(budget)
    assert holder.ask(30 * MIB)
    assert not first.ask(16 * MIB)
    assert not second.ask(MIB)
    first.share.leave_line()
    assert second.looks == 1
    assert second.ask(MIB)


def test_its_own_share_is_there_in_any_case(budget: Budget) -> None:
    holder, other, third = Client(budget), Client(budget), Client(budget)
    assert holder.ask(32 * MIB)
    assert not other.ask(MIB)
    for _ in range(4):
        assert third.ask(64 * KIB)
    assert not third.ask(1)
    assert budget.used_bytes == LIMITS.total_bytes + LIMITS.own_bytes


def test_what_takes_no_memory_always_goes_on(budget: Budget) -> None:
    holder, other = Client(budget), Client(budget)
    assert holder.ask(32 * MIB)
    assert holder.ask(0)
    assert other.ask(0)


def test_one_client_stops_at_its_limit() -> None:
    client = Client(Budget(Limits(in_flight_bytes=MIB)))
    assert client.ask(MIB - 1)
    assert client.ask(MIB)
    assert not client.ask(1)
    assert client.share._budget.waiting_count == 0, "it waits for itself alone"


OF_ONE_CLIENT = Limits(total_bytes=256 * MIB, client_bytes=64 * MIB, in_flight_bytes=64 * MIB, own_bytes=256 * KIB)


def test_who_waits_for_others_of_its_own_client_is_told_when_they_give_back() -> None:
    budget = Budget(OF_ONE_CLIENT)
    one, other = Client(budget), Client(budget)
    other.share.client = one.share.client
    assert one.ask(64 * MIB)
    assert not other.ask(MIB)
    assert budget.waiting_count == 0, "the others' memory is none of its client's"
    one.share.give_back(MIB)
    assert other.looks == 1
    assert other.ask(MIB)


def test_nothing_is_ample_while_anybody_waits() -> None:
    """Who comes now would pass by, however much there is."""
    budget = Budget(OF_ONE_CLIENT)
    holder, waits, comes = Client(budget), Client(budget), Client(budget)
    assert holder.ask(8 * MIB)
    assert comes.share.is_ample()
    assert not waits.ask(250 * MIB), "more than one client may have: it waits in the line of its own"
    assert comes.share.is_ample()
    comes.share.client = waits.share.client
    assert not comes.share.is_ample()
    whole = Budget(Limits(total_bytes=64 * MIB, in_flight_bytes=64 * MIB, client_bytes=64 * MIB, own_bytes=256 * KIB))
    holder, waits, comes = Client(whole), Client(whole), Client(whole)
    assert holder.ask(8 * MIB)
    assert comes.share.is_ample()
    assert not waits.ask(60 * MIB)
    assert whole.waiting_count == 1
    assert not comes.share.is_ample()


@given(st.lists(st.lists(st.integers(1, 32 * MIB), max_size=6), min_size=1, max_size=8), st.integers())
def test_all_are_served_within_the_bound(wanted: list[list[int]], seed: int) -> None:
    """Clients ask when told to, and give back at random: each gets all it wants, and the total holds."""
    chance, budget = random.Random(seed), Budget(LIMITS)
    clients = [(Client(budget), deque(counts)) for counts in wanted]
    held: list[tuple[Client, int]] = []
    told = [0] * len(clients)
    asking = set(range(len(clients)))
    while asking or held or any(waiting for _, waiting in clients):
        asking |= {index for index, (client, _) in enumerate(clients) if client.looks > told[index]}
        if asking and (not held or chance.random() < 0.6):
            index = chance.choice(sorted(asking))
            client, waiting = clients[index]
            told[index] = client.looks
            if waiting and client.ask(waiting[0]):
                held.append((client, waiting.popleft()))
            else:
                asking.discard(index)
        else:
            assert held, "all wait, and nobody holds anything"
            client, count = held.pop(chance.randrange(len(held)))
            client.share.give_back(count)
            asking.add([each for each, _ in clients].index(client))
        assert budget.used_bytes == sum(count for _, count in held)
        assert budget.used_bytes <= LIMITS.total_bytes + len(clients) * LIMITS.own_bytes
    assert budget.used_bytes == 0
