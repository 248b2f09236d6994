"""What the pure leader and its three followers cost, together and each alone, without network or disk."""

import itertools
from collections import deque
from collections.abc import Iterable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.micro.records import EPOCH, record, write
from blockstore.domain import ORIGIN, Configuration, Member, NodeId, Position, ReplicaId
from blockstore.log import LogImage
from blockstore.replication.follower import Follower
from blockstore.replication.leader import Leader, LeaderSettings
from blockstore.replication.messages import (
    Answer,
    Append,
    AppendAnswer,
    Completed,
    FollowerEffect,
    LeaderEffect,
    Persist,
    SealEpoch,
    Send,
)
from blockstore.units import Epoch, Sequence

REPLICAS = [ReplicaId(f"rep-{number:017x}") for number in range(3)]
#: Each kept by the follower, as no checkpoint takes them off.
_RECORDS = 500
CONFIGURATION = Configuration(1, tuple(Member(each, NodeId("node-0123456789abcdef0")) for each in REPLICAS))


class Loopback:
    """The shells of a leader and its followers: messages arrive at once, and so does what is persisted.

    leader_alone: once it serves, the followers are gone, and what they would answer costs next to nothing.
    """

    def __init__(self, *, leader_alone: bool = False) -> None:
        self.now = 10.0
        self.completed = 0
        self._inbox: deque[Send] = deque()
        self._followers = {each: Follower.restore(each, LogImage(), [])[0] for each in REPLICAS}
        self.leader = Leader(Epoch(1), CONFIGURATION, LeaderSettings(), self.now)
        for replica in REPLICAS:
            self._carry_out(self.leader.connected(replica, self.now))
        self._deliver()
        assert self.leader.serving
        if leader_alone:
            self._followers.clear()

    def submit(self, ticket: int, block: int) -> None:
        self._carry_out(self.leader.submit(ticket, write(block), self.now))

    def settle(self) -> None:
        """Until nobody has anything to say."""
        self._deliver()
        while effects := self.leader.send_gathered(self.now):
            self._carry_out(effects)
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
            follower = self._followers.get(send.replica)
            match send.message:
                case Append() as append if follower is None:
                    self._carry_out(self.leader.answered(send.replica, acknowledge(append), self.now))
                case Append() as append if follower is not None:
                    self._follow(follower, follower.append("leader", append))
                case SealEpoch() as seal if follower is not None:
                    self._follow(follower, follower.seal("leader", seal))

    def _follow(self, follower: Follower, effects: list[FollowerEffect]) -> None:
        waiting = deque(effects)
        while waiting:
            match waiting.popleft():
                case Persist(number):
                    waiting.extend(follower.persisted(number))
                case Answer(_, message):
                    self._carry_out(self.leader.answered(follower.replica, message, self.now))


def acknowledge(append: Append) -> AppendAnswer:
    """What a follower says that has all of it on its disk."""
    return AppendAnswer(append.epoch, append.request, append.end, append.commit, append.end, whole=True)


def _replicate(benchmark: BenchmarkFixture, loopback: Loopback, depth: int) -> None:
    tickets = itertools.count()

    def replicate() -> None:
        for _ in range(depth):
            ticket = next(tickets)
            loopback.submit(ticket, ticket * 7 % 4096)
        loopback.settle()

    benchmark(replicate)
    assert loopback.completed == next(tickets) > 0


@pytest.mark.parametrize("depth", [1, 32])
@pytest.mark.benchmark(group="replicate 4 KiB writes, leader and three followers, by depth")
def test_write(benchmark: BenchmarkFixture, depth: int) -> None:
    _replicate(benchmark, Loopback(), depth)


@pytest.mark.parametrize("depth", [1, 32])
@pytest.mark.benchmark(group="replicate 4 KiB writes, the leader alone, by depth")
def test_leader(benchmark: BenchmarkFixture, depth: int) -> None:
    _replicate(benchmark, Loopback(leader_alone=True), depth)


@pytest.mark.parametrize("blocks", [1, 32])
@pytest.mark.benchmark(group="one record of so many blocks at a follower, until it is acked")
def test_follower(benchmark: BenchmarkFixture, blocks: int) -> None:
    follower, _ = Follower.restore(REPLICAS[0], LogImage(), [])
    _persist_all(follower, follower.seal("leader", SealEpoch(EPOCH, CONFIGURATION.number)))
    sequences = itertools.count(1)

    def arrive() -> tuple[tuple[Append], dict[str, object]]:
        made = record(next(sequences), [write(number * 9) for number in range(blocks)])
        commit = Position(EPOCH, Sequence(made.sequence - 1)) if made.sequence > 1 else ORIGIN
        return (Append(EPOCH, CONFIGURATION.number, made.sequence, commit, made.position, (made,)),), {}

    def take(append: Append) -> None:
        _persist_all(follower, follower.append("leader", append))

    benchmark.pedantic(take, setup=arrive, rounds=_RECORDS)  # type: ignore[no-untyped-call]
    assert follower.durable_end.sequence == next(sequences) - 1 > 0


def _persist_all(follower: Follower, effects: list[FollowerEffect]) -> None:
    """What a node does with them, but for the disk."""
    waiting = deque(effects)
    while waiting:
        effect = waiting.popleft()
        if isinstance(effect, Persist):
            waiting.extend(follower.persisted(effect.number))
