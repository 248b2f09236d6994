"""The whole cluster in virtual time: some seeds hold, and a cluster with one rule broken does not."""

import pytest

from tests.cluster_simulation.faults import PASSING
from tests.cluster_simulation.mutations import CHEAP, MUTATIONS, find
from tests.cluster_simulation.run import simulate

_LASTS_S = 10.0


@pytest.mark.parametrize("seed", [1, 2])
def test_a_cluster_under_faults_loses_nothing_and_heals(seed: int) -> None:
    """One with three controls on etcd, one with a control by itself."""
    report = simulate(seed, _LASTS_S)
    assert report.operations > 20
    assert report.faults
    assert report.done


def test_the_same_seed_is_the_same_run() -> None:
    assert simulate(3, 2.0, PASSING) == simulate(3, 2.0, PASSING)


@pytest.mark.parametrize("name", CHEAP)
def test_a_broken_rule_is_found_out(name: str) -> None:
    assert find(MUTATIONS[name]) is not None, f"no seed has found what {name} breaks"
