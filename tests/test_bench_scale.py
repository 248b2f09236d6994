"""The measurement of scale runs from end to end, in a small instance; how fast is not looked at."""

import json
import sys
from pathlib import Path

import pytest

from bench.scale import report
from tests.test_bench_run import LIMIT_S, run_whole


@pytest.mark.timeout(2 * LIMIT_S)
def test_a_small_instance_reports_times_and_memory_of_both_sides(tmp_path: Path) -> None:
    sizes = ["--volume-size", "0", "--snapshots", "0", "--volumes", "3", "--rounds", "1", "--listed", "2"]
    made = tmp_path / "scale.json"
    command = [sys.executable, "-m", "bench.scale", *sizes, "--directory", str(tmp_path), "--output", str(made)]
    code, printed = run_whole(command, tmp_path / "printed")
    assert code == 0, printed[-6000:]
    ((name, case),) = json.loads(made.read_text())["cases"].items()
    assert (name, case["size"]) == ("volumes on a node", "3")
    assert len(case["probes"]) == 6
    assert all(each["small_ms"] > 0 and each["large_ms"] > 0 for each in case["probes"].values())
    assert set(case["memory"]["large"]) == {"control", "node-0", "node-1", "node-2", "snapshotd-0", "front-end-0"}
    assert case["memory"]["small"].keys() == case["memory"]["large"].keys()
    assert "| volumes on a node, 3: make a snapshot |" in printed


def test_the_report_says_which_goals_are_met() -> None:
    memory = {"control": {"rss_mib": 50.0, "private_mib": 20.0}}
    probes = {
        "fast": {"small_ms": 2.0, "large_ms": 2.4, "ratio": 1.2},
        "slow": {"small_ms": 2.0, "large_ms": 2.6, "ratio": 1.3},
    }
    text = report({"volume size": {"size": "1 TiB", "probes": probes, "memory": {"small": memory, "large": memory}}})
    assert "| volume size, 1 TiB: fast | 2 | 2.4 | 1.20 | met |" in text
    assert "| volume size, 1 TiB: slow | 2 | 2.6 | 1.30 | not met |" in text
    assert "| volume size: control | 50 | 20 | 50 | 20 |" in text
