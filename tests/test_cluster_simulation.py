"""The whole cluster in virtual time: some seeds hold, and a cluster with one rule broken does not."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

import pytest

import tests.cluster_simulation.cluster
from blockstore.domain import ReplicaId
from blockstore.node.journal_writer import Durable
from blockstore.replication.quorum import Quorum
from blockstore.storage.journal import JournalEntry
from nbd_server.hold import Hold
from tests.cluster_simulation.journal import SimulatedJournalWriter
from tests.cluster_simulation.run import simulate

_SEEDS = 2
#: In which each broken rule shows.
_SEEDS_TO_CATCH = 12


@pytest.mark.parametrize("seed", range(_SEEDS))
def test_a_cluster_under_faults_loses_nothing_and_heals(seed: int) -> None:
    report = simulate(seed)
    assert report.operations > 500
    assert report.snapshots
    assert report.faults


def test_the_same_seed_is_the_same_run() -> None:
    assert simulate(1, 5.0) == simulate(1, 5.0)


class _AcksBeforeTheDisk(SimulatedJournalWriter):
    def submit(self, entries: list[JournalEntry], durable: Durable) -> None:
        super().submit(entries, _nothing)
        durable(0)


def _nothing(number: int) -> None:
    """It was told before."""


@contextmanager
def _acks_before_the_disk() -> Iterator[None]:
    with patch.object(tests.cluster_simulation.cluster, "SimulatedJournalWriter", _AcksBeforeTheDisk):
        yield


@contextmanager
def _any_one_is_a_quorum() -> Iterator[None]:
    def reached(self: Quorum, replicas: Collection[ReplicaId]) -> bool:
        return bool(replicas)

    def level(self: Quorum, values: Mapping[ReplicaId, int]) -> int:
        return max(values.values())

    with patch.object(Quorum, "reached", reached), patch.object(Quorum, "level", level):
        yield


@contextmanager
def _answers_while_it_holds() -> Iterator[None]:
    def keep(self: Hold, answer: Callable[[], None]) -> None:
        answer()

    with patch.object(Hold, "keep", keep):
        yield


@pytest.mark.parametrize("broken", [_acks_before_the_disk, _any_one_is_a_quorum, _answers_while_it_holds])
def test_a_broken_rule_is_caught(broken: Callable[[], AbstractContextManager[None]]) -> None:
    with broken():
        for seed in range(_SEEDS_TO_CATCH):
            try:
                simulate(seed, 20.0)
            except AssertionError:
                return
    pytest.fail(f"{broken.__name__[1:]} was not caught in {_SEEDS_TO_CATCH} simulations")
