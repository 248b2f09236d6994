"""The measurements run from end to end, Cairn and all peers that are installed; how fast is not looked at."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from bench import fio
from bench.__main__ import read_arguments
from bench.processes import Meter
from bench.targets import ALL, TARGETS
from bench.workloads import FILL, MIXED, SEQUENTIAL
from blockstore.units import MIB
from tests.daemons import wait_for
from tests.programs import require_programs

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parent.parent
LIMIT_S = 500.0


def run_whole(command: list[str], output: Path) -> tuple[int, str]:
    """Its exit code and what it printed. However this ends, the servers that it started end as well."""
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(LIMIT_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, output.read_text()


def test_a_short_run_reports_all_that_it_measured(tmp_path: Path) -> None:
    require_programs("fio", "nbdkit", "nbdinfo")
    targets, workloads = ["cairn", "nbdkit-memory"], ["randwrite-4k-32", "randrw-4k-32", "read-1m-8"]
    report = tmp_path / "report"
    short = ["--quick", "--size", "16M", "--seconds", "0.3", "--sustained", "0.5", "--output", str(report)]
    chosen = ["--targets", *targets, "--workloads", *workloads, "--directory", str(tmp_path)]
    code, printed = run_whole([sys.executable, "-m", "bench", *short, *chosen], tmp_path / "printed")
    assert code == 0, printed[-6000:]
    document = json.loads(report.with_suffix(".json").read_text())
    assert set(document["medians"]) == set(document["sustained"]) == set(targets)
    for target, by_workload in document["medians"].items():
        assert set(by_workload) == set(workloads)
        for figures in by_workload.values():
            assert figures["iops"] > 0 < figures["p50_us"] <= figures["p99_us"], target
            assert all(process["private_mib"] > 0 for process in figures["processes"].values())
    assert document["ratios"]["nbdkit-memory"]["read-1m-8"]["iops"][1] > 0
    space = document["space"]["cairn"]
    assert set(space) == {"after fill", "after random overwrite"}
    assert space["after fill"]["tables_bytes"] > 0 < space["after fill"]["journal_bytes"]
    assert "randwrite-4k-32" in printed
    assert report.with_suffix(".html").read_text().count("<svg") == 2 * len(workloads)


@pytest.mark.parametrize("name", [each.name for each in ALL if each.name != "cairn" and not each.missing()])
def test_a_peer_serves_what_is_measured_on_it(name: str, tmp_path: Path) -> None:
    """Those that are installed here: .ci/debian-packages has all but Ceph."""
    require_programs("fio", "nbdinfo")
    with TARGETS[name].start(tmp_path, 16 * MIB) as serving:
        for workload in (FILL, SEQUENTIAL[1]):
            assert fio.run_once(workload, serving.disk, 16 * MIB, tmp_path).iops > 0
        assert serving.commands

        def used_cpu_s() -> float:
            with Meter(serving.pids) as meter:
                fio.run_timed(MIXED[0], serving.disk, 16 * MIB, 0.2, tmp_path)
            return sum(each.cpu_s for each in meter.usage.values())

        wait_for("a run in which it was seen at work", used_cpu_s)


def test_a_target_that_is_not_installed_is_named_with_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("bench.targets.find_program", lambda _: None)
        with pytest.raises(SystemExit):
            read_arguments(["--targets", "nbd-server"])
    assert "nbd-server cannot be measured here: install nbd-server" in capsys.readouterr().err
