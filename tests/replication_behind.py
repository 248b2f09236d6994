"""A replica that is behind: what it holds, what its leader asks of it, and a filling that has begun."""

from blockstore.domain import Position
from blockstore.replication.messages import AppendAnswer, CatchUp, FetchDelta, FetchLog, FollowerEffect
from tests.replication_parts import B, C, Replica, answers, at, only, run_of

PEERS = (B, C)


def behind(commit: int = 4, end: int = 6) -> Replica:
    """A whole replica with records of epoch 1, some committed and in its tables, sealed by epoch 2."""
    replica = Replica()
    replica.sealed(1)
    replica.appended(1, *run_of(1, 1, end))
    replica.append(1, commit=at(1, commit))
    replica.checkpoint()
    replica.sealed(2)
    return replica


def catch_up(replica: Replica, target: Position, base: Position, commit: Position) -> list[FollowerEffect]:
    return replica.append(2, commit=commit, end=at(2, 60), catch_up=CatchUp(target, base, PEERS))


def refused_by_all(replica: Replica, effects: list[FollowerEffect]) -> list[FollowerEffect]:
    """No peer holds the gap any more."""
    for _ in PEERS:
        fetch = only(FetchLog, effects)
        effects = replica.keep(replica.follower.log_not_held(fetch.attempt))
    return effects


def filling() -> Replica:
    """A replica that has begun to fill by a delta, durably; its FetchDelta is out."""
    replica = behind()
    refused_by_all(replica, catch_up(replica, at(2, 40), at(2, 50), at(2, 51)))
    replica.sync()
    return replica


def fetch_delta(replica: Replica) -> FetchDelta:
    return [effect for effect in replica.effects if isinstance(effect, FetchDelta)][-1]


def last_ack(effects: list[FollowerEffect]) -> AppendAnswer:
    answer = answers(effects)[-1]
    assert isinstance(answer, AppendAnswer)
    return answer
