"""Turns of one client: so many requests in each, whoever has them, and nobody waits for good."""

from collections import Counter, deque
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from nbd_server.limits import TURN_REQUESTS
from nbd_server.turns import Turns


class Connection:
    """Begins what it has as the real one does."""

    def __init__(self, turns: Turns, call_soon: Callable[[Callable[[], object]], object], log: list[object]) -> None:
        self.has = 0
        self._turns, self._call_soon, self._log = turns, call_soon, log

    def serve(self) -> None:
        while self.has and self._turns.left:
            self._turns.left -= 1
            self.has -= 1
            self._log.append(self)
        if not self._turns.left:
            self._turns.wait(self.serve, self._call_soon)


def test_connections_take_turns_in_the_order_in_which_they_came() -> None:
    turns, coming, log = Turns(), deque[Callable[[], object]](), list[object]()
    first, second, third = (Connection(turns, coming.append, log) for _ in range(3))
    for each in (first, second, third):
        each.has = 2 * TURN_REQUESTS
        each.serve()
    while coming:
        coming.popleft()()
    assert log == [each for each in (first, first, second, third, second, third) for _ in range(TURN_REQUESTS)]


@given(st.lists(st.lists(st.integers(0, 3 * TURN_REQUESTS), max_size=6), max_size=6))
def test_a_turn_begins_so_many_and_all_get_theirs(arriving: list[list[int]]) -> None:
    """arriving: in each turn of the loop, what each connection receives."""
    turns, coming, log = Turns(), deque[Callable[[], object]](), list[object]()
    connections = [Connection(turns, coming.append, log) for _ in range(6)]
    rounds = deque(arriving)
    wanted: Counter[object] = Counter()
    while rounds or coming:
        before = len(log)
        for _ in range(len(coming)):
            coming.popleft()()
        for connection, count in zip(connections, rounds.popleft() if rounds else [], strict=False):
            wanted[connection] += count
            connection.has += count
            connection.serve()
        assert len(log) - before <= 2 * TURN_REQUESTS  # what was left of the turn before, and a whole one
    assert Counter(log) == wanted
