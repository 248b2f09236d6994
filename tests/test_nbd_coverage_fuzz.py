"""The fuzzer that is guided by coverage, for a bounded time: see tests/fuzz_nbd.py; `NBD_FUZZ_S=600` for longer.

In CI by the same seed each time, elsewhere by another one. A failure prints what tries its bytes again.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IN_CI = os.environ.get("CI") == "true"
SECONDS = int(float(os.environ.get("NBD_FUZZ_S", "20" if IN_CI else "5")))
SEED = int(os.environ.get("NBD_FUZZ_SEED", "1" if IN_CI else "0"))


@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this Python")
def test_no_bytes_of_a_client_break_what_reads_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz_nbd", "--seconds", str(SECONDS), "--seed", str(SEED)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS + 250
    )
    again = [
        f"echo {path.read_bytes().hex()} | xxd -r -p >bytes && python -m tests.fuzz_nbd --input bytes"
        for path in tmp_path.iterdir()
    ]
    assert done.returncode == 0, f"{done.stderr[-3000:]}\nagain with: {again}"
    assert int(done.stderr.split("stat::new_units_added:")[1].split()[0]) > 20, "it finds its way by what it covers"
