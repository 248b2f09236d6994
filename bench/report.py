"""The report: all figures as JSON, and medians as tables for people."""

import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any, Final

import psutil

from bench.runner import Outcome, Plan
from bench.targets import PROMISES
from blockstore.units import format_size

_FIGURES: Final = ("iops", "mib_s", "p50_us", "p99_us", "client_cores")
_SYNCS: Final = 200


def make_document(plan: Plan, outcome: Outcome, machine: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, with medians over the rounds."""
    medians = {
        target: {workload: _median(rounds) for workload, rounds in workloads.items()}
        for target, workloads in outcome.results.items()
    }
    return {
        "machine": machine,
        "plan": {"size_bytes": plan.size, "seconds": plan.seconds, "rounds": plan.rounds},
        "promises": {target: PROMISES[target] for target in outcome.results},
        "medians": medians,
        "sustained": outcome.sustained,
        "space": outcome.space,
        "rounds": outcome.results,
    }


def describe_machine(directory: Path) -> dict[str, Any]:
    """What the figures depend on: also what else ran as they began, and the disk under `directory`."""
    return {
        "cores": psutil.cpu_count(),
        "memory_mib": psutil.virtual_memory().total >> 20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 1),
        "fdatasync_4k_ms": round(_fdatasync_ms(directory), 3),
    }


def make_markdown(document: dict[str, Any]) -> str:
    """The tables."""
    machine, plan = document["machine"], document["plan"]
    lines = [
        f"{machine['cores']} cores, {machine['memory_mib']} MiB, Linux {machine['kernel']}, Python "
        f"{machine['python']}, load {machine['load_average']}; fdatasync: {machine['fdatasync_4k_ms']} ms. Volumes of "
        f"{format_size(plan['size_bytes'])}; medians of {plan['rounds']} runs of {plan['seconds']:g} s, alternated.",
        "",
    ]
    lines += [f"- **{target}**: {promise}" for target, promise in document["promises"].items()]
    lines += ["", *_speed_table(document["medians"])]
    if document["sustained"]:
        lines += ["", *_sustained_table(document["sustained"])]
    lines += ["", *_process_table(document["medians"])]
    if document["space"]:
        lines += ["", *_space_table(document["space"])]
    return "\n".join(lines) + "\n"


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


def _speed_table(medians: dict[str, Any]) -> list[str]:
    """One row for each workload: IOPS (MiB/s where sequential), and latencies in brackets."""
    targets = list(medians)
    workloads = list(next(iter(medians.values())))
    rows = [[workload, *(_cell(workload, medians[target][workload]) for target in targets)] for workload in workloads]
    return table(["workload: rate (p50 / p99 ms)", *targets], rows)


def _cell(workload: str, figures: dict[str, float]) -> str:
    rate = f"{figures['iops']:,.0f}" if workload.startswith("rand") else f"{figures['mib_s']:,.0f} MiB/s"
    return f"{rate} ({figures['p50_us'] / 1000:.2f} / {figures['p99_us'] / 1000:.2f})"


def _sustained_table(sustained: dict[str, Any]) -> list[str]:
    rows = [
        [target, f"{each['mib_s']:,.0f}", f"{each['low_mib_s']:,.0f}", f"{each['high_mib_s']:,.0f}"]
        for target, each in sustained.items()
    ]
    return table(["sustained sequential write, MiB/s", "mean", "worst half second", "best half second"], rows)


def _process_table(medians: dict[str, Any]) -> list[str]:
    """Of each process: cores used in each workload, and the most memory of all of them."""
    workloads = list(next(iter(medians.values())))
    rows = []
    for target, by_workload in medians.items():
        client = [f"{by_workload[workload]['client_cores']:.2f}" for workload in workloads]
        rows.append([f"{target}: fio", *client, ""])
        for name in by_workload[workloads[0]]["processes"]:
            used = [by_workload[workload]["processes"][name] for workload in workloads]
            rows.append(
                [
                    f"{target}: {name}",
                    *(f"{each['cores']:.2f}" for each in used),
                    f"{max(e['private_mib'] for e in used):,.0f}",
                ]
            )
    return table(["cores used by", *workloads, "private MiB at most"], rows)


def _space_table(space: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"{target} {moment}",
            f"{each['tables_per_user_byte_and_replica']:.3f}",
            *(format_size(each[f"{part}_bytes"]) for part in ("tables", "journal", "ballast")),
        ]
        for target, moments in space.items()
        for moment, each in moments.items()
    ]
    head = ["disk space of all replicas", "in tables per user byte and replica", "tables", "journal", "ballast"]
    return table(head, rows)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown; the first column is text, the others figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


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
