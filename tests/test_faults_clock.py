"""The wall clock of a program in Go, which goes past the C library, can be moved while it runs."""

import datetime
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.daemons import is_gone, wait_for
from tests.faults.shim import Steering
from tests.loopback import free_address
from tests.programs import require_programs

_HOUR_NS: Final = 3_600_000_000_000
_TELLS_THE_TIME: Final = "import sys, time\nfor line in sys.stdin: print(int(time.time()), flush=True)"


@contextmanager
def running(*command: str) -> "Iterator[subprocess.Popen[str]]":
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def test_etcd_believes_the_clock_that_it_is_shown(tmp_path: Path) -> None:
    require_programs("gcc", "etcd")
    steering = Steering(tmp_path / "steering")
    steering.set(clock_offset_ns=30 * _HOUR_NS)
    urls = [f"http://{free_address()}" for _ in range(2)]
    options = [
        "--data-dir",
        str(tmp_path / "data"),
        "--listen-client-urls",
        urls[0],
        "--advertise-client-urls",
        urls[0],
    ]
    with running(*steering.clock(), "etcd", *options, "--listen-peer-urls", urls[1], "--logger", "zap") as etcd:
        assert etcd.stdout is not None
        said = next(line for line in etcd.stdout if line.startswith("{"))
    at = datetime.datetime.fromisoformat(json.loads(said)["ts"].replace("Z", "+00:00"))
    ahead = at - datetime.datetime.now(datetime.UTC)
    assert abs(ahead - datetime.timedelta(hours=30)) < datetime.timedelta(minutes=5)


def test_it_jumps_while_the_program_runs_which_is_stopped_and_killed_like_any_other(tmp_path: Path) -> None:
    """By its own pid; nobody is left to trace it."""
    require_programs("gcc")
    steering = Steering(tmp_path / "steering")
    command = [*steering.clock(), sys.executable, "-c", _TELLS_THE_TIME]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as program:
        assert program.stdin is not None
        assert program.stdout is not None

        def now() -> int:
            assert program.stdin is not None
            assert program.stdout is not None
            program.stdin.write("\n")
            return int(program.stdout.readline())

        before = now()
        (tracer,) = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        steering.set(clock_offset_ns=-_HOUR_NS)
        assert -3600 <= now() - before <= -3300
        program.send_signal(signal.SIGSTOP)
        wait_for("it to stop", lambda: state(program.pid) in "Tt")
        program.send_signal(signal.SIGCONT)
        steering.set(clock_offset_ns=0)
        assert 0 <= now() - before <= 300
        program.kill()
        assert program.wait() == -signal.SIGKILL
        wait_for("its tracer to end", lambda: is_gone(int(tracer)))


def state(pid: int) -> str:
    """As the kernel has it: R, S, T, Z..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
