"""The whole cluster in virtual time: some seeds hold, and a cluster with one rule broken does not."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest

import tests.cluster_simulation.cluster
from blockstore.node.journal_writer import Durable
from blockstore.storage.journal import JournalEntry
from tests.cluster_simulation.journal import SimulatedJournalWriter
from tests.cluster_simulation.run import simulate

_SEEDS = 2
_SEEDS_TO_CATCH = 4


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

    def _takes_s(self) -> tuple[float, float]:
        return 0.1, 0.5


def _nothing(number: int) -> None:
    """It was told before."""


@contextmanager
def _acks_before_the_disk() -> Iterator[None]:
    with patch.object(tests.cluster_simulation.cluster, "SimulatedJournalWriter", _AcksBeforeTheDisk):
        yield


def _simulate_kills_of_all_nodes() -> None:
    for seed in range(_SEEDS_TO_CATCH):
        simulate(seed, 20.0, {"kill_all_nodes": 1})


def test_acknowledgements_before_the_disk_are_caught() -> None:
    """What was lost is missed, or the volume is not served any more because it could be."""
    with _acks_before_the_disk(), pytest.raises(AssertionError):
        _simulate_kills_of_all_nodes()
