"""Kinds of faults, each once, in an order that a seed gives, under three witnesses.

All of them, for hours: `python -m tests.faults --hours 2 --seed N`. Those that have a test of their own, with processes
as real and witnesses of the same kind, are left to it here.
"""

from pathlib import Path
from typing import Final

import pytest

from tests.faults.kinds import KINDS
from tests.faults.schedule import run_schedule
from tests.programs import require_programs

pytestmark = pytest.mark.xdist_group("load")

SEED = 1
TESTED: Final = {
    "addresses_swapped": "test_faults_gray",
    "all_controls_killed": "test_control_failover",
    "all_nodes_killed": "test_crash_nodes",
    "control_killed": "test_control_failover",
    "control_paused": "test_control_failover",
    "disk_full": "test_crash_full_disk",
    "disk_slow": "test_faults_gray",
    "etcd_killed": "test_control_failover",
    "killed_draining": "test_crash_repair",
    "node_drained": "test_crash_repair",
    "node_killed": "test_crash_nodes",
    "node_replaced": "test_crash_repair",
    "old_copy_put_back": "test_crash_old_copy",
    "snapshotd_killed": "test_crash_snapshots",
}
#: Short, because there are many; the command lets them last longer.
LASTING_S = (0.2, 0.8)
#: Other tests have the machine as well.
THINK_S = 0.05


@pytest.mark.timeout(1200)
def test_every_kind_of_fault_is_survived(tmp_path: Path) -> None:
    require_programs("fio", "gcc", "etcd", "etcdctl")
    assert all((Path(__file__).parent / f"{test}.py").exists() for test in TESTED.values())
    kinds = [each for each in KINDS if each not in TESTED]
    chosen = " ".join(f"--kind {each}" for each in kinds)
    least, most = LASTING_S
    print(f"again with: python -m tests.faults --rounds 1 --lasting {least} {most} --seed {SEED} {chosen}")
    report = run_schedule(tmp_path, SEED, 0.0, print, kinds, lasting_s=LASTING_S, think_s=THINK_S)
    print("\n".join(report.lines()))
    assert set(report.kinds) == set(KINDS) - set(TESTED)
    assert report.registers_checked > 2000
    assert report.unknown, "nothing was in flight when a front-end was killed"
    assert report.fio_rounds
