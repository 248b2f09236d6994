"""A file system on `cairn attach` of a real Linux kernel goes on while its packets are late, lost, and come twice."""

import re
from pathlib import Path

import pytest

from blockstore.units import MIB
from tests.linux_host.guest import require_kernel, running, script
from tests.linux_host.kernel import Series
from tests.linux_host.machine import Machine
from tests.linux_host.python_disk import SHELL, make_python_disk
from tests.linux_host.reached_by_guests import ReachedByGuests
from tests.programs import require_programs

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(600)]

SIZE = 128 * MIB
#: A quiet machine takes a quarter of it.
LIMIT_S = 420
#: Each way. With that much jitter, packets overtake each other.
BAD_LINE = "'delay 50ms 30ms loss 5% duplicate 2%'"
LEAST_ROUND_TRIP_MS = 40
FILES = 12


def goes_on(guest: Machine, more: int = FILES) -> None:
    """Waits until it has synced some more files."""
    count = len(guest.said(r"SYNCED \d+ at")) + more
    guest.wait_for(rf"SYNCED {count} at")


def test_a_file_system_on_a_bad_line(tmp_path: Path) -> None:
    """Also a front-end is killed and started again meanwhile."""
    kernel = require_kernel(Series.LINUX_6_12)
    require_programs("tc")
    (tmp_path / "disk").mkdir()
    disk = make_python_disk(tmp_path / "disk")
    (tmp_path / "cluster").mkdir()
    with ReachedByGuests(tmp_path / "cluster") as cluster:
        volume = cluster.create(SIZE)
        where = f"nbd://{cluster.control_address}/{volume}"
        text = SHELL + script("bad_line", "whole", BAD_LINE=BAD_LINE)
        with running(
            kernel,
            text,
            tmp_path / "guest",
            where,
            LIMIT_S,
            disk=disk,
            programs=("tc",),
            modules=("sch_netem", "sch_ingress", "cls_matchall", "act_mirred", "ifb"),
        ) as guest:
            goes_on(guest)
            guest.tell("bad")
            guest.wait_for("BAD")
            goes_on(guest)
            (front_end,) = cluster.front_ends
            front_end.kill()
            cluster.start(front_end)
            goes_on(guest)
            guest.tell("good")
            guest.wait_for("GOOD")
            goes_on(guest)
            guest.tell("end")
        result = guest.end()
    print(result)
    assert result.status == 0, str(result)
    assert "CLEAN" in result.output
    # The line was as bad as it was to be.
    least = re.findall(r"round-trip min/avg/max = ([0-9.]+)/", result.output)
    assert [float(each) >= LEAST_ROUND_TRIP_MS for each in least] == [True]
    lost = dict(re.findall(r"(eth0|ifb0): .*?dropped (\d+)", result.output))
    assert set(lost) == {"eth0", "ifb0"}
    assert "0" not in lost.values()
