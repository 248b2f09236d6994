"""What hypothesis draws: in CI the same each time, else other things; a failure says how to replay it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEST = """
from hypothesis import given, strategies as st
drawn = []
@given(st.integers(0, 1 << 60))
def test_draws(number):
    drawn.append(number)
def test_tells():
    print("drawn:", hash(tuple(drawn)))
@given(st.integers())
def test_fails(number):
    assert number < 1000
"""


def said(directory: Path, ci: str, *arguments: str) -> str:
    """What pytest says of TEST."""
    file = directory / "test_drawing.py"
    file.write_text(TEST)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "tests.conftest",
        "--rootdir",
        str(directory),
        str(file),
    ]
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *arguments], cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "@reproduce_failure(" in done.stdout
    return next(line for line in done.stdout.splitlines() if "drawn:" in line)


def test_ci_draws_the_same_each_time_and_others_do_not(tmp_path: Path) -> None:
    assert said(tmp_path, "true") == said(tmp_path, "true")
    assert said(tmp_path, "true", "--hypothesis-profile=random") != said(tmp_path, "true")
    assert said(tmp_path, "") != said(tmp_path, "")
