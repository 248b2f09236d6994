"""What the pure leader and its three followers cost for one operation, without network or disk."""

import itertools
from collections import deque
from collections.abc import Iterable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.micro.records import write
from blockstore.domain import Configuration, Member, NodeId, ReplicaId
from blockstore.log import LogImage
from blockstore.replication.follower import Follower
from blockstore.replication.leader import Leader, LeaderSettings
from blockstore.replication.messages import (
    Answer,
    Append,
    Completed,
    FollowerEffect,
    LeaderEffect,
    Persist,
    SealEpoch,
    Send,
)
from blockstore.units import Epoch

REPLICAS = [ReplicaId(f"rep-{number:017x}") for number in range(3)]
CONFIGURATION = Configuration(1, tuple(Member(each, NodeId("node-0123456789abcdef0")) for each in REPLICAS))


class Loopback:
    """The shells of a leader and its followers: messages arrive at once, and so does what is persisted."""

    def __init__(self) -> None:
        self.now = 10.0
        self.completed = 0
        self._inbox: deque[Send] = deque()
        self._followers = {each: Follower.restore(each, LogImage(), [])[0] for each in REPLICAS}
        self.leader = Leader(Epoch(1), CONFIGURATION, LeaderSettings(), self.now)
        for replica in REPLICAS:
            self._carry_out(self.leader.connected(replica, self.now))
        self._deliver()

    def submit(self, ticket: int, block: int) -> None:
        self._carry_out(self.leader.submit(ticket, write(block), self.now))

    def settle(self) -> None:
        """Until nobody has anything to say."""
        self._deliver()

    def _carry_out(self, effects: Iterable[LeaderEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._inbox.append(effect)
            elif isinstance(effect, Completed):
                self.completed += len(effect.tickets)

    def _deliver(self) -> None:
        while self._inbox:
            send = self._inbox.popleft()
            follower = self._followers[send.replica]
            match send.message:
                case SealEpoch() as seal:
                    self._follow(follower, follower.seal("leader", seal))
                case Append() as append:
                    self._follow(follower, follower.append("leader", append))

    def _follow(self, follower: Follower, effects: list[FollowerEffect]) -> None:
        waiting = deque(effects)
        while waiting:
            match waiting.popleft():
                case Persist(number):
                    waiting.extend(follower.persisted(number))
                case Answer(_, message):
                    self._carry_out(self.leader.answered(follower.replica, message, self.now))


@pytest.mark.parametrize("depth", [1, 32])
@pytest.mark.benchmark(group="replicate one 4 KiB write, leader and three followers, by depth")
def test_write(benchmark: BenchmarkFixture, depth: int) -> None:
    loopback = Loopback()
    tickets = itertools.count()

    def replicate() -> None:
        for _ in range(depth):
            ticket = next(tickets)
            loopback.submit(ticket, ticket * 7 % 4096)
        loopback.settle()

    benchmark(replicate)
    assert loopback.completed > 0
