"""What was measured as one document: every round, medians over them, and how Cairn compares with each peer."""

import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import psutil

from bench.goals import judge
from bench.runner import Outcome, Plan
from bench.targets import TARGETS
from tests.programs import find_program

_FIGURES: Final = ("iops", "mib_s", "p50_us", "p99_us", "client_cores", "cpu_us")
_COMPARED: Final = ("iops", "p50_us", "p99_us")
_SYNCS: Final = 200
_CAIRN: Final = "cairn"


def make_document(
    plan: Plan, outcome: Outcome, machine: dict[str, Any], left_out: dict[str, list[str]] | None = None
) -> dict[str, Any]:
    """left_out: targets that were not measured, and the programs that they lack."""
    document = {
        "machine": machine,
        "plan": {
            "size_bytes": plan.size,
            "seconds": plan.seconds,
            "warm_seconds": plan.warm_s,
            "rounds": plan.rounds,
        },
        "promises": {target: TARGETS[target].promise for target in outcome.results},
        "left_out": left_out or {},
        "medians": {
            target: {workload: _median(rounds) for workload, rounds in workloads.items()}
            for target, workloads in outcome.results.items()
        },
        "ratios": _ratios(outcome.results),
        "sustained": outcome.sustained,
        "space": outcome.space,
        "backups": outcome.backups,
        "backup_seconds": outcome.backup_seconds,
        "commands": outcome.commands,
        "rounds": outcome.results,
    }
    return document | {"goals": judge(document)}


def describe_machine(directory: Path) -> dict[str, Any]:
    """What the figures depend on: also what else ran as they began, and the disk under `directory`."""
    return {
        "cores": psutil.cpu_count(),
        "cpu": _cpu_model(),
        "memory_mib": psutil.virtual_memory().total >> 20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 1),
        "fdatasync_4k_ms": round(_fdatasync_ms(directory), 3),
        "versions": _versions(),
    }


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {name: statistics.median(each[name] for each in rounds) for name in _FIGURES}
    names = rounds[0]["processes"]
    figures["processes"] = {
        name: {
            key: statistics.median(each["processes"][name][key] for each in rounds) for key in ("cores", "private_mib")
        }
        for name in names
    }
    return figures


def _ratios(results: dict[str, Any]) -> dict[str, Any]:
    """Cairn's figure over the peer's in the same round: the lowest, the median and the highest of the rounds."""
    cairn = results.get(_CAIRN, {})
    return {
        peer: {
            workload: {figure: _spread(cairn[workload], theirs, figure) for figure in _COMPARED}
            for workload, theirs in workloads.items()
        }
        for peer, workloads in results.items()
        if cairn and peer != _CAIRN
    }


def _spread(ours: list[dict[str, float]], theirs: list[dict[str, float]], figure: str) -> list[float]:
    found = [a[figure] / b[figure] for a, b in zip(ours, theirs, strict=True) if b[figure]]
    return [round(each, 3) for each in (min(found), statistics.median(found), max(found))] if found else [0.0] * 3


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    """Of fio and of every program of a target that is installed, as they say it; and Cairn's commit."""
    programs = dict.fromkeys(("fio", *(each.programs[0] for each in TARGETS.values() if each.programs)))
    said = {name: _first_line([program, "--version"]) for name in programs if (program := find_program(name))}
    return {"cairn": _first_line(["git", "describe", "--always", "--dirty"]), **said}


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).partition("\n")[0].strip()


def _fdatasync_ms(directory: Path) -> float:
    path = directory / "fdatasync"
    with path.open("wb", buffering=0) as file:
        file.write(bytes(_SYNCS * 4096))
        os.fsync(file.fileno())
        began = time.monotonic()
        for at in range(_SYNCS):
            os.pwrite(file.fileno(), b"x" * 4096, at * 4096)
            os.fdatasync(file.fileno())
        spent = time.monotonic() - began
    path.unlink()
    return spent / _SYNCS * 1000
