"""One run of fio, and what it measured."""

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench.workloads import Workload
from tests.programs import find_program

#: Far above what any run takes that ends at all.
_GRACE_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """seconds: how long I/O ran. p50_us, p99_us: completion latency. low_mib_s, high_mib_s: the worst and
    the best half second. client_cores: CPU time of fio itself over `seconds`."""

    seconds: float
    iops: float
    mib_s: float
    p50_us: float
    p99_us: float
    low_mib_s: float
    high_mib_s: float
    client_cores: float

    def document(self) -> dict[str, float]:
        """For JSON, with what the figures' precision is worth."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Disk:
    """What fio does I/O on. options: its engine, and where the engine finds it. environment: besides its own."""

    options: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()

    @classmethod
    def nbd(cls, uri: str) -> "Disk":
        """An NBD server's export."""
        return cls(("--ioengine=nbd", f"--uri={uri}"))


def command_of(workload: Workload, disk: Disk, size: int, seconds: float | None = None) -> list[str]:
    """`workload` over the first `size` bytes: for so many seconds, or until each block was touched once."""
    command = [str(find_program("fio")), f"--name={workload.name}", *disk.options, *workload.options()]
    # One set of figures, also where a workload reads and writes.
    command += ["--unified_rw_reporting=mixed", "--randrepeat=0", "--percentile_list=50:99", "--output-format=json"]
    command += [f"--size={size}"]
    if seconds is not None:
        command += ["--time_based=1", f"--runtime={seconds}", "--norandommap=1"]
    return command


def run_timed(workload: Workload, disk: Disk, size: int, seconds: float, directory: Path) -> Measurement:
    """Run `workload` over the first `size` bytes for `seconds`."""
    return parse(_run(command_of(workload, disk, size, seconds), disk, directory, seconds + _GRACE_S))


def run_once(workload: Workload, disk: Disk, size: int, directory: Path) -> Measurement:
    """Run `workload` until each block of the first `size` bytes was touched once."""
    return parse(_run(command_of(workload, disk, size), disk, directory, _GRACE_S))


def _run(command: list[str], disk: Disk, directory: Path, limit_s: float) -> str:
    done = subprocess.run(
        command,
        cwd=directory,
        env=os.environ | dict(disk.environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=limit_s,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def parse(output: str) -> Measurement:
    """The figures of fio's JSON; what it prints before it is left out."""
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    done = job["mixed"]
    percentiles = done["clat_ns"]["percentile"]
    return Measurement(
        seconds=job["job_runtime"] / 1000,
        iops=done["iops"],
        mib_s=done["bw_bytes"] / (1 << 20),
        p50_us=percentiles["50.000000"] / 1000,
        p99_us=percentiles["99.000000"] / 1000,
        low_mib_s=done["bw_min"] / 1024,
        high_mib_s=done["bw_max"] / 1024,
        client_cores=(job["usr_cpu"] + job["sys_cpu"]) / 100,
    )
