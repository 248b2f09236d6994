"""Every kind of fault once, in an order that a seed gives, under three witnesses.

For hours: `python -m tests.faults --hours 2 --seed N`.
"""

from pathlib import Path

import pytest

from tests.faults.kinds import KINDS
from tests.faults.schedule import run_schedule
from tests.programs import require_programs

pytestmark = pytest.mark.xdist_group("load")

SEED = 1
#: Short, because there are many; the command lets them last longer.
LASTING_S = (0.2, 0.8)
#: Other tests have the machine as well.
THINK_S = 0.05


@pytest.mark.timeout(1200)
def test_every_kind_of_fault_is_survived(tmp_path: Path) -> None:
    require_programs("fio", "gcc", "etcd", "etcdctl")
    print("again with: python -m tests.faults --rounds 1 --lasting", *LASTING_S, "--seed", SEED)
    report = run_schedule(tmp_path, SEED, 0.0, print, lasting_s=LASTING_S, think_s=THINK_S)
    print("\n".join(report.lines()))
    assert set(report.kinds) == set(KINDS)
    assert report.registers_checked > 2000
    assert report.unknown, "nothing was in flight when a front-end was killed"
    assert report.fio_rounds
