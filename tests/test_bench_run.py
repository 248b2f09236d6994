"""The measurements run from end to end, Cairn and all peers; how fast is not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.targets import TARGETS
from tests.programs import require_programs

pytestmark = pytest.mark.xdist_group("load")

ROOT = Path(__file__).parent.parent


def test_a_short_run_reports_all_targets(tmp_path: Path) -> None:
    require_programs("fio", "nbdkit", "qemu-nbd", "nbdinfo")
    report = tmp_path / "report.json"
    places = ["--directory", str(tmp_path), "--json", str(report)]
    command = [sys.executable, "-m", "bench", "--short", "--sustained", "0.5", *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    document = json.loads(report.read_text())
    assert set(document["medians"]) == set(document["sustained"]) == set(TARGETS)
    for target, workloads in document["medians"].items():
        assert len(workloads) == 3
        for figures in workloads.values():
            assert figures["iops"] > 0 < figures["p50_us"] <= figures["p99_us"], target
            assert all(process["private_mib"] > 0 for process in figures["processes"].values())
    space = document["space"]["cairn"]
    assert set(space) == {"after fill", "after random overwrite"}
    assert space["after fill"]["tables_bytes"] > 0 < space["after fill"]["journal_bytes"]
    assert "randwrite-4k-32" in done.stdout


def test_the_micro_benchmarks_run() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", "bench/micro"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout
