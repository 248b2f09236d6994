"""Runs the workloads on all targets, alternated: what the machine does meanwhile meets all alike.

One target serves at a time for a workload's run, but all are up, so that no figure includes a start. Each run follows
one of the same workload that is not measured, and every other round takes the targets in the other order, so that
whoever comes after a heavy one is not always the same. Volumes are filled first; space is measured after the fill and
after every block was overwritten.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench import fio
from bench.processes import Meter
from bench.serving import Serving
from bench.space import Space
from bench.targets import TARGETS
from bench.workloads import ALL, FILL, OVERWRITE, SUSTAINED, Workload
from blockstore.units import MIB
from tests.daemons import wait_for

_SETTLE_LIMIT_S: Final = 60.0


@dataclass(frozen=True)
class Plan:
    """seconds: of each measurement; warm_s: of what goes before it. rounds: of each. sustained_s: 0 for none.

    settle_s: for how long the space that a target takes has to stay the same before it is read.
    """

    targets: tuple[str, ...] = tuple(TARGETS)
    workloads: tuple[Workload, ...] = ALL
    size: int = 1024 * MIB
    seconds: float = 5
    warm_s: float = 1
    rounds: int = 3
    sustained_s: float = 0
    settle_s: float = 8


@dataclass
class Outcome:
    """results[target][workload name]: one document for each round. space[target][moment]. sustained[target].

    commands[target]: what its servers were started with, and fio for each workload. backups[program][figure].
    backup_seconds: the times among those.
    """

    results: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    space: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    sustained: dict[str, dict[str, Any]] = field(default_factory=dict)
    commands: dict[str, dict[str, Any]] = field(default_factory=dict)
    backups: dict[str, dict[str, str]] = field(default_factory=dict)
    backup_seconds: dict[str, dict[str, float]] = field(default_factory=dict)


def run(plan: Plan, directory: Path, say: Callable[[str], None]) -> Outcome:
    """Start the targets, measure, end them. directory: for their data. say: gets a line for each step."""
    with ExitStack() as stack:
        serving = {}
        for name in plan.targets:
            say(f"start {name}")
            place = directory / name
            place.mkdir()
            serving[name] = stack.enter_context(TARGETS[name].start(place, plan.size))
        return _Run(plan, directory, serving, say).measure()


class _Run:
    """With all targets up."""

    def __init__(self, plan: Plan, directory: Path, serving: dict[str, Serving], say: Callable[[str], None]) -> None:
        self._plan = plan
        self._directory = directory
        self._serving = serving
        self._say = say
        self._outcome = Outcome()

    def measure(self) -> Outcome:
        for name, serving in self._serving.items():
            self._say(f"fill {name}")
            fio.run_once(FILL, serving.disk, self._plan.size, self._directory)
            self._measure_space(name, "after fill")
            self._outcome.commands[name] = self._commands(serving)
        names = list(self._serving)
        for number in range(self._plan.rounds):
            self._round(number + 1, names if number % 2 == 0 else names[::-1])
        for name in self._serving:
            self._finish(name)
        return self._outcome

    def _commands(self, serving: Serving) -> dict[str, Any]:
        plan = self._plan
        runs = {
            each.name: " ".join(fio.command_of(each, serving.disk, plan.size, plan.seconds)) for each in plan.workloads
        }
        return {"servers": serving.commands, "environment": dict(serving.disk.environment), "fio": runs}

    def _round(self, number: int, names: Sequence[str]) -> None:
        for workload in self._plan.workloads:
            for name in names:
                document = self._timed(name, workload, self._plan.seconds)
                self._outcome.results.setdefault(name, {}).setdefault(workload.name, []).append(document)
                self._say(f"round {number} {workload.name} {name}: {document['iops']:,.0f} IOPS")

    def _timed(self, name: str, workload: Workload, seconds: float) -> dict[str, Any]:
        serving, plan = self._serving[name], self._plan
        if plan.warm_s:
            fio.run_timed(workload, serving.disk, plan.size, plan.warm_s, self._directory)
        with Meter(serving.pids) as meter:
            measured = fio.run_timed(workload, serving.disk, plan.size, seconds, self._directory)
        usage = {process: each.document(measured.seconds) for process, each in meter.usage.items()}
        spent_us = sum(each.cpu_s for each in meter.usage.values()) * 1e6
        requests = max(measured.iops * measured.seconds, 1)
        return {**measured.document(), "cpu_us": round(spent_us / requests, 1), "processes": usage}

    def _finish(self, name: str) -> None:
        if self._plan.sustained_s:
            self._say(f"sustained write {name}")
            self._outcome.sustained[name] = self._timed(name, SUSTAINED, self._plan.sustained_s)
        if self._serving[name].measure_space is not None:
            self._say(f"overwrite {name}")
            fio.run_once(OVERWRITE, self._serving[name].disk, self._plan.size, self._directory)
            self._measure_space(name, "after random overwrite")

    def _measure_space(self, name: str, moment: str) -> None:
        measure, plan = self._serving[name].measure_space, self._plan
        if measure is None:
            return
        seen: list[tuple[float, Space]] = []

        def settled() -> Space | None:
            now, space = time.monotonic(), measure(plan.size)
            if not seen or seen[0][1] != space:
                seen[:] = [(now, space)]
            return space if now - seen[0][0] >= plan.settle_s else None

        space = wait_for(f"{name} to have written all", settled, _SETTLE_LIMIT_S)
        self._outcome.space.setdefault(name, {})[moment] = space.document()
