"""One run of fio over NBD, and what it measured."""

import json
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


def run_timed(workload: Workload, uri: str, size: int, seconds: float, directory: Path) -> Measurement:
    """Run `workload` over the first `size` bytes for `seconds`."""
    options = [f"--size={size}", "--time_based=1", f"--runtime={seconds}", "--norandommap=1"]
    return parse(_run(workload, uri, options, directory, seconds + _GRACE_S), workload)


def run_once(workload: Workload, uri: str, size: int, directory: Path) -> Measurement:
    """Run `workload` until each block of the first `size` bytes was touched once."""
    return parse(_run(workload, uri, [f"--size={size}"], directory, _GRACE_S), workload)


def _run(workload: Workload, uri: str, options: list[str], directory: Path, limit_s: float) -> str:
    command = [str(find_program("fio")), f"--name={workload.name}", "--ioengine=nbd", f"--uri={uri}"]
    command += [f"--rw={workload.pattern}", f"--bs={workload.block_size}", f"--iodepth={workload.depth}"]
    command += ["--randrepeat=0", "--percentile_list=50:99", "--output-format=json", *options]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=False, timeout=limit_s, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def parse(output: str, workload: Workload) -> Measurement:
    """The figures of fio's JSON; what it prints before it is left out."""
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    side = job["write" if "write" in workload.pattern else "read"]
    percentiles = side["clat_ns"]["percentile"]
    return Measurement(
        seconds=job["job_runtime"] / 1000,
        iops=side["iops"],
        mib_s=side["bw_bytes"] / (1 << 20),
        p50_us=percentiles["50.000000"] / 1000,
        p99_us=percentiles["99.000000"] / 1000,
        low_mib_s=side["bw_min"] / 1024,
        high_mib_s=side["bw_max"] / 1024,
        client_cores=(job["usr_cpu"] + job["sys_cpu"]) / 100,
    )
