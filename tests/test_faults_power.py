"""All machines lose their power at once, fifty times: what was acknowledged is there after each."""

from pathlib import Path

import pytest

from tests.crash.snapshots import Wrong
from tests.faults.power import Loss
from tests.faults.power_cluster import PowerCluster, PowerPlay, cut_again_and_again
from tests.programs import require_programs

pytestmark = pytest.mark.xdist_group("load")

CUTS = 25


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_acknowledged_is_lost_by_power_cuts(tmp_path: Path, seed: int) -> None:
    require_programs("gcc")
    lost = cut_again_and_again(tmp_path, CUTS, seed)
    print(dict(lost))
    assert lost["writes lost"] > CUTS, f"hardly anything was under way when the power went: {dict(lost)}"


@pytest.mark.timeout(300)
def test_a_journal_that_is_not_synced_is_found_out(tmp_path: Path) -> None:
    """Where all that was acknowledged had just been checkpointed nothing is lost: one of some cuts finds it."""
    require_programs("gcc")
    with PowerCluster(tmp_path, unsynced_journal=True) as cluster:
        play = PowerPlay(cluster, 1, losses=(Loss.ALL,))

        def rounds() -> None:
            for _ in range(CUTS):
                play.round()

        with pytest.raises(Wrong):
            rounds()
