"""Runs the workloads on all targets, alternated: what the machine does meanwhile meets all alike.

One target serves at a time for a workload's run, but all are up, so that no figure includes a start.
Volumes are filled first; space is measured after the fill and after every block was overwritten.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench import fio
from bench.processes import Meter
from bench.space import Space
from bench.targets import TARGETS, Target
from bench.workloads import ALL, FILL, OVERWRITE, SUSTAINED, Workload
from blockstore.units import MIB
from tests.daemons import wait_for

_SETTLE_LIMIT_S: Final = 60.0


@dataclass(frozen=True)
class Plan:
    """seconds: of each measurement; rounds: of each, for the median. sustained_s: 0 for none.

    settle_s: for how long the space that a target takes has to stay the same before it is read.
    """

    targets: tuple[str, ...] = tuple(TARGETS)
    workloads: tuple[Workload, ...] = ALL
    size: int = 1024 * MIB
    seconds: float = 5
    rounds: int = 3
    sustained_s: float = 0
    settle_s: float = 8


@dataclass
class Outcome:
    """results[target][workload name]: one document for each round. space[target][moment]. sustained[target]."""

    results: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    space: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    sustained: dict[str, dict[str, Any]] = field(default_factory=dict)


def run(plan: Plan, directory: Path, say: Callable[[str], None]) -> Outcome:
    """Start the targets, measure, end them. directory: for their data. say: gets a line for each step."""
    outcome = Outcome()
    with ExitStack() as stack:
        targets = [stack.enter_context(start) for start in _starts(plan, directory)]
        for target in targets:
            say(f"fill {target.name}")
            fio.run_once(FILL, target.uri, plan.size, directory)
            _measure_space(target, "after fill", plan, outcome)
        for round_number in range(plan.rounds):
            for workload in plan.workloads:
                for target in targets:
                    document = _measure(target, workload, plan.size, plan.seconds, directory)
                    outcome.results.setdefault(target.name, {}).setdefault(workload.name, []).append(document)
                    say(f"round {round_number + 1} {workload.name} {target.name}: {document['iops']:,.0f} IOPS")
        for target in targets:
            _finish(target, plan, outcome, directory, say)
    return outcome


def _starts(plan: Plan, directory: Path) -> Iterable[Any]:
    for name in plan.targets:
        place = directory / name
        place.mkdir()
        yield TARGETS[name](place, plan.size)


def _finish(target: Target, plan: Plan, outcome: Outcome, directory: Path, say: Callable[[str], None]) -> None:
    if plan.sustained_s:
        say(f"sustained write {target.name}")
        outcome.sustained[target.name] = _measure(target, SUSTAINED, plan.size, plan.sustained_s, directory)
    if target.measure_space is not None:
        say(f"overwrite {target.name}")
        fio.run_once(OVERWRITE, target.uri, plan.size, directory)
        _measure_space(target, "after random overwrite", plan, outcome)


def _measure(target: Target, workload: Workload, size: int, seconds: float, directory: Path) -> dict[str, Any]:
    with Meter(target.pids) as meter:
        measurement = fio.run_timed(workload, target.uri, size, seconds, directory)
    usage = {name: each.document(measurement.seconds) for name, each in meter.usage.items()}
    return {**measurement.document(), "processes": usage}


def _measure_space(target: Target, moment: str, plan: Plan, outcome: Outcome) -> None:
    if target.measure_space is None:
        return
    measure = target.measure_space
    seen: list[tuple[float, Space]] = []

    def settled() -> Space | None:
        now, space = time.monotonic(), measure(plan.size)
        if not seen or seen[0][1] != space:
            seen[:] = [(now, space)]
        return space if now - seen[0][0] >= plan.settle_s else None

    space = wait_for(f"{target.name} to have written all", settled, _SETTLE_LIMIT_S)
    outcome.space.setdefault(target.name, {})[moment] = space.document()
