"""The micro-benchmarks run, and a run is told beside the baseline. No time is judged."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.micro.__main__ import BASELINE, read_arguments
from bench.micro.baseline import CALIBRATION, Figure, compare, make_baseline, name_of, read_run
from bench.micro.calibration import Calibration

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(400)
def test_each_runs_and_has_its_place_in_the_baseline() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--benchmark-disable"]
    done = subprocess.run(
        [*command, "bench/micro"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=350
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    ran = {name_of(name) for name in re.findall(r"^PASSED (.+)$", done.stdout, re.MULTILINE)}
    assert ran == set(json.loads(BASELINE.read_text())), "make it anew: python -m bench.micro --save"


def benchmarked(name: str, group: str, least_s: float, calibration_s: float) -> dict[str, Any]:
    """As pytest-benchmark says it."""
    return {
        "fullname": f"bench/micro/{name}",
        "group": group,
        "stats": {"min": least_s, "median": least_s * 2},
        "extra_info": {CALIBRATION: calibration_s},
    }


def test_a_figure_is_its_least_time_over_that_of_its_calibration() -> None:
    run = {"benchmarks": [benchmarked("test_a.py::test_b[1 block]", "do b", 0.25, 0.5)]}
    assert read_run(run) == {"test_a.py::test_b[1 block]": Figure("do b", 0.5, 0.5)}


def test_a_machine_twice_as_slow_gives_the_same_baseline() -> None:
    baselines = [
        make_baseline(read_run({"benchmarks": [benchmarked("test_a.py::test_b", "b", 3e-6 * slow, 1e-4 * slow)]}))
        for slow in (1, 2)
    ]
    assert baselines[0] == baselines[1] == {"test_a.py::test_b": 0.03}


def test_the_table_says_what_changed_what_is_new_and_what_did_not_run() -> None:
    figures = {"t.py::a[x]": Figure("do a", 2e-6, 0.3), "t.py::b": Figure("do b", 2e-3, 5.0)}
    head, rows = compare(figures, {"t.py::a[x]": 0.2, "t.py::c": 1.0})
    assert rows == [
        ["do a: x", "2 us", "0.3", "0.2", "1.50"],
        ["do b", "2 ms", "5", "", "new"],
        ["t.py::c", "not run", "", "1", ""],
    ]
    assert {len(row) for row in rows} == {len(head)}


def test_a_calibration_is_timed_by_the_loop_that_was_chosen() -> None:
    calibration, calls = Calibration(for_s=0.01), []
    calibration.before_and_after()
    assert 0 < calibration.seconds < float("inf")
    calibration.by(lambda: calls.append(1))
    chosen_s, count = calibration.seconds, len(calls)
    calibration.before_and_after()
    assert count > 1
    assert (calibration.seconds, len(calls)) == (chosen_s, count)


def test_a_part_of_the_run_is_no_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_arguments(["--save", "-k", "nbd"])
    assert "save a whole run" in capsys.readouterr().err
